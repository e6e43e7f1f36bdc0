"""Reads a record of the documented meta-file, and finds everything that is wrong with it.

The newline after a picture's tag belongs to the tag. An answer with "loss": false is shown and not taught; its "reasoning" stands
before it between <think> and </think>. Any other key is a problem: nothing of a record is dropped without a word.

    {"conversations": [{"from": "user", "value": "<img>two_col_103562.png</img>\\nHow many titles had Ferrari won?"},
                       {"from": "assistant", "value": "16"}]}
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from qwenvl_ft.data.boxes import box_notes
from qwenvl_ft.data.formats.json_entries import EXAMPLE, kind_of
from qwenvl_ft.data.records import CONTROL_TOKEN, Picture, Record, Turn
from qwenvl_ft.errors import Problem, UserError

Find = Callable[[str, str], Picture]  # (file name, place of the tag) -> the picture; raises UserError
ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
OPEN, CLOSE = "<img>", "</img>"
# Tags that peers read, and <img> in another case: what a user meant as a picture would train as text. HTML's have attributes.
FOREIGN_TAG = re.compile(r"<(?:(?i:image|video|audio)|(?!img)(?i:img))>")
# What is meant by keys that peers read, and that would be dropped here without a word; the fix of each.
KEYS, TURN_KEYS = ("conversations", "id"), ("from", "value", "loss", "reasoning")
PICTURE_TAG = "name the picture inside the user's value: <img>file.png</img>"
PICTURE_TAGS = "name the pictures inside the user's values: <img>file.png</img>"
NO_VIDEO = "videos are not trained on; name pictures inside the user's value: <img>file.png</img>"
NO_SOUND = "sound is not trained on: leave the record out, or delete the key if the talk needs none"
NO_TOOLS = (
    "tools are no part of a record here: write into the values what the model reads and says of them, or leave the record out"
)
BOXES = "write them into the values: <ref>the dog</ref><box>(x1,y1),(x2,y2)</box>, thousandths of the picture's width and height"
NO_PAIRS = "preferences are not trained on: keep the wanted answer as the assistant's turn, and delete the key"
NO_WEIGHTS = (
    'nothing is weighed: repeat the record, or write "loss": false on an answer that is not to be taught, and delete the key'
)
ANSWER = "only the assistant's turns are taught: write what is to be learnt as their value, and delete the key"
MASK = 'write "loss": false on an answer that is not to be taught, and delete the key'
TURNS = 'write its turns as "conversations", each with from and value'
SHARED = {
    **dict.fromkeys(("image", "image_path", "image_file", "image_url", "image_name", "img", "img_path", "picture"), PICTURE_TAG),
    **dict.fromkeys(("images", "image_paths", "image_urls", "imgs", "pictures"), PICTURE_TAGS),
    **dict.fromkeys(("videos", "video", "video_path", "video_url", "frames"), NO_VIDEO),
    **dict.fromkeys(("audio", "audios", "audio_path", "audio_url", "sound", "speech"), NO_SOUND),
    **dict.fromkeys(("tools", "functions", "tool_calls", "function_call", "tool_call_id", "tool_choice"), NO_TOOLS),
    **dict.fromkeys(("objects", "object", "bbox", "bboxes", "box", "boxes", "ref"), BOXES),
    **dict.fromkeys(("chosen", "rejected", "rejected_response", "rejected_messages", "kto_tag"), NO_PAIRS),
    **dict.fromkeys(("weight", "weights", "sample_weight", "loss_scale", "loss_weight"), NO_WEIGHTS),
    **dict.fromkeys(("label", "labels", "target", "solution", "ground_truth"), ANSWER),
}  # fmt: skip
FIXES = SHARED | {
    **dict.fromkeys(("messages", "conversation", "dialog", "dialogue", "history", "query", "response", "prompt", "completion",
                     "instruction", "input", "output", "question", "answer", "text"), TURNS),
    **dict.fromkeys(("loss", "train", "mask"), MASK), "reasoning": "move it into the assistant's turn",
    "system": 'write it as the first turn: {"from": "system", "value": "..."}',
}  # fmt: skip
TURN_FIXES = SHARED | {
    **dict.fromkeys(("train", "trainable", "mask", "masked", "train_on_turn", "learn"), MASK),
    **dict.fromkeys(("content", "text", "message"), 'write it as "value"'),
    **dict.fromkeys(("role", "speaker"), 'write it as "from"'),
    **dict.fromkeys(("reasoning_content", "thinking", "thought", "thoughts", "think"), 'write it as "reasoning"'),
}  # fmt: skip
TAG_FIXES = {
    "<video>": "videos are not trained on: leave the record out, or take the tag out if the talk needs no video",
    "<audio>": "sound is not trained on: leave the record out, or take the tag out if the talk needs none",
}


def turns_of(entry: Any, where: str, find: Find, problems: list[Problem]) -> Iterator[Turn]:
    """The turns of one record as far as they can be read; what is wrong with it is added to `problems`."""

    def complain(place: str, what: str, fix: str, kind: str = "") -> None:
        problems.append(Problem(place, what, fix, kind))

    if not isinstance(entry, dict):
        return complain(where, f"is {kind_of(entry)}, not an object", f"write {EXAMPLE}")
    problems += _unknown_keys(entry, where, KEYS, FIXES)
    if "conversations" not in entry:
        return complain(where, 'has no key "conversations"', f"write {EXAMPLE}")
    talk = entry["conversations"]
    if not isinstance(talk, list) or not talk:
        what = "is empty" if talk == [] else f"is {kind_of(talk)}, not a list"
        return complain(f"{where}.conversations", what, "list its turns, each with from and value")

    expected = "user"
    answered = taught = False
    for number, turn in enumerate(talk):
        place = f"{where}.conversations[{number}]"
        if not isinstance(turn, dict):
            complain(place, f"is {kind_of(turn)}, not an object", 'write {"from": "user", "value": "..."}')
            continue
        problems += _unknown_keys(turn, place, TURN_KEYS, TURN_FIXES)
        missing = [key for key in ("from", "value") if not isinstance(turn.get(key), str)]
        for key in missing:
            what = f'its "{key}" is {kind_of(turn[key])}, not a text' if key in turn else f'has no key "{key}"'
            complain(place, what, 'write {"from": "user", "value": "..."}')
        if missing:
            answered |= expected == "assistant"
            taught = True  # perhaps
            expected = {"user": "assistant", "assistant": "user"}[expected]
            continue
        role = ROLES.get(turn["from"])
        if role is None:
            fix = "write from: user or assistant (human, gpt and system are understood)"
            complain(place, f'is from "{turn["from"][:60]}"', fix, kind=fix)
        elif role == "system" and number > 0:
            complain(place, "a system turn stands after the first place", "move it to the front or delete it")
            continue
        elif role not in ("system", expected):
            what = f"is from the {role} where the {expected}'s turn was due"
            complain(place, what, "let user and assistant take turns, user first")
        answered |= (role or expected) == "assistant"
        if role != "system":
            expected = "user" if (role or expected) == "assistant" else "assistant"
        text = _with_reasoning(turn, role, place, problems)
        parts = tuple(_parts(text, role or "user", place, find, problems))
        if not turn["value"].strip() and role is not None:
            complain(place, f"the {role}'s turn is empty", "write its text or delete the turn and its partner")
        loss, answers = turn.get("loss"), role not in ("user", "system")
        if "loss" in turn and not isinstance(loss, bool):
            complain(place, f'its "loss" is {kind_of(loss)}, not true or false', "write true or false, or delete it")
        elif loss and not answers:
            complain(place, f'has "loss": true in the {role}\'s turn', "delete it: only the assistant's turns are taught")
        taught |= answers and loss is not False
        yield Turn(role or "user", parts, taught=not (answers and loss is False))
    if not answered:
        complain(where, "has no assistant turn, so it teaches nothing", "add the answer that the model should learn")
    elif expected == "assistant":
        place = f"{where}.conversations[{len(talk) - 1}]"
        complain(place, "the last turn is the user's and nobody answers it", "add the answer or delete it")
    elif not taught:
        complain(where, 'has "loss": false on every answer, so it teaches nothing', "let one be taught, or delete the record")


def _unknown_keys(entry: dict[str, Any], where: str, known: Sequence[str], fixes: Mapping[str, str]) -> Iterator[Problem]:
    """A problem for each key that is not read, in an order that is the same in every process."""
    understood = [key for key in fixes if key in entry]
    for key in [*understood, *sorted(entry.keys() - set(known) - set(understood))]:
        plain = key.strip().lower().replace("-", "_")
        fix = f'write it as "{plain}"' if plain in known else fixes.get(plain, f"delete it: only {', '.join(known)} are read")
        yield Problem(where, f'has a key "{key[:60]}", which is not read', fix)


def _with_reasoning(turn: dict[str, Any], role: str | None, place: str, problems: list[Problem]) -> str:
    """The turn's text: its thought, if it has one, as templates write it, and its value."""
    value: str = turn["value"]
    if "reasoning" not in turn:
        return value
    thought = turn["reasoning"]
    if not isinstance(thought, str) or not thought.strip():
        what = "is empty" if isinstance(thought, str) else f"is {kind_of(thought)}, not a text"
        problems.append(Problem(place, f'its "reasoning" {what}', "write what is thought before the answer, or delete the key"))
    elif role not in ("assistant", None):
        problems.append(Problem(place, f'has "reasoning" in the {role}\'s turn', "move it to the assistant's turn, or delete it"))
    elif value.lstrip().startswith("<think>"):
        problems.append(Problem(place, 'has "reasoning", and a value that begins with <think>', "keep one of the two"))
    elif "<think>" in thought or "</think>" in thought:
        problems.append(Problem(place, 'its "reasoning" holds <think> or </think>', "take them out: they are written around it"))
    else:
        return f"<think>\n{thought.strip()}\n</think>\n\n{value}"
    return value


def record_notes(records: Sequence[Record]) -> list[str]:
    """What is allowed and probably not meant, a line each: what looks like a box and is none; answers that begin with white space,
    which is learnt, too."""
    answers = [(record.where, turn) for record in records for turn in record.turns if turn.role == "assistant" and turn.taught]
    spaced = [where for where, turn in answers if isinstance(turn.parts[0], str) and turn.parts[0][:1].isspace()]
    found = box_notes(records)
    if spaced:
        some = f"{len(spaced):,} answers begin" if len(spaced) > 1 else "1 answer begins"
        what = "with white space, which is taught as it stands: take it out if it is not meant"
        found.append(f"{some} {what} ({spaced[0]} for one)")
    return found


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
        fix = TAG_FIXES.get(match[0].lower(), "write <img>file.png</img>")
        complain(f"holds {match[0]}, which is no tag here: it would be read as text", fix)
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
