"""Reads a list of turns as every form writes them: {"from", "value"} or {"role", "content"}, the content a text or parts."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from qwenvl_ft.data.formats.calls import calls_of
from qwenvl_ft.data.formats.keys import MESSAGE_FIXES, PART_FIXES, TURN_FIXES, Complaints, is_empty
from qwenvl_ft.data.formats.talk import Listed, Said, Shown
from qwenvl_ft.data.videos import OPTIONS as VIDEO_OPTIONS

ROLES = {
    "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system", "developer": "system",
    "tool": "tool", "observation": "tool", "tool_response": "tool", "function_call": "call", "tool_call": "call",
}  # fmt: skip
SAYS = frozenset(("loss", "weight", "reasoning", "reasoning_content", "tool_calls", "tool_call_id"))  # what both ways may have
OLD, NEW = ("from", "value"), ("role", "content")
KNOWN = {OLD: SAYS | {*OLD}, NEW: SAYS | {*NEW}}
TURN_KEYS = SAYS | {*OLD, *NEW, "name"}
FIXES = {OLD: TURN_FIXES, NEW: MESSAGE_FIXES}
EXAMPLES = {OLD: 'write {"from": "user", "value": "..."}', NEW: 'write {"role": "user", "content": "..."}'}
KINDS = {"image": "image", "image_url": "image", "video": "video", "video_url": "video"}  # of parts that are no text
OPTIONS = {"image": ("min_pixels", "max_pixels"), "video": VIDEO_OPTIONS}
ROLE_FIX = "write from: user or assistant (human, gpt and system are understood)"
PART = 'write {"type": "text", "text": "..."} or {"type": "image", "image": "file.png"}'


def read_turns(talk: Any, where: str, complaints: Complaints, way: tuple[str, str] = NEW) -> Iterator[Said]:
    """The turns of a list as far as they can be read; `way` is that of a turn whose keys do not tell."""
    if not isinstance(talk, list) or not talk:
        what = "is empty" if talk == [] else ""
        fix = f"list its turns, each with {way[0]} and {way[1]}"
        complaints.say(where, what, fix) if what else complaints.not_a("a list", talk, where, fix)
        return
    due: list[tuple[Any, str]] = []  # (id, name) of the calls that no tool has answered yet
    unnamed = Counter[str]()  # parts that are the next picture or video beside the turns
    for number, turn in enumerate(talk):
        place = f"{where}[{number}]"
        if not isinstance(turn, dict):
            complaints.not_a("an object", turn, place, EXAMPLES[way])
            continue
        here = way
        if "from" in turn or "value" in turn:
            here = OLD
        elif "role" in turn or "content" in turn:
            here = NEW
        by, what = here
        role = ROLES.get(turn[by]) if isinstance(turn.get(by), str) else None
        if role in ("user", "assistant") and len(turn) == 2 and isinstance(turn.get(what), str):  # nearly all, and so the quick way
            due.clear()
            yield Said(place, role, turn[what])
        else:
            yield _read_turn(turn, role, here, place, due, unnamed, complaints)


def _read_turn(
    turn: dict[str, Any], role: str | None, way: tuple[str, str], place: str, due: list[tuple[Any, str]], unnamed: Counter[str],
    complaints: Complaints,
) -> Said:  # fmt: skip
    by, what = way
    known = KNOWN[way] | {"name"} if role == "tool" else KNOWN[way]
    complaints.unknown_keys(turn, place, known, FIXES[way])
    content = turn.get(what)
    if content is None and not is_empty(turn.get("tool_calls")):  # OpenAI writes null where an answer is calls alone
        content = ""
    good = True
    for key, value, kinds in ((by, turn.get(by), str), (what, content, str | list if way == NEW else str)):
        if not isinstance(value, kinds):
            good = False
            if key in turn:
                complaints.not_a("a text", turn[key], place, EXAMPLES[way], key)
            else:
                complaints.say(place, f'has no key "{key}"', EXAMPLES[way])
    if not good:
        return Said(place, role, None)
    if role is None:
        complaints.say(place, f'is from "{turn[by][:60]}"', ROLE_FIX, kind=ROLE_FIX)
    if isinstance(content, list):
        content = _read_parts(content, role or "user", place, unnamed, complaints)
        if role not in ("user", "tool", None):
            content = "".join(part for part in content if isinstance(part, str))
    calls: tuple[str, ...] = ()
    if role not in ("tool", "call"):  # what was not answered by now never is
        due.clear()
    if role == "call" or not is_empty(turn.get("tool_calls")):
        if role not in ("assistant", None) and not is_empty(turn.get("tool_calls")):
            complaints.say(place, f'has "tool_calls" in a turn from {turn[by][:60]}', "move them to the assistant's turn")
        found = calls_of(content if role == "call" else turn["tool_calls"], place, complaints)
        calls = tuple(text for text, _, _ in found)
        due += [(id, name) for _, id, name in found]
        content = "" if role == "call" else content
    if role == "tool" or turn.get("tool_call_id") is not None:
        _check_answer(turn, role, due, place, complaints)
    if calls or not isinstance(content, str) or content.strip():  # else the turn is empty, and its thought does not fill it
        content = _with_reasoning(turn, role, content, place, complaints)
    return Said(place, role, content, _taught(turn, role, place, complaints), calls)


def _read_parts(parts: list[Any], role: str, place: str, unnamed: Counter[str], complaints: Complaints) -> list[str | Shown]:
    """Texts and media of a content that is a list: OpenAI's, TRL's and Qwen's ways of writing it."""
    found: list[str | Shown] = []
    for number, part in enumerate(parts):
        at = f"{place}.content[{number}]"
        if isinstance(part, str):
            found.append(part)
            continue
        if not isinstance(part, dict):
            complaints.not_a("an object", part, at, PART)
            continue
        held = [key for key in ("text", *KINDS) if part.get(key) is not None]  # an Arrow file writes null where a key is absent
        said = part.get("type")
        key = held[0] if len(held) == 1 else str(said) if not held and said is not None else None
        if key not in ("text", *KINDS) or (said is not None and str(said).removesuffix("_url") != key.removesuffix("_url")):
            what = f'is a part of the type "{str(said)[:40]}"' if said not in ("text", *KINDS) else "is not one part"
            complaints.say(at, f"{what}, which is not read", PART, kind=PART)
            continue
        kind = KINDS.get(key, "text")
        known = {
            "type",
            "index",
            *OPTIONS.get(kind, ()),
            *(key for key in ("text", *KINDS) if key in held or part.get(key, 0) is None),
        }
        complaints.unknown_keys(part, at, known, PART_FIXES)
        value = part.get(key)
        if isinstance(value, dict):  # OpenAI's {"image_url": {"url": ...}}
            known = {"url", "detail"} if value.get("detail") in ("auto", "high") else {"url"}  # which is how pictures are shown
            complaints.unknown_keys(value, f"{at}.{key}", known, PART_FIXES)
            value = value.get("url", value)
        if kind == "text":
            if isinstance(value, str):
                found.append(value)
            else:
                complaints.not_a("a text", value, at, PART, key)
            continue
        if role not in ("user", "tool"):
            complaints.say(at, f"a part of the {role}'s turn is no text", "show pictures and videos in the user's turns only")
            continue
        options = {name: part[name] for name in OPTIONS[kind] if part.get(name) is not None}
        if value is None:
            _check_index(part.get("index"), options, unnamed[kind], at, complaints)
            unnamed[kind] += 1
        found.append(Shown(kind, None if value is None else Listed(value, at, options)))
    return found


