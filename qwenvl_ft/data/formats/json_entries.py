"""How JSON values are spoken of."""

from typing import Any

EXAMPLE = '{"conversations": [{"from": "user", "value": "..."}, {"from": "assistant", "value": "..."}]}'


def kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")
