"""Reads entries whose turns stand in a list, `conversations` or `messages`, with media, tools and a system text beside it.

{"image": "a.png", "conversations": [{"from": "human", "value": "<image>\\nWhat colour?"}, {"from": "gpt", "value": "Red."}]}
"""

from collections.abc import Iterator
from itertools import chain
from typing import Any

from qwenvl_ft.data.formats.calls import tools_of
from qwenvl_ft.data.formats.keys import FIXES, IDS, PICTURES, VIDEOS, Complaints, is_empty
from qwenvl_ft.data.formats.rows import listed
from qwenvl_ft.data.formats.talk import Listed, Said, Talk
from qwenvl_ft.data.formats.turns import NEW, OLD, read_turns

READ = frozenset((*PICTURES, *VIDEOS, "system", "tools", "objects", "metric"))
KNOWN = {key: READ | {*IDS, key} for key in ("conversations", "messages")}


def read_list(entry: dict[str, Any], where: str, complaints: Complaints) -> Talk:
    """An entry with `conversations` or `messages`."""
    key, way = ("conversations", OLD) if "conversations" in entry else ("messages", NEW)
    complaints.unknown_keys(entry, where, KNOWN[key], FIXES)
    said: Iterator[Said] = read_turns(entry[key], f"{where}.{key}", complaints, way)
    in_parts = key == "messages" and are_in_parts(entry[key])
    if not entry.keys() & READ:  # the talk alone
        return Talk(said, in_parts=in_parts)
    system = entry.get("system")
    if isinstance(system, str) and system:
        said = chain((Said(f"{where}.system", "system", system),), said)
    elif not is_empty(system):
        complaints.not_a("a text", system, f"{where}.system", "write a text")
    metric = "" if is_empty(entry.get("metric")) else entry["metric"]
    if not isinstance(metric, str):
        complaints.not_a("a text", metric, f"{where}.metric", "write the metric's name, as `qwenvl-ft eval --metric` takes it")
    return Talk(
        said,
        _beside(entry, PICTURES, where, complaints),
        _beside(entry, VIDEOS, where, complaints),
        tools_of(entry.get("tools"), f"{where}.tools", complaints),
        entry.get("objects"),
        metric,
        in_parts=in_parts,
    )


def are_in_parts(messages: Any) -> bool:
    """Whether the content of a message is a list of parts."""
    return isinstance(messages, list) and any(isinstance(turn, dict) and isinstance(turn.get("content"), list) for turn in messages)


def _beside(entry: dict[str, Any], keys: tuple[str, ...], where: str, complaints: Complaints) -> list[Listed]:
    """The media under one of two keys."""
    there = [key for key in keys if not is_empty(entry.get(key))]
    if len(there) > 1:
        complaints.say(where, f'has "{there[0]}" and "{there[1]}"', "keep the one that lists all, in the order of the texts")
    return listed(entry, there[0], where, complaints) if there else []
