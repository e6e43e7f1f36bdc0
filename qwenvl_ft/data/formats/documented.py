"""Reads a record of the documented meta-file, and finds everything that is wrong with it.

The newline after a picture's tag belongs to the tag.

    {"conversations": [{"from": "user", "value": "<img>two_col_103562.png</img>\\nHow many titles had Ferrari won?"},
                       {"from": "assistant", "value": "16"}]}
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

from qwenvl_ft.data.formats.json_entries import EXAMPLE, kind_of
from qwenvl_ft.data.records import CONTROL_TOKEN, Picture, Turn
from qwenvl_ft.errors import Problem, UserError

Find = Callable[[str, str], Picture]  # (file name, place of the tag) -> the picture; raises UserError
ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
OPEN, CLOSE = "<img>", "</img>"
# Tags that peers read, and <img> in another case: what a user meant as a picture would train as text. HTML's have attributes.
FOREIGN_TAG = re.compile(r"<(?:(?i:image|video|audio)|(?!img)(?i:img))>")
MISPLACED_KEYS = {
    "image": "name the picture inside the user's value: <img>file.png</img>",
    "images": "name the pictures inside the user's values: <img>file.png</img>",
    "videos": "videos are not trained on; name pictures inside the user's value: <img>file.png</img>",
    "system": 'write it as the first turn: {"from": "system", "value": "..."}',
}


def turns_of(entry: Any, where: str, find: Find, problems: list[Problem]) -> Iterator[Turn]:
    """The turns of one record as far as they can be read; what is wrong with it is added to `problems`."""

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
            what = f"is from the {role} where the {expected}'s turn was due"
            complain(place, what, "let user and assistant take turns, user first")
        answered |= (role or expected) == "assistant"
        if role != "system":
            expected = "user" if (role or expected) == "assistant" else "assistant"
        parts = tuple(_parts(turn["value"], role or "user", place, find, problems))
        if not turn["value"].strip() and role is not None:
            complain(place, f"the {role}'s turn is empty", "write its text or delete the turn and its partner")
        yield Turn(role or "user", parts)
    if not answered:
        complain(where, "has no assistant turn, so it teaches nothing", "add the answer that the model should learn")
    elif expected == "assistant":
        place = f"{where}.conversations[{len(talk) - 1}]"
        complain(place, "the last turn is the user's and nobody answers it", "add the answer or delete it")


def _parts(text: str, role: str, place: str, find: Find, problems: list[Problem]) -> Iterator[str | Picture]:
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
            yield find(name, place)
        except UserError as error:
            problems.extend(error.problems)
