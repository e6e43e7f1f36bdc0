"""Writes a record in the documented form, or says what that cannot carry. What is written is read again and compared.

Boxes become the tags of the first Qwen-VL, tools and their calls the turns that LLaMA-Factory has for them. The `id` of a record,
which no reader uses, is not kept.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from qwenvl_ft.data.formats import read_entry
from qwenvl_ft.data.formats.talk import Finder
from qwenvl_ft.data.records import Box, Call, InTable, InTar, Picture, Record, Turn, Video
from qwenvl_ft.errors import Problem, UserError

THOUSAND = 1000  # what the tags of the first Qwen-VL count a picture's sides in
NEAR = 1e-3  # px by which a box may differ once its thousandths are read again
TAGS = {"image": ("<img>", "</img>"), "video": ("<video>", "</video>")}


def documented(record: Record, root: Path, finder: Finder) -> dict[str, Any]:
    """The record as an entry whose file names are relative to `root`. Raises UserError for what cannot be carried."""
    entry: dict[str, Any] = {"conversations": [turn for of in record.turns for turn in _turns(of, record, root)]}
    if record.tools:
        entry["tools"] = [json.loads(tool) for tool in record.tools]
    if record.metric:
        entry["metric"] = record.metric
    problems: list[Problem] = []
    again = read_entry(entry, record.where, finder, problems)
    if problems:
        raise UserError(*problems)
    if again is None or (again.tools, again.metric) != (record.tools, record.metric) or not _same(again.turns, record.turns):
        what = "is another record once it is read in the documented form"
        fix = "keep its own form: a medium's min_pixels, max_pixels, fps or nframes have no place there, and some boxes neither"
        raise UserError(Problem(record.where, what, fix))
    return entry


def _turns(turn: Turn, record: Record, root: Path) -> Iterator[dict[str, Any]]:
    mask = {} if turn.taught else {"loss": False}
    if turn.parts or not turn.calls:
        value = "".join(_written(part, record, root) for part in turn.parts)
        yield {"from": "observation" if turn.role == "tool" else turn.role, "value": value, **mask}
    if turn.calls:
        calls = [_call(call, record) for call in turn.calls]
        yield {"from": "function_call", "value": json.dumps(calls if len(calls) > 1 else calls[0], ensure_ascii=False), **mask}


def _call(call: Call, record: Record) -> Any:
    if isinstance(call, str):
        return json.loads(call)
    fix = "train on the file as it is: the tags of boxes have no place in a call"
    raise UserError(Problem(record.where, "has a box in a call of a tool", fix))


def _written(part: str | Picture | Video | Box, record: Record, root: Path) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Box):
        return _tagged(part, record.pictures)
    source = part.source
    if isinstance(source, tuple) and source and all(isinstance(frame, Path) for frame in source):
        source = source[0].parent  # type: ignore[union-attr]  # the folder of its frames, if it holds no others
    if isinstance(source, InTar | InTable):
        fix = "train on the file as it is, or take the media out of it and name them"
        raise UserError(Problem(record.where, f"{source.name} lies inside {source.path.name}", fix, kind="inside another file"))
    if not isinstance(source, Path) or not source.is_relative_to(root):
        fix = "give --data-dir, a folder that holds all pictures and videos"
        raise UserError(Problem(record.where, f"{part.name} lies outside {root}", fix, kind="outside"))
    opening, closing = TAGS[part.kind]
    return f"{opening}{source.relative_to(root).as_posix()}{closing}\n"


def _tagged(box: Box, pictures: list[Picture]) -> str:
    label = f"<ref>{box.label}</ref>" if box.label else ""
    if not box.corners:
        return label
    of = pictures[box.picture]
    sides = (of.width, of.height) * 2
    numbers = [f"{THOUSAND * corner / side:.6f}".rstrip("0").rstrip(".") for corner, side in zip(box.corners, sides, strict=False)]
    points = ",".join(f"({x},{y})" for x, y in zip(numbers[::2], numbers[1::2], strict=True))
    return f"{label}<box>{points}</box>"


def _same(found: tuple[Turn, ...], wanted: tuple[Turn, ...]) -> bool:
    """Whether two conversations are one, boxes taken as equal within NEAR."""
    if [replace(turn, parts=()) for turn in found] != [replace(turn, parts=()) for turn in wanted]:
        return False
    pairs = [(turn.parts, other.parts) for turn, other in zip(found, wanted, strict=True)]
    return all(len(parts) == len(others) and all(map(_is_same, parts, others)) for parts, others in pairs)


def _is_same(part: Any, other: Any) -> bool:
    if isinstance(part, Box) and isinstance(other, Box) and len(part.corners) == len(other.corners):
        near = all(abs(a - b) <= NEAR for a, b in zip(part.corners, other.corners, strict=True))
        return near and replace(part, corners=()) == replace(other, corners=())
    return bool(part == other)
