"""An array or JSON lines, value by value in little memory. What JSON itself lets pass in silence is refused."""

import json
from codecs import getincrementaldecoder
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from qwenvl_ft.data.files.entry import Entry
from qwenvl_ft.data.formats.json_entries import DECODER, EXAMPLE, Refused, kind_of, parse
from qwenvl_ft.errors import Problem

CHUNK_BYTES = 1 << 20
LIST = f"write a JSON list of records: [{EXAMPLE}]"
WHITE = " \t\n\r"
NEAR = 16  # characters at the end of what is read so far, in which a fault may be no fault once more is read
NOT_UTF8 = ("is not UTF-8 text (GBK or UTF-16, perhaps)", "save the file as UTF-8")


def json_entries(file: Path, name: str) -> Iterator[Entry]:
    """Each value of an array as NAME[index], of JSON lines as NAME:line, with a Problem for a line that is none."""
    with file.open("rb") as opened:
        window = _Window(opened)
        try:
            first = window.skip()
            if not first:
                yield Entry("", Problem(name, "is empty", LIST))
            elif first == "[":
                yield from _array(window, name)
            elif first != "{":
                value = window.value()
                if window.skip():
                    raise window.fault("Extra data")
                yield Entry("", Problem(name, f"holds {kind_of(value)}, not a list", LIST))
        except ValueError as error:
            yield Entry("", window.problem(error, name))
            return
        if first == "{":
            opened.seek(0)
            yield from _lines(opened, name)


def _array(window: "_Window", name: str) -> Iterator[Entry]:
    window.at += 1
    index = 0
    if window.skip() == "]":
        yield Entry("", Problem(name, "holds no records", LIST))
    else:
        while True:
            yield Entry(f"{name}[{index}]", window.value())
            index += 1
            if (after := window.skip()) == "]":
                break
            if after != ",":
                raise window.fault("Expecting ',' delimiter")
            window.at += 1
            window.skip()
    window.at += 1
    if window.skip():
        raise window.fault("Extra data")


class _Window:
    """A part of a text that is read on, and what was read let go, as its values are taken."""

    def __init__(self, file: BinaryIO):
        self.file, self.text, self.at, self.ended = file, "", 0, False
        self.decoder = getincrementaldecoder("utf-8-sig")()
        self.line, self.column = 1, 1  # of the text's beginning
        self.bytes_before = b""  # of the line that is being decoded

    def more(self) -> bool:
        """Reads on, as much as there is already; false at the end."""
        if self.ended:
            return False
        self.forget()
        raw = self.file.read(max(CHUNK_BYTES, len(self.text)))
        self.ended = not raw
        self.text += self.decoder.decode(raw, final=self.ended)
        return True

    def forget(self) -> None:
        """Lets go of what was taken."""
        gone, self.text, self.at = self.text[: self.at], self.text[self.at :], 0
        self.line += gone.count("\n")
        self.column = len(gone) - gone.rfind("\n") if "\n" in gone else self.column + len(gone)

    def skip(self) -> str:
        """The next character that is not white, which it stands at then; nothing at the end."""
        while True:
            while self.at < len(self.text):
                if self.text[self.at] not in WHITE:
                    return self.text[self.at]
                self.at += 1
            if not self.more():
                return ""

    def value(self) -> Any:
        """The value that stands here. Raises ValueError."""
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self.text) - NEAR
                if cut and self.more():
                    continue
                raise
            except RecursionError:
                raise ValueError("nested too deeply") from None
            if end == len(self.text) and self.more():  # a number may go on
                continue
            self.at = end
            return value

    def fault(self, what: str) -> json.JSONDecodeError:
        return json.JSONDecodeError(what, self.text, self.at)

    def problem(self, error: ValueError, name: str) -> Problem:
        """What is wrong with the file, at its line and column."""
        if isinstance(error, UnicodeDecodeError):
            return not_utf8(self.file, name)
        if isinstance(error, json.JSONDecodeError):
            column = error.colno + (self.column - 1 if error.lineno == 1 else 0)
            where = f"{name}:{self.line + error.lineno - 1}:{column}"
            return Problem(where, f"is not JSON: {_said(error)}", "mend the file at this line and column")
        return _refused(error, name)


def not_utf8(file: BinaryIO, name: str) -> Problem:
    """Its place, which is found by reading the file once more."""
    file.seek(0)
    for number, line in enumerate(file, start=1):
        try:
            line.decode()
        except UnicodeDecodeError as error:
            return Problem(f"{name}:{number}:{error.start + 1}", *NOT_UTF8)
    return Problem(name, *NOT_UTF8)


def _lines(file: BinaryIO, name: str) -> Iterator[Entry]:
    """JSON lines: one record a line, blank lines allowed."""
    one: Entry | None = None  # the first, until it is known that it is not the only one
    for number, raw in enumerate(file, start=1):
        where = f"{name}:{number}"
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            yield from [one] if one and one.where else []
            yield Entry("", Problem(f"{where}:{error.start + 1}", *NOT_UTF8))
            return
        if not line.strip():
            continue
        try:
            value = parse(line)
        except ValueError as error:
            if one is None and (problem := _one_object(file, name)):
                yield Entry("", problem)
                return
            value = line_problem(error, where)
        if one is None:
            one = Entry(where, value)
            continue
        if one.where:
            yield one
            one = Entry("", None)
        yield Entry(where, value)
    if one and one.where:
        problem = None if isinstance(one.value, Problem) else _under_a_key(one.value, name)
        yield Entry("", problem) if problem else one


def _one_object(file: BinaryIO, name: str) -> Problem | None:
    """The one thing that is wrong with a file that holds one object over several lines."""
    here = file.tell()
    file.seek(0)
    try:
        value = parse(file.read().decode("utf-8-sig"))
    except ValueError:
        return None
    finally:
        file.seek(here)
    return _under_a_key(value, name) or Problem(name, "holds an object, not a list", "put [ before it and ] after it")


def _under_a_key(value: dict[str, Any], name: str) -> Problem | None:
    keys = [key for key, held in value.items() if isinstance(held, list) and held and is_record(held[0])]
    return Problem(name, f'its list of records is under "{keys[0]}"', "save that list alone as the file") if keys else None


def is_record(value: Any) -> bool:
    """Whether it looks like one."""
    return isinstance(value, dict) and bool({"conversations", "messages"} & value.keys())


def line_problem(error: ValueError, where: str) -> Problem:
    """What is wrong with a value that stands alone."""
    if isinstance(error, json.JSONDecodeError):
        return Problem(where, f"is not JSON: {_said(error)} at column {error.colno}", "mend this line, or write the record again")
    return _refused(error, where)


def _refused(error: ValueError, where: str) -> Problem:
    if isinstance(error, Refused):
        return Problem(where, *error.args)
    return Problem(where, f"is not a meta-file: {error}", LIST)


def _said(error: json.JSONDecodeError) -> str:
    return f"{error.msg[0].lower()}{error.msg[1:]}"
