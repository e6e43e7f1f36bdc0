"""The meta-file as JSON values, each with its place: an array, or JSON lines. What JSON itself lets pass in silence is refused."""

import json
from pathlib import Path
from typing import Any

from qwenvl_ft.data.magic import HEAD_BYTES, what_it_is
from qwenvl_ft.errors import Problem

EXAMPLE = '{"conversations": [{"from": "user", "value": "..."}, {"from": "assistant", "value": "..."}]}'


def entries_of(meta_file: Path) -> tuple[list[tuple[str, Any]], list[Problem]]:
    """(where, JSON value) of each record of an array or of JSON lines, a Problem for a line that is none; and those of the file."""
    name = meta_file.name
    try:
        with meta_file.open("rb") as file:
            raw = file.read(HEAD_BYTES)
            kind = what_it_is(raw)
            if kind and kind.as_meta:
                return [], [Problem(name, f"is {kind.what}", kind.as_meta)]
            raw += file.read()
    except OSError:
        fix = "give the JSON file of conversations (a config's train_meta_file)"
        return [], [Problem(str(meta_file), "cannot be read as a file", fix)]
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, column = raw.count(b"\n", 0, error.start) + 1, error.start - raw.rfind(b"\n", 0, error.start)
        return [], [Problem(f"{name}:{line}:{column}", "is not UTF-8 text (GBK or UTF-16, perhaps)", "save the file as UTF-8")]
    if not text.strip():
        return [], [Problem(name, "is empty", f"write a JSON list of records: [{EXAMPLE}]")]
    if text.lstrip().startswith("{"):
        return _lines(text, name)
    try:
        value = _parse(text)
    except ValueError as error:
        return [], [_not_json(error, name)]
    if not isinstance(value, list):
        return [], [Problem(name, f"holds {kind_of(value)}, not a list", f"write a JSON list of records: [{EXAMPLE}]")]
    if not value:
        return [], [Problem(name, "holds no records", f"write a JSON list of records: [{EXAMPLE}]")]
    return [(f"{name}[{index}]", entry) for index, entry in enumerate(value)], []


def _lines(text: str, name: str) -> tuple[list[tuple[str, Any]], list[Problem]]:
    """JSON lines: one record a line, blank lines allowed."""
    entries: list[tuple[str, Any]] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entries.append((f"{name}:{number}", _parse(line)))
        except ValueError as error:
            entries.append((f"{name}:{number}", _not_json(error, name, number)))
    if (broken := any(isinstance(entry, Problem) for _, entry in entries)) or len(entries) == 1:
        try:  # one object over several lines is not JSON lines: say the one thing that is wrong
            value = _parse(text)
            for key in [key for key, held in value.items() if isinstance(held, list) and held and _is_record(held[0])]:
                return [], [Problem(name, f'its list of records is under "{key}"', "save that list alone as the file")]
            if broken:
                return [], [Problem(name, "holds an object, not a list", "put [ before it and ] after it")]
        except ValueError:
            pass
    return entries, []


def _is_record(value: Any) -> bool:
    return isinstance(value, dict) and "conversations" in value


class _Refused(ValueError):
    """What Python's reader lets pass, with its fix: of a key that stands twice it would lose the first without a word."""


def _parse(text: str) -> Any:
    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        entry = dict(items)
        if len(entry) < len(items):
            keys = [key for key, _ in items]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise _Refused(f'an object has the key "{twice}" twice', "keep one of them, or make two records")
        return entry

    def constant(word: str) -> Any:
        raise _Refused(f"holds {word}, which is not JSON", "write a number or a text")

    try:
        return json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _not_json(error: ValueError, name: str, line: int | None = None) -> Problem:
    """`line` is the number of the line that was parsed alone, where there are JSON lines."""
    if isinstance(error, json.JSONDecodeError):
        what = f"is not JSON: {error.msg[0].lower()}{error.msg[1:]}"
        if line:
            return Problem(f"{name}:{line}", f"{what} at column {error.colno}", "mend this line, or write the record again")
        return Problem(f"{name}:{error.lineno}:{error.colno}", what, "mend the file at this line and column")
    where = f"{name}:{line}" if line else name
    if isinstance(error, _Refused):
        return Problem(where, *error.args)
    return Problem(where, f"is not a meta-file: {error}", f"write a JSON list of records: [{EXAMPLE}]")


def kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")
