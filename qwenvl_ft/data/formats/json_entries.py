"""The meta-file as JSON values, each with its place: an array, or JSON lines. What JSON itself lets pass in silence is refused."""

import json
from pathlib import Path
from typing import Any

from qwenvl_ft.errors import Problem

EXAMPLE = '{"conversations": [{"from": "user", "value": "..."}, {"from": "assistant", "value": "..."}]}'
HEAD_BYTES = 1024
UNPACK, TABLE = "unpack it, and give the JSON file of conversations", "write its records as JSON lines: {}"
WITH_DATASETS = "datasets.Dataset.from_parquet(FILE).to_json(OUT), where its rows have conversations"
# How files begin that are given in place of a meta-file: what each is, and the way to one.
BEGINNINGS = (
    (b"PAR1", "a parquet file", TABLE.format(WITH_DATASETS)),
    (b"ARROW1", "an Arrow file", TABLE.format(WITH_DATASETS.replace("parquet", "file"))),
    (b"\xff\xff\xff\xff", "an Arrow stream", TABLE.format(WITH_DATASETS.replace("parquet", "file"))),
    (b"FEA1", "a Feather file", TABLE.format("pandas.read_feather(FILE).to_json(OUT, orient='records', lines=True)")),
    (b"\x89HDF", "an HDF5 file", TABLE.format("with h5py")),
    (b"SQLite format 3", "an SQLite database", TABLE.format("with sqlite3")),
    (b"PK\x03\x04", "a zip archive, or a file that is one, such as .xlsx", UNPACK), (b"\x1f\x8b", "a gzip file", UNPACK),
    (b"BZh", "a bzip2 file", UNPACK), (b"\xfd7zXZ", "an xz file", UNPACK), (b"\x28\xb5\x2f\xfd", "a zstd file", UNPACK),
    (b"7z\xbc\xaf", "a 7z archive", UNPACK), (b"Rar!", "a rar archive", UNPACK),
    *((magic, "a picture", f"give the file that names it: {EXAMPLE}") for magic in (
        b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP")),
    (b"%PDF", "a PDF", f"give the file of conversations: {EXAMPLE}"),
    *((b"\x80" + bytes([number]), "a pickle, which is never opened here: it may run any program",
       "write its records as JSON, where it was made") for number in range(2, 6)),
    (b"version https://git-lfs", "a git-lfs pointer: the file itself is not here", "run `git lfs pull` where it was cloned"),
    *((magic, "an HTML page: a download went wrong, perhaps", "bring the file itself") for magic in (b"<!doctype html", b"<html")),
    *((mark, "UTF-16 or UTF-32 text", "save the file as UTF-8") for mark in (b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")),
)  # fmt: skip


def _known_file(head: bytes) -> tuple[str, str] | None:
    """(what, fix) of a file that is of a known kind and no meta-file."""
    start = head.lstrip()[:64].lower()
    for magic, what, fix in BEGINNINGS:
        if head.startswith(magic) or (magic.startswith((b"<", b"version")) and start.startswith(magic)):
            return f"is {what}", fix
    if head[257:262] == b"ustar":
        return "is a tar archive", UNPACK
    if head[4:8] == b"ftyp":
        return "is a video, or a picture of a phone's (HEIC)", f"give the file that names it: {EXAMPLE}"
    return None


def entries_of(meta_file: Path) -> tuple[list[tuple[str, Any]], list[Problem]]:
    """(where, JSON value) of each record of an array or of JSON lines, a Problem for a line that is none; and those of the file."""
    name = meta_file.name
    try:
        with meta_file.open("rb") as file:
            raw = file.read(HEAD_BYTES)
            raw += b"" if _known_file(raw) else file.read()  # not all of a large file of another kind
    except OSError:
        fix = "give the JSON file of conversations (a config's train_meta_file)"
        return [], [Problem(str(meta_file), "cannot be read as a file", fix)]
    if found := _known_file(raw):
        return [], [Problem(name, *found)]
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