def _check_index(index: Any, options: Mapping[str, Any], seen: int, at: str, complaints: Complaints) -> None:
    """A part without a name is the next picture beside the turns; an index that says otherwise cannot be followed."""
    if options:
        complaints.say(at, f'has "{next(iter(options))}" and names no file', "name the file in the part itself")
    if index is not None and (isinstance(index, bool) or index != seen):
        complaints.say(at, f'its "index" is {json.dumps(index, default=str)[:40]}, and it is the next picture',
                       "write the parts in the order of the pictures")  # fmt: skip


def _check_answer(turn: dict[str, Any], role: str | None, due: list[tuple[Any, str]], place: str, complaints: Complaints) -> None:
    """Templates write tools' answers in their order, without ids: they have to stand in the order of the calls."""
    if role not in ("tool", None):
        complaints.say(place, f'has "tool_call_id" in the {role}\'s turn', "only a tool answers a call: delete it")
        return
    id, name = due.pop(0) if due else (None, "")
    for key, wanted in (("tool_call_id", id), ("name", name)):
        if turn.get(key) is not None and turn[key] != wanted:
            what = f'its "{key}" is {json.dumps(turn[key], default=str)[:60]}, where an answer to {wanted or "no call"} was due'
            complaints.say(place, what, "let the tools answer every call, in the order of the calls", kind=key)


def _taught(turn: dict[str, Any], role: str | None, place: str, complaints: Complaints) -> bool | None:
    """What `loss` or OpenAI's `weight` says of the turn; None where neither is there."""
    found = None
    for key in ("loss", "weight"):
        value = turn.get(key)
        if value is None:
            continue
        if not isinstance(value, bool) and value not in (0, 1):
            if key == "weight":
                what = f'its "weight" is {json.dumps(value, default=str)[:40]}, and nothing is weighed'
                complaints.say(place, what, "write 0 or 1, or repeat the record", kind="weight")
            else:
                complaints.not_a("true or false", value, place, "write true or false, or delete it", key)
            continue
        if value and role in ("user", "system", "tool"):
            what = f'has "{key}": {json.dumps(value)} in the {role}\'s turn'
            complaints.say(place, what, "delete it: only the assistant's turns are taught")
        if found is not None and found != bool(value):
            complaints.say(place, 'its "loss" and its "weight" do not agree', "keep one of them")
        found = bool(value)
    return found


def _with_reasoning(turn: dict[str, Any], role: str | None, content: Any, place: str, complaints: Complaints) -> Any:
    """The turn's content: its thought, if it has one, as templates write it, and its text."""
    for key in ("reasoning", "reasoning_content"):
        thought = turn.get(key)
        if thought is None:
            continue
        if not isinstance(thought, str) or not thought.strip():
            what = f'its "{key}" is empty' if isinstance(thought, str) else ""
            fix = "write what is thought before the answer, or delete the key"
            complaints.say(place, what, fix) if what else complaints.not_a("a text", thought, place, fix, key)
        elif role not in ("assistant", "call", None):
            complaints.say(place, f'has "{key}" in the {role}\'s turn', "move it to the assistant's turn, or delete it")
        elif not isinstance(content, str) or content.lstrip().startswith("<think>"):
            complaints.say(place, f'has "{key}", and a value that begins with <think>', "keep one of the two")
        elif "<think>" in thought or "</think>" in thought:
            complaints.say(place, f'its "{key}" holds <think> or </think>', "take them out: they are written around it")
        else:
            content = f"<think>\n{thought.strip()}\n</think>\n\n{content}"
    return content
