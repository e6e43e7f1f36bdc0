"""Finds the pictures and videos that records name: each once, its header read, its name set right where that can be.

A name is resolved against one folder and must lie inside it.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from unicodedata import normalize
from urllib.parse import unquote

from qwenvl_ft.data.formats.documented import OPEN
from qwenvl_ft.data.formats.talk import Named, Options
from qwenvl_ft.data.pictures import size_of
from qwenvl_ft.data.reading import Reading
from qwenvl_ft.data.records import Picture, Video
from qwenvl_ft.errors import Problem, UserError

NUMBER, ZEROS = re.compile(r"\d+"), re.compile(r"(?<!\d)0+(?=\d)")
MOST_FOLDERS = 8  # of a name, the last of which may be what is meant
MAX_COMPARED = 200_000  # file names that missing ones are compared with, 50 µs each: a folder of them must not take hours
FOLDER_KEYS = "(train_data_dir, --data-dir)"  # what a config calls it, and the commands without one


class Media:
    """The pictures and videos of one folder, each file's header read once."""

    def __init__(self, folder: Path, reading: Reading):
        self.folder, self.reading = folder, reading
        self.root = folder.resolve()
        self.seen: dict[str, Picture] = {}
        self.one_is_there = False
        self.missing: dict[Problem, str] = {}  # of each its name
        self.misspelt: set[str] = set()  # of them those that are there in another spelling
        self.compared = 0

    @cached_property
    def files(self) -> list[tuple[str, list[str]]]:
        """(name, its numbers) of every file below the folder."""
        found = [os.path.relpath(os.path.join(top, file), self.root) for top, _, files in os.walk(self.root) for file in files]
        return [(name, NUMBER.findall(_plain(name))) for name in found]

    @cached_property
    def by_plain_name(self) -> dict[str, list[str]]:
        """The files by their plain names, with their folders and without."""
        found: dict[str, list[str]] = {}
        for name, _ in self.files:
            for plain in {_plain(name), _plain(name).rpartition("/")[2]}:
                found.setdefault(plain, []).append(name)
        return found

    def meant(self, name: str) -> str | None:
        """The one file whose plain name is that of `name`, or of `name` without its first folders."""
        parts = [part for part in _plain(name).split("/") if part not in ("", ".")][-MOST_FOLDERS:]
        found = (self.by_plain_name.get("/".join(parts[start:]), []) for start in range(len(parts)))
        return next((names[0] for names in found if len(names) == 1), None)

    def close_to(self, name: str) -> str | None:
        """A file with a name like it, never one with another number; of the first missing ones only, see MAX_COMPARED."""
        self.compared += len(self.files)
        if self.compared > MAX_COMPARED:
            return None
        numbers = NUMBER.findall(_plain(name))
        candidates = [file for file, of_file in self.files if not numbers or not of_file or of_file == numbers]
        return next(iter(get_close_matches(name, candidates, 1, cutoff=0.8)), None)

    def none_is_there(self, problems: list[Problem]) -> list[Problem]:
        """The problems, with one in place of each picture's where none was found: the folder is the wrong one.

        Not where most names stand there in another spelling: then the folder is right.
        """
        names = list(dict.fromkeys(self.missing.values()))
        if self.one_is_there or len(names) < 2 or 2 * len(self.misspelt) > len(names):
            return problems
        what = f"none of the {len(names):,} pictures is in this folder, {names[0][:120]} for one"
        fix = f"is it the right folder {FOLDER_KEYS}?"
        if (first := next(iter(self.missing))).fix.startswith("did you mean"):
            fix += f" For that one: {first.fix}"
        return [Problem(str(self.folder), what, fix), *(problem for problem in problems if problem not in self.missing)]

    def picture(self, name: Named, where: str) -> Picture:
        """Raises UserError where the name is no readable picture inside the folder."""
        if not isinstance(name, str):
            raise UserError(Problem(where, "lies inside another file", "unpack it, and name its file"))
        if name in self.seen:
            return self.seen[name]
        try:
            return self.seen.setdefault(name, self._open(name, where))
        except UserError as error:  # alike but for the name
            ours = (name[:120], name[:60], Path(name).name)
            raise UserError(
                *(replace(problem, kind=problem.kind or _without(problem, ours)) for problem in error.problems)
            ) from None

    def video(self, name: Named | Sequence[Named], where: str, options: Options) -> Video:
        """Raises UserError."""
        raise UserError(Problem(where, "names a video, and videos are not trained on", "leave the record out"))

    def _open(self, name: str, where: str) -> Picture:
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
            if meant := self.meant(name):
                self.misspelt.add(name)
            close = meant or self.close_to(name)
            fix = f"did you mean {close}?" if close else f"copy it there, or give the right folder {FOLDER_KEYS}"
            kind = "missing, with a name like it" if close else "missing"
            problem = Problem(where, f"{name[:120]} is not in {self.folder}", fix, kind)
            self.missing[problem] = name
            raise UserError(problem)
        self.one_is_there = True
        if not path.is_file():
            raise UserError(Problem(where, f"{name} is not a regular file", "name a picture file"))
        height, width = size_of(path, where)
        return Picture(path, height, width, num_bytes=path.stat().st_size)


def _plain(name: str) -> str:
    """A name without what differs between machines: case, %20, the form of accents, \\ for /, zeros before a number."""
    plain = normalize("NFC", unquote(name)).casefold().replace("\\", "/")
    return ZEROS.sub("", plain.removeprefix("./"))


def _without(problem: Problem, names: Sequence[str]) -> str:
    text = f"{problem.what}\n{problem.fix}"
    for name in names:
        text = text.replace(name, "") if name else text
    return NUMBER.sub("0", text)
