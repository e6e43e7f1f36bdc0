"""Tools and the calls of tools, as every form writes them, made into JSON texts of one form."""

import json
from typing import Any

from qwenvl_ft.data.formats.keys import Complaints, is_empty

CALL = 'write {"name": "...", "arguments": {...}}'
TOOL = 'write {"type": "function", "function": {"name": "...", "description": "...", "parameters": {...}}}'


def tools_of(value: Any, where: str, complaints: Complaints) -> tuple[str, ...]:
    """The tools of a record, given as a list or as its JSON text: each as OpenAI writes it, whether or not it was so wrapped."""
    if is_empty(value):
        return ()
    tools = _parsed(value, where, TOOL, complaints)
    found = []
    for number, tool in enumerate([tools] if isinstance(tools, dict) else tools if isinstance(tools, list) else ()):
        tool = _parsed(tool, f"{where}[{number}]", TOOL, complaints)
        if not isinstance(tool, dict):
            continue
        function = tool.get("function", tool)
        if (
            not isinstance(function, dict)
            or not isinstance(function.get("name"), str)
            or tool.get("type", "function") != "function"
        ):
            complaints.say(f"{where}[{number}]", "is no tool with a name", TOOL)
            continue
        found.append(json.dumps(tool if "function" in tool else {"type": "function", "function": tool}, ensure_ascii=False))
    return tuple(found)


def calls_of(value: Any, where: str, complaints: Complaints) -> list[tuple[str, Any, str]]:
    """(JSON of name and arguments, its id or None, its name) of the calls in a list or in a JSON text."""
    calls = _parsed(value, where, CALL, complaints)
    found = []
    for call in [calls] if isinstance(calls, dict) else calls if isinstance(calls, list) else ():
        if not isinstance(call, dict):
            complaints.not_a("a call of a tool", call, where, CALL)
            continue
        function = call.get("function", call)
        complaints.unknown_keys(call, where, {"id", "type", *(("name", "arguments") if function is call else ("function",))}, {})
        if isinstance(function, dict) and function is not call:
            complaints.unknown_keys(function, where, {"name", "arguments"}, {})
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or call.get("type") not in (None, "function"):
            complaints.say(where, "holds a call of a tool without its name", CALL)
            continue
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            arguments = _parsed(arguments, where, CALL, complaints)
        if isinstance(arguments, dict):
            found.append((json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False), call.get("id"), name))
        else:
            complaints.not_a("an object", arguments, where, CALL, "arguments")
    if not calls and calls is not None:
        complaints.say(where, "calls no tool", CALL)
    return found


def _parsed(value: Any, where: str, fix: str, complaints: Complaints) -> Any:
    """The value, or what its JSON text holds; None once it was complained about."""
    if isinstance(value, str):
        try:
            value = json.loads(value, object_pairs_hook=_once, parse_constant=_number)
        except (ValueError, RecursionError):
            complaints.say(where, "holds a call or a tool that is not JSON", fix)
            return None
    if not isinstance(value, dict | list):
        complaints.not_a("an object or a list", value, where, fix)
        return None
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of a key that stands twice Python's reader would lose the first without a word."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError
    return dict(pairs)


def _number(word: str) -> float:
    """NaN and the infinities are no JSON."""
    raise ValueError(word)
