"""JSON values as a user writes them: read without a loss, and how they are spoken of."""

import json
from typing import Any

EXAMPLE = '{"conversations": [{"from": "user", "value": "..."}, {"from": "assistant", "value": "..."}]}'


def kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")


class Refused(ValueError):
    """What Python's reader lets pass, with its fix: of a key that stands twice it would lose the first without a word."""


def _pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
    entry = dict(items)
    if len(entry) < len(items):
        keys = [key for key, _ in items]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise Refused(f'an object has the key "{twice}" twice', "keep one of them, or make two records")
    return entry


def _constant(word: str) -> Any:
    raise Refused(f"holds {word}, which is not JSON", "write a number or a text")


DECODER = json.JSONDecoder(object_pairs_hook=_pairs, parse_constant=_constant)


def parse(text: str) -> Any:
    """A JSON value. Raises ValueError."""
    try:
        return DECODER.decode(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
