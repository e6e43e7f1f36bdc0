"""A table as text: CSV, TSV and their kin, with the names of the columns in the first row."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwenvl_ft.data.files.entry import Entry
from qwenvl_ft.data.files.json_text import not_utf8
from qwenvl_ft.data.formats.json_entries import parse
from qwenvl_ft.errors import Problem

DELIMITERS = ",\t;|"
MOST_LETTERS = 16 << 20  # of a cell: a quote that is not closed makes one cell of the rest of the file
NESTED = ("conversations", "messages", "images", "videos", "history", "objects")  # columns whose cells may hold JSON
QUOTE = "quote a cell that holds the delimiter, a quote or a newline, and double the quotes in it"


def csv_entries(file: Path, name: str) -> Iterator[Entry]:
    """Each row as NAME:line, where it begins; an empty cell is as if it were not there."""
    with file.open("rb") as opened:
        text = io.TextIOWrapper(opened, encoding="utf-8-sig", newline="")
        before = csv.field_size_limit(MOST_LETTERS)
        rows = None
        try:
            first = text.readline(MOST_LETTERS)
            text.seek(0)
            rows = csv.reader(text, delimiter=_delimiter(first), strict=True)
            header = [column.strip() for column in next(rows, [])]
            if problem := _of_header(header, name):
                yield Entry("", problem)
                return
            begins, held = rows.line_num + 1, False
            for cells in rows:
                if cells:
                    held = True
                    empty = [column for column, cell in zip(header, cells, strict=False) if not cell.strip()]
                    yield Entry(f"{name}:{begins}", _entry(header, cells, f"{name}:{begins}"), empty=empty)
                begins = rows.line_num + 1
            if not held:
                yield Entry("", Problem(name, "holds no rows below its header", "write a record a row"))
        except UnicodeDecodeError:
            yield Entry("", not_utf8(opened, name))
        except csv.Error as error:
            line = rows.line_num if rows else 1
            yield Entry("", Problem(f"{name}:{line}", f"is not CSV: {error}", QUOTE))
        finally:
            csv.field_size_limit(before)


def _delimiter(header: str) -> str:
    """The one that makes most columns of the header."""
    return max(DELIMITERS, key=lambda mark: len(next(csv.reader([header], delimiter=mark), [])))


def _of_header(header: list[str], name: str) -> Problem | None:
    if not header:
        return Problem(name, "is empty", "write a row of column names, and a record a row below it")
    if twice := [column for column in header if header.count(column) > 1]:
        return Problem(f"{name}:1", f'has two columns "{twice[0]}"', "give every column its own name in the first row")
    return None


def _entry(header: list[str], cells: list[str], where: str) -> Any:
    if len(cells) != len(header):
        return Problem(where, f"has {len(cells)} cells, and the first row {len(header)}", QUOTE)
    return nested({column: cell for column, cell in zip(header, cells, strict=True) if cell.strip()}, where)


def nested(entry: dict[str, Any], where: str) -> Any:
    """The row with the JSON that its cells hold; a Problem for what is not quite JSON."""
    for column in NESTED:
        cell = entry.get(column)
        if isinstance(cell, str) and cell.lstrip()[:1] in ("[", "{"):
            try:
                entry[column] = parse(cell)
            except json.JSONDecodeError:  # text after all, such as a file name in brackets
                continue
            except ValueError as error:
                return Problem(f"{where}.{column}", str(error.args[0]), "mend the JSON in this cell")
    return entry
