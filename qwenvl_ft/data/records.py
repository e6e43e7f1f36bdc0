"""Reads the documented meta-file into records, and finds everything that is wrong with it in one run.

A record with a problem is left out of what is returned, never mended in silence; its problem says where it stands.
The newline after a picture's tag belongs to the tag.

    [{"conversations": [{"from": "user", "value": "<img>two_col_103562.png</img>\\nHow many titles had Ferrari won?"},
                        {"from": "assistant", "value": "16"}]}]
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from qwenvl_ft.data.formats.json_entries import EXAMPLE, entries_of, kind_of
from qwenvl_ft.data.pictures import size_of
from qwenvl_ft.errors import Problem, UserError

ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
OPEN, CLOSE = "<img>", "</img>"
RECORD = re.compile(r"(\[\d+\]|:\d+)(?:\.conversations.*)?$")  # how a place inside a record ends, after the file's name
# Boxes and references (<|box_start|> ...) are left alone: they are part of what Qwen2-VL reads and says.
CONTROL_TOKEN = re.compile(r"<\|(?:endoftext|im_start|im_end|vision_start|vision_end|vision_pad|image_pad|video_pad)\|>")
# Tags that peers read, and <img> in another case: what a user meant as a picture would train as text. HTML's have attributes.
FOREIGN_TAG = re.compile(r"<(?:(?i:image|video|audio)|(?!img)(?i:img))>")
MAX_COMPARED = 200_000  # file names that missing ones are compared with, 50 µs each: a folder of them must not take hours
FOLDER_KEYS = "(train_data_dir, --data-dir)"  # what a config calls it, and the commands without one
MISPLACED_KEYS = {
    "image": "name the picture inside the user's value: <img>file.png</img>",
    "images": "name the pictures inside the user's values: <img>file.png</img>",
    "videos": "videos are not trained on; name pictures inside the user's value: <img>file.png</img>",
    "system": 'write it as the first turn: {"from": "system", "value": "..."}',
}


@dataclass(frozen=True)
class Media:
    """A picture: its file and its size in px as it will be seen, EXIF orientation applied."""

    path: Path
    height: int
    width: int
    kind: ClassVar[str] = "image"


@dataclass(frozen=True)
class Turn:
    """`role` is system, user or assistant; `parts` are texts and pictures in their order."""

    role: str
    parts: tuple[str | Media, ...]


@dataclass(frozen=True)
class Record:
    """One conversation; `where` is its place in the meta-file, such as train.json[3]."""

    where: str
    turns: tuple[Turn, ...]

    @property
    def pictures(self) -> list[Media]:
        """Every picture of the conversation in its order."""
        return [part for turn in self.turns for part in turn.parts if isinstance(part, Media)]


def read_meta(
    meta_file: Path, data_dir: Path, on_record: Callable[[int, int], None] = lambda done, total: None
) -> tuple[list[Record], list[Problem]]:
    """The good records in file order, and every problem of the others. `on_record(done, total)` is called after each.

    Pictures are resolved against `data_dir` and must lie inside it; only their headers are read.
    """
    entries, problems = entries_of(meta_file)
    pictures = _Pictures(data_dir)
    if not data_dir.is_dir():
        problems = [*problems, Problem(str(data_dir), "is not a folder", f"give the folder of the pictures {FOLDER_KEYS}")]
        entries = []
    records = []
    for done, (where, entry) in enumerate(entries, start=1):
        found: list[Problem] = []
        turns = tuple(_turns(entry, where, pictures, found))
        problems.extend(found)
        if not found:
            records.append(Record(where, turns))
        on_record(done, len(entries))
    return records, pictures.none_is_there(problems)


def _turns(entry: Any, where: str, pictures: "_Pictures", problems: list[Problem]) -> Iterator[Turn]:
    def complain(place: str, what: str, fix: str) -> None:
        problems.append(Problem(place, what, fix))

    if not isinstance(entry, dict):
        return complain(where, f"is {kind_of(entry)}, not an object", f"write {EXAMPLE}")
    for key in [key for key in MISPLACED_KEYS if key in entry]:
        complain(where, f'has a key "{key}", which is not read', MISPLACED_KEYS[key])
    if "conversations" not in entry:
        return complain(where, 'has no key "conversations"', f"write {EXAMPLE}")
    talk = entry["conversations"]
    if not isinstance(talk, list) or not talk:
        what = "is empty" if talk == [] else f"is {kind_of(talk)}, not a list"
        return complain(f"{where}.conversations", what, "list its turns, each with from and value")

    expected = "user"
    answered = False
    for number, turn in enumerate(talk):
        place = f"{where}.conversations[{number}]"
        if not isinstance(turn, dict):
            complain(place, f"is {kind_of(turn)}, not an object", 'write {"from": "user", "value": "..."}')
            continue
        missing = [key for key in ("from", "value") if not isinstance(turn.get(key), str)]
        for key in missing:
            what = f'its "{key}" is {kind_of(turn[key])}, not a text' if key in turn else f'has no key "{key}"'
            complain(place, what, 'write {"from": "user", "value": "..."}')
        if missing:
            answered |= expected == "assistant"
            expected = {"user": "assistant", "assistant": "user"}[expected]
            continue
        role = ROLES.get(turn["from"])
        if role is None:
            complain(place, f'is from "{turn["from"]}"', "write from: user or assistant (human, gpt and system are understood)")
        elif role == "system" and number > 0:
            complain(place, "a system turn stands after the first place", "move it to the front or delete it")
            continue
        elif role not in ("system", expected):
            complain(
                place, f"is from the {role} where the {expected}'s turn was due", "let user and assistant take turns, user first"
            )
        answered |= (role or expected) == "assistant"
        if role != "system":
            expected = "user" if (role or expected) == "assistant" else "assistant"
        parts = tuple(_parts(turn["value"], role or "user", place, pictures, problems))
        if not turn["value"].strip() and role is not None:
            complain(place, f"the {role}'s turn is empty", "write its text or delete the turn and its partner")
        yield Turn(role or "user", parts)
    if not answered:
        complain(where, "has no assistant turn, so it teaches nothing", "add the answer that the model should learn")
    elif expected == "assistant":
        complain(
            f"{where}.conversations[{len(talk) - 1}]",
            "the last turn is the user's and nobody answers it",
            "add the answer or delete it",
        )


def _parts(text: str, role: str, place: str, pictures: "_Pictures", problems: list[Problem]) -> Iterator[str | Media]:
    """Texts and pictures of one value. A scanner of linear time: the obvious regular expression is quadratic in unclosed tags."""

    def complain(what: str, fix: str) -> None:
        problems.append(Problem(place, what, fix))

    if match := CONTROL_TOKEN.search(text):
        complain(f"holds the control token {match[0]}", "take it out: it would end the turn or pose as a picture")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        complain("holds half of a surrogate pair, which no tokenizer can read", "write the character itself, in UTF-8")
    if role != "user":
        if OPEN in text or CLOSE in text:
            complain(f"an <img> tag stands in the {role}'s turn", "name pictures in the user's turns only")
        if text.strip():
            yield text
        return
    if match := FOREIGN_TAG.search(text):
        complain(f"holds {match[0]}, which is no tag here: it would be read as text", "write <img>file.png</img>")
    at = 0
    while at < len(text):
        start = text.find(OPEN, at)
        said = text[at:] if start < 0 else text[at:start]
        if CLOSE in said:
            complain("an </img> has no <img> before it", "write <img>file.png</img>")
        if said:
            yield said
        if start < 0:
            return
        end = text.find(CLOSE, start)
        if end < 0:
            return complain("an <img> tag is not closed", "write <img>file.png</img>")
        name = text[start + len(OPEN) : end].strip()
        at = end + len(CLOSE)
        if text.startswith("\r\n", at):
            at += 2
        elif text.startswith("\n", at):
            at += 1
        try:
            yield pictures.find(name, place)
        except UserError as error:
            problems.extend(error.problems)


def num_records(meta_file: Path, records: Sequence[Record], problems: Sequence[Problem]) -> int:
    """How many records the file holds: the good ones, and those that problems stand in. A problem of the whole file is in none."""
    places = [*(record.where for record in records), *(problem.where for problem in problems)]
    if not all(place.startswith(meta_file.name) for place in places):  # of the folder: many records may share that problem
        places += [where for where, _ in entries_of(meta_file)[0]]
    ends = (RECORD.match(place.removeprefix(meta_file.name)) for place in places)
    return len({end[1] for end in ends if end})


class _Pictures:
    """The pictures of one folder, each file's header read once."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.root = folder.resolve()
        self.seen: dict[str, Media] = {}
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

    def find(self, name: str, where: str) -> Media:
        """Raises UserError where the name is no readable picture inside the folder."""
        if name not in self.seen:
            self.seen[name] = self._open(name, where)
        return self.seen[name]

    def _open(self, name: str, where: str) -> Media:
        if not name:
            raise UserError(Problem(where, "an <img> tag is empty", "write <img>file.png</img>"))
        if OPEN in name:
            raise UserError(Problem(where, "an <img> tag stands inside another", "close the first one: <img>file.png</img>"))
        if "://" in name or name.startswith("data:"):
            raise UserError(
                Problem(where, f"{name[:60]} is not a file name", f"download the picture to {self.folder} and name its file")
            )
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
            problem = Problem(where, f"{name[:120]!s} is not in {self.folder}", fix)
            self.missing[problem] = name
            raise UserError(problem)
        self.one_is_there = True
        if not path.is_file():
            raise UserError(Problem(where, f"{name} is not a regular file", "name a picture file"))
        height, width = size_of(path, where)
        return Media(path, height, width)
