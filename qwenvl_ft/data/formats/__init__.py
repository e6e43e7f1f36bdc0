"""Reads an entry of a meta-file in whatever form of the field it is written; the same content gives the same record.

    documented         conversations of from and value, media in tags: <img>a.png</img>
    v1                 the same as the first Qwen-VL has it: Picture 1: <img>a.png</img>, <ref>, <box>
    llava              conversations with `image` or `video` beside them, <image> in the text; QwenLM's and 2U1's, too
    sharegpt           conversations with `images`, `videos`, `system`, `tools` beside them: LLaMA-Factory's
    messages           messages of role and content, media beside them: ms-swift's, LLaMA-Factory's
    openai             messages whose contents are parts: OpenAI's, TRL's, Qwen's
    prompt_completion  TRL's, texts or messages, of which the completion is taught
    query_response     ms-swift's `query`, `response`, `history`
    alpaca             `instruction`, `input`, `output`, `history`
    pairs              the Cauldron's `texts` of user and assistant, ms-swift's `conversation` of human and assistant
    columns            the row of a table: a picture, a question, an answer, under the names that these have in the field

A form is a small reader that makes a Talk of an entry; `assemble` makes the record of it and says everything that is wrong.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from qwenvl_ft.data.formats.assemble import assemble
from qwenvl_ft.data.formats.json_entries import EXAMPLE, kind_of
from qwenvl_ft.data.formats.keys import FIXES, Complaints, is_empty
from qwenvl_ft.data.formats.lists import are_in_parts, read_list
from qwenvl_ft.data.formats.rows import ANSWER, PICTURE, QUESTION, VIDEO, is_pairs, read_pairs, read_row
from qwenvl_ft.data.formats.talk import Finder, Talk
from qwenvl_ft.data.formats.turns import TURN_KEYS
from qwenvl_ft.data.reading import AS_FOUND, Reading
from qwenvl_ft.data.records import Record
from qwenvl_ft.errors import Problem

Read = Callable[[dict[str, Any], str, Complaints], Talk]


class Form(NamedTuple):
    """A reader, and the keys without which an entry is not of this form."""

    read: Read
    needs: tuple[str, ...]


FORMS: Mapping[str, Form] = {
    **dict.fromkeys(("documented", "v1", "llava", "sharegpt"), Form(read_list, ("conversations",))),
    **dict.fromkeys(("messages", "openai"), Form(read_list, ("messages",))),
    "prompt_completion": Form(read_row, ("prompt", "completion")),
    "query_response": Form(read_row, ("query", "response")),
    "alpaca": Form(read_row, ("instruction", "output")),
    "pairs": Form(read_pairs, ()),
    "columns": Form(read_row, ()),
}
MEDIA = frozenset((*PICTURE, *VIDEO))
TALKS = ("conversations", "messages", "prompt", "completion")  # keys that may hold a list of turns
FORCED_FIX = "delete the setting format, which names that form, or name the right one"


def form_of(entry: Any, reading: Reading = AS_FOUND) -> str:
    """The name of the form of an entry, told from what it holds; nothing for what is of no form."""
    if not isinstance(entry, dict):
        return ""
    if reading.format:
        return reading.format
    entry = _named(entry, reading.columns)
    if "conversations" in entry:
        if not is_empty(entry.get("image")) or not is_empty(entry.get("video")):
            return "llava"
        if not all(is_empty(entry.get(key)) for key in ("images", "videos", "tools", "system", "objects")):
            return "sharegpt"
        return "v1" if _is_v1(entry["conversations"]) else "documented"
    if "messages" in entry:
        return "openai" if are_in_parts(entry["messages"]) else "messages"
    for name in ("prompt_completion", "query_response", "alpaca"):
        if all(key in entry for key in FORMS[name].needs):
            return name
    if is_pairs(entry.get("texts")) or is_pairs(entry.get("conversation")):
        return "pairs"
    return "columns" if any(key in entry for key in (*QUESTION, *ANSWER)) else ""


def read_entry(entry: Any, where: str, media: Finder, problems: list[Problem], reading: Reading = AS_FOUND) -> Record | None:
    """The record of an entry; None where it has a problem, all of which are added to `problems`."""
    if not isinstance(entry, dict):
        problems.append(Problem(where, f"is {kind_of(entry)}, not an object", f"write {EXAMPLE}"))
        return None
    name = form_of(entry, reading)
    complaints = Complaints(problems)
    if reading.columns:
        complaints.left_out = [key for key, column in reading.columns.items() if column is None]
        for key, column in reading.columns.items():
            if column is not None and key not in TURN_KEYS and column not in entry:
                complaints.say(
                    where, f'has no key "{column}", which columns names as its {key}', "mend columns", kind=f"columns {key}"
                )
        entry = _named(entry, reading.columns)
    if not name:
        _say_no_form(entry, where, complaints)
        return None
    if lacking := _lacks(name, entry):
        complaints.say(where, f"is not of the form {name}: it has no {lacking}", FORCED_FIX)
        return None
    before = len(problems)
    talk = FORMS[name].read(entry, where, complaints)
    record = assemble(talk, where, media, complaints, reading.boxes)
    return record if len(problems) == before else None


def names_no_medium(entry: Any, empty: Sequence[str], reading: Reading = AS_FOUND) -> bool:
    """Whether an entry has a place for a picture or a video and nothing in it; `empty` are its columns without a value."""
    whole = _named(dict.fromkeys(empty) | entry, reading.columns)
    return any(key in MEDIA and is_empty(value) for key, value in whole.items())


def unpacked(where: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The entries of a value of a meta-file: QwenLM's packed data has lists of them, each of which is a record of its own here."""
    if isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
        yield from ((f"{where}[{number}]", entry) for number, entry in enumerate(value))
    else:
        yield where, value


