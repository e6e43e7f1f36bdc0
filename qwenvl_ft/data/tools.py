"""Tools as chat templates want them: functions that a model may call, and its calls. A record holds both as JSON texts.

>>> function_of('{"name": "zoom"}')
{'type': 'function', 'function': {'name': 'zoom'}}
>>> call_of('{"name": "zoom", "arguments": "{\\\\"x\\\\": 1}"}')
{'type': 'function', 'function': {'name': 'zoom', 'arguments': {'x': 1}}}
"""

import json
from typing import Any

from qwenvl_ft.errors import Problem, UserError

FUNCTION = 'write {"type": "function", "function": {"name": "...", "description": "...", "parameters": {...}}}'
CALL = 'write {"name": "...", "arguments": {...}}'


def function_of(text: str) -> dict[str, Any]:
    """{"type": "function", "function": {...}} of that, of the function alone, or of both in one object; keys keep their order.

    Raises UserError for what is none of them.
    """
    found = _object(text, "a tool", FUNCTION)
    kind = found.get("type", "function")
    if not isinstance(found.get("function"), dict):
        found = {"function": {key: value for key, value in found.items() if key != "type"}}
    if kind != "function" or not isinstance(found["function"].get("name"), str):
        raise _problem("a tool", text, "is no function with a name", FUNCTION)
    return found if "type" in found else {"type": kind, **found}


def call_of(text: str) -> dict[str, Any]:
    """{"type": "function", "function": {"name", "arguments"}} with the arguments as an object, from an object, its JSON text, or
    nothing.

    Raises UserError for what is no call.
    """
    found = _object(text, "a call", CALL)
    arguments = found.get("arguments") or {}
    if isinstance(arguments, str):
        arguments = _object(arguments, "a call's arguments", CALL) if arguments.strip() else {}
    if not isinstance(found.get("name"), str) or not isinstance(arguments, dict):
        raise _problem("a call", text, "has no name, or arguments that are no object", CALL)
    if others := found.keys() - {"name", "arguments"}:
        raise _problem("a call", text, f"has a key {min(others)!r}, which no template writes", CALL)
    return {"type": "function", "function": {"name": found["name"], "arguments": arguments}}


def _object(text: str, what: str, fix: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
        json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise _problem(what, text, "holds half of a surrogate pair, which no tokenizer can read", fix) from None
    except (ValueError, RecursionError):
        raise _problem(what, text, "is not JSON", fix) from None
    if not isinstance(found, dict):
        raise _problem(what, text, "is not an object", fix)
    return found


def _problem(what: str, text: str, complaint: str, fix: str) -> UserError:
    shown = text[:60].encode("utf-8", "replace").decode()
    return UserError(Problem(what, f"{shown} {complaint}", fix, kind=f"{what} {complaint}"))
