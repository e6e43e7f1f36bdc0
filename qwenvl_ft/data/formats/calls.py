"""Tools and the calls of tools, as every form writes them, made into JSON texts of one form."""

import json
from typing import Any

from qwenvl_ft.data.formats.json_entries import parse
from qwenvl_ft.data.formats.keys import Complaints, is_empty
from qwenvl_ft.data.tools import CALL, FUNCTION, function_of
from qwenvl_ft.errors import UserError


def tools_of(value: Any, where: str, complaints: Complaints) -> tuple[str, ...]:
    """The tools of a record, given as a list or as its JSON text: each wrapped as `function_of` does it."""
    if is_empty(value):
        return ()
    tools = _parsed(value, where, FUNCTION, complaints)
    found = []
    for number, tool in enumerate([tools] if isinstance(tools, dict) else tools or ()):
        place = f"{where}[{number}]"
        if (tool := _parsed(tool, place, FUNCTION, complaints)) is None:
            continue
        try:
            found.append(json.dumps(function_of(json.dumps(tool)), ensure_ascii=False))
        except UserError as error:
            for problem in error.problems:
                complaints.say(place, problem.what, problem.fix, problem.kind)
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
            value = parse(value)
        except ValueError:
            complaints.say(where, "holds a call or a tool that is not JSON", fix)
            return None
    if not isinstance(value, dict | list):
        complaints.not_a("an object or a list", value, where, fix)
        return None
    return value
