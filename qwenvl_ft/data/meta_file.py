"""Reads a meta-file and the headers of its pictures, and finds everything that is wrong with them in one run.

A record with a problem is left out of what is returned, never mended in silence; its problem says where it stands.
"""

import os
from collections.abc import Callable
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from qwenvl_ft.data.formats.documented import OPEN, turns_of
from qwenvl_ft.data.formats.json_entries import entries_of
from qwenvl_ft.data.pictures import size_of
from qwenvl_ft.data.records import Picture, Record
from qwenvl_ft.errors import Problem, UserError

MAX_COMPARED = 200_000  # file names that missing ones are compared with, 50 µs each: a folder of them must not take hours
FOLDER_KEYS = "(train_data_dir, --data-dir)"  # what a config calls it, and the commands without one
OnRecord = Callable[[int, int], None]


class MetaFile(NamedTuple):
    """The good records in file order, every problem of the others, and how many records the file holds in all."""

    records: list[Record]
    problems: list[Problem]
    num_records: int


def read_records(
    meta_file: Path | str, data_dir: Path | str, on_record: OnRecord = lambda done, total: None, most: int | None = None
) -> MetaFile:
    """Reads all records, or until `most` are good. `on_record(done, total)` is called after each.

    Pictures are resolved against `data_dir` and must lie inside it; only their headers are read.
    """
    meta_file, data_dir = Path(meta_file), Path(data_dir)
    entries, problems = entries_of(meta_file)
    if not data_dir.is_dir():
        problems = [*problems, *(entry for _, entry in entries if isinstance(entry, Problem))]
        problems.append(Problem(str(data_dir), "is not a folder", f"give the folder of the pictures {FOLDER_KEYS}"))
        return MetaFile([], problems, len(entries))
    pictures = _PictureFolder(data_dir)
    records: list[Record] = []
    for done, (where, entry) in enumerate(entries, start=1):
        if isinstance(entry, Problem):
            problems.append(entry)
        else:
            found: list[Problem] = []
            turns = tuple(turns_of(entry, where, pictures.find, found))
            problems.extend(found)
            if not found:
                records.append(Record(where, turns))
        on_record(done, len(entries))
        if len(records) == most:
            break
    return MetaFile(records, pictures.none_is_there(problems), len(entries))


class _PictureFolder:
    """The pictures of one folder, each file's header read once."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.root = folder.resolve()
        self.seen: dict[str, Picture] = {}
        self.one_is_there = False
        self.missing: dict[Problem, str] = {}  # of each its name
        self.compared = 0

    @cached_property
    def names(self) -> list[str]:
        return [os.path.relpath(os.path.join(top, file), self.root) for top, _, files in os.walk(self.root) for file in files]

    def close_to(self, name: str) -> list[str]:
        """The file that was meant, perhaps; of the first missing ones only, see MAX_COMPARED."""
        self.compared += len(self.names)
        return get_close_matches(name, self.names, 1, cutoff=0.8) if self.compared <= MAX_COMPARED else []

    def none_is_there(self, problems: list[Problem]) -> list[Problem]:
        """The problems, with one in place of each picture's where none was found: the folder is the wrong one."""
        names = list(dict.fromkeys(self.missing.values()))
        if self.one_is_there or len(names) < 2:
            return problems
        what = f"none of the {len(names):,} pictures is in this folder, {names[0][:120]} for one"
        fix = f"is it the right folder {FOLDER_KEYS}?"
        if (first := next(iter(self.missing))).fix.startswith("did you mean"):
            fix += f" For that one: {first.fix}"
        return [Problem(str(self.folder), what, fix), *(problem for problem in problems if problem not in self.missing)]

    def find(self, name: str, where: str) -> Picture:
        """Raises UserError where the name is no readable picture inside the folder."""
        if name in self.seen:
            return self.seen[name]
        if not name:
            raise UserError(Problem(where, "an <img> tag is empty", "write <img>file.png</img>"))
        if OPEN in name:
            raise UserError(Problem(where, "an <img> tag stands inside another", "close the first one: <img>file.png</img>"))
        if "://" in name or name.startswith("data:"):
            fix = f"download the picture to {self.folder} and name its file"
            raise UserError(Problem(where, f"{name[:60]} is not a file name", fix))
        try:
            path = (self.root / name).resolve()
            inside = path.is_relative_to(self.root)
            there = inside and path.exists()
        except (OSError, ValueError, RuntimeError):  # a NUL, a name too long, a loop of links
            inside, there = True, False
        if not inside:
            raise UserError(Problem(where, f"{name} lies outside {self.folder}", "copy it into that folder"))
        if not there:
            close = self.close_to(name)
            fix = f"did you mean {close[0]}?" if close else f"copy it there, or give the right folder {FOLDER_KEYS}"
            problem = Problem(where, f"{name[:120]} is not in {self.folder}", fix)
            self.missing[problem] = name
            raise UserError(problem)
        self.one_is_there = True
        if not path.is_file():
            raise UserError(Problem(where, f"{name} is not a regular file", "name a picture file"))
        height, width = size_of(path, where)
        return self.seen.setdefault(name, Picture(path, height, width, num_bytes=path.stat().st_size))