def _named(entry: dict[str, Any], columns: Mapping[str, str | None]) -> dict[str, Any]:
    """The entry, and its turns, with our names for the keys that `columns` names, and without those that are to be left out."""
    if not columns:
        return entry
    of_turns = {key: column for key, column in columns.items() if key in TURN_KEYS}
    entry = _renamed(entry, {key: column for key, column in columns.items() if key not in TURN_KEYS})
    lists = [key for key in TALKS if of_turns and isinstance(entry.get(key), list)]
    return entry | {key: [_renamed(turn, of_turns) if isinstance(turn, dict) else turn for turn in entry[key]] for key in lists}


def _renamed(entry: dict[str, Any], columns: Mapping[str, str | None]) -> dict[str, Any]:
    ours = {column: key for key, column in columns.items() if column is not None}
    return {ours.get(key, key): value for key, value in entry.items() if key in ours or key not in columns}


def _is_v1(talk: Any) -> bool:
    first = talk[0] if isinstance(talk, list) and talk else None
    text = first.get("value") if isinstance(first, dict) else None
    return isinstance(text, str) and ("Picture 1: <img>" in text or "<ref>" in text or "<box>" in text)


def _lacks(name: str, entry: dict[str, Any]) -> str:
    """What an entry would need to be of this form, if it is not there."""
    if name == "pairs":
        return "" if is_pairs(entry.get("texts")) or is_pairs(entry.get("conversation")) else "list of pairs"
    if name == "columns":
        return "" if any(key in entry for key in (*QUESTION, *ANSWER)) else "question and no answer"
    return next((f'key "{key}"' for key in FORMS[name].needs if key not in entry), "")


def _say_no_form(entry: dict[str, Any], where: str, complaints: Complaints) -> None:
    """Names the key that was misspelt, or all that are there."""
    plain = {str(key).strip().lower(): str(key) for key in entry}
    for key in ("conversations", "messages", "question", "answer"):
        if key in plain:
            return complaints.say(where, f'has a key "{plain[key][:60]}", which is not read', f'write it as "{key}"')
    fix = f"write {EXAMPLE}"
    if not entry:
        return complaints.say(where, 'has no key "conversations"', fix)
    keys = ", ".join(sorted(str(key)[:40] for key in entry)[:8])
    known = next((FIXES[key] for key in FIXES if key in entry), "")
    fix = known or f"{fix}, or say which column is which: columns: {{question: COLUMN, answer: COLUMN}}"
    return complaints.say(where, f"holds no talk that is read: its keys are {keys}", fix)
