"""Boxes and points: read from what a file says, written as the model's family writes them, read back from its answers.

In a record a Box is in px of the picture as it is seen, before any resize. What a model reads and says are numbers of a grid:
thousandths of the picture's sides, or px of the picture as it was resized for it, by family (families.py). A box goes to the
nearest point of that grid, so it comes back within half a step.

    >>> seen = [Seen(height=480, width=640, shown_height=476, shown_width=644)]
    >>> turns = [Turn("assistant", (Box((64, 48, 320, 240), "the bar"),))]
    >>> [written(turns, form, seen)[0].text for form in ("tokens", "thousand", "pixels")]  # doctest: +NORMALIZE_WHITESPACE
    ['<|object_ref_start|>the bar<|object_ref_end|><|box_start|>(100,100),(500,500)<|box_end|>',
     '[{"bbox_2d": [100, 100, 500, 500], "label": "the bar"}]', '[{"bbox_2d": [64, 48, 322, 238], "label": "the bar"}]']
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from qwenvl_ft.data.box_marks import Mark, Stray, has_json, has_tags, marks
from qwenvl_ft.data.families import BoxForm
from qwenvl_ft.data.records import Box, Call, Part, Picture, Turn
from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.values import BoxUnit

THOUSAND = 1000
ROUNDED_AWAY = 0.001  # of a side, or one px: so far outside a corner may lie by rounding
TOKEN = re.compile(r"<\|[a-z_]+\|>")
IN_CALL = 'write its numbers as "bbox_2d" or "point_2d" of the arguments, and set `boxes` to what they are'
BETWEEN = re.compile(r"\s*,?\s*")  # of neighbours, which become one JSON list
FENCE, FENCE_END = re.compile(r"```json\s*+\Z"), re.compile(r"\s*+```")


class Seen(NamedTuple):
    """A picture's size in px as it is seen, and the size at which it is shown to the model."""

    height: int
    width: int
    shown_height: int
    shown_width: int


# ---- from a file ----


def placed(turns: Sequence[Turn], places: Sequence[str], numbers: BoxUnit | None, problems: list[Problem]) -> list[Turn]:
    """The turns with the boxes and references of their texts as parts, also those in their calls; what is wrong with one is added
    to `problems`, at its turn's place.

    A box lies in the last picture before it, or in the first if none is before it. Tags of the first Qwen-VL are thousandths,
    tokens of Qwen2-VL are what `numbers` says, else thousandths; JSON is read if `numbers` says what it holds.
    """
    texts = [text for turn in turns for text in (*turn.parts, *turn.calls) if isinstance(text, str)]
    if not any(has_tags(text) or (numbers and has_json(text)) for text in texts):
        return list(turns)
    pictures = [medium for turn in turns for medium in turn.media if isinstance(medium, Picture)]
    of_v1 = any("<box>" in text for text in texts)  # elsewhere <ref> is a footnote
    shown = 0

    def part_of(mark: Mark, place: str) -> str | Box:
        if not mark.numbers:
            return Box((), mark.label) if of_v1 or mark.kind == "token" else f"<ref>{mark.label}</ref>"
        unit = "thousand" if mark.kind == "tag" or not numbers else numbers
        box = box_in(pictures, max(shown - 1, 0), mark.numbers, unit, mark.label, place)
        return replace(box, bare=True) if mark.kind == "bare" else box

    def read(text: str, role: str, place: str, in_call: bool = False) -> Iterator[str | Box]:
        for piece in marks(text, numbers is not None):
            if isinstance(piece, str):
                yield piece
            elif isinstance(piece, Stray):
                if role != "assistant" and piece.is_placeholder:  # a question that says how to answer
                    yield piece.text
                else:
                    problems.append(Problem(place, f"holds {piece.text[:60]}, which is no box", piece.fix, kind=piece.fix))
            elif in_call and piece.numbers and piece.kind != "bare":
                problems.append(Problem(place, "has a box in tags within a call of a tool", IN_CALL))
            else:
                try:
                    yield part_of(piece, place)
                except UserError as error:
                    problems.extend(error.problems)

    found = []
    for turn, place in zip(turns, places, strict=True):
        parts: list[Part] = []
        for part in turn.parts:
            shown += isinstance(part, Picture)
            parts += read(part, turn.role, place) if isinstance(part, str) else [part]
        calls = [(call, tuple(read(call, turn.role, place, in_call=True))) for call in turn.calls if isinstance(call, str)]
        with_boxes = tuple(pieces if any(isinstance(of, Box) for of in pieces) else call for call, pieces in calls)
        found.append(replace(turn, parts=tuple(part for part in parts if part != ""), calls=with_boxes))
    return found


def box_in(pictures: Sequence[Picture], picture: int, numbers: Sequence[float], unit: BoxUnit, label: str, place: str) -> Box:
    """The box of these numbers in px of its picture. Raises UserError for one that its picture does not hold."""
    said = ",".join(f"({x:g},{y:g})" for x, y in zip(numbers[::2], numbers[1::2], strict=False))
    name = f"{'box' if len(numbers) == 4 else 'point'} {said}" + (f" of {label[:40]!r}" if label else "")

    def refused(what: str, fix: str) -> UserError:
        return UserError(Problem(place, f"the {name} {what}", fix, kind=fix))

    if TOKEN.search(label) or any("\ud800" <= letter <= "\udfff" for letter in label):
        raise refused("has a token or half a character in its label", "write the label as plain text")
    if len(numbers) not in (2, 4):
        raise refused(f"has {len(numbers)} numbers", "write four for a box, x1, y1, x2, y2, or two for a point")
    if not 0 <= picture < len(pictures):
        fix = "name its picture, or take the box out"
        raise refused(f"is in picture {picture}, and there are {len(pictures)}" if pictures else "has no picture", fix)
    if len(numbers) == 4 and (numbers[2] < numbers[0] or numbers[3] < numbers[1]):
        raise refused("ends before it begins", "write x1, y1, x2, y2: left, top, right, bottom")
    of = pictures[picture]
    full = {"pixels": (of.width, of.height), "unit": (1, 1), "thousand": (THOUSAND, THOUSAND)}[unit]
    corners = []
    for number, most, side in zip(numbers, full * 2, (of.width, of.height) * 2, strict=False):
        slack = max(ROUNDED_AWAY * most, unit == "pixels")
        if not -slack <= number <= most + slack:
            what = f"lies outside its picture{f' {of.name}' * bool(of.name)}, {of.width} x {of.height} px, as {unit}"
            raise refused(what, "mend it, or set `boxes` to what the numbers are: pixels, unit or thousand")
        corners.append(min(max(number / most * side, 0.0), float(side)))
    return Box(tuple(corners), label, picture)


# ---- to the model ----


def written(turns: Sequence[Turn], form: BoxForm, seen: Sequence[Seen]) -> list[Turn]:
    """The turns with their boxes as text. `seen` are the sizes of all their pictures, in their order.

    Source of the forms: QwenLM's process_bbox.ipynb (0 to 1000 for Qwen2-VL, px of the resized picture for Qwen2.5-VL) and the
    README of Qwen3-VL (0 to 1000). Other than the notebook, which ends at the last px, a box may end at the picture's edge. The
    point of Qwen2-VL, one pair in the tokens of a box, is that of ms-swift and UI-TARS, point_2d that of Qwen's cookbooks.
    """

    def call_of(call: Call) -> str:
        return call if isinstance(call, str) else "".join(map(str, _pieces(call, form, seen)))

    return [
        replace(turn, parts=tuple(_pieces(turn.parts, form, seen)), calls=tuple(map(call_of, turn.calls))) if turn.boxes else turn
        for turn in turns
    ]


def _pieces(parts: Sequence[Part], form: BoxForm, seen: Sequence[Seen]) -> Iterator[Part]:
    """The parts, each run of boxes as one text: in JSON across white space and commas, too."""
    at, parts = 0, _unfenced(parts) if form == "tokens" else parts
    while at < len(parts):
        part = parts[at]
        at += 1
        if not isinstance(part, Box):
            yield part
            continue
        if not part.corners and form != "tokens":
            yield part.label
            continue
        run = [part]
        while not part.bare and part.corners:
            after = at + 1 if form != "tokens" and at < len(parts) and _joins(parts[at]) else at
            if after == len(parts) or not isinstance(following := parts[after], Box) or following.bare or not following.corners:
                break
            run.append(following)
            at = after + 1
        yield _said(run, form, seen)


def _unfenced(parts: Sequence[Part]) -> list[Part]:
    """Without the fences of JSON around boxes that become tokens."""
    found, opened = list(parts), -1
    for at, part in enumerate(parts):
        if isinstance(part, str):
            before = found[opened] if opened >= 0 else ""
            if isinstance(before, str) and before and (end := FENCE_END.match(part)):
                found[opened], found[at] = FENCE.sub("", before), part[end.end() :]
            if not _joins(part):
                opened = at if FENCE.search(part) else -1
        elif not isinstance(part, Box) or part.bare:
            opened = -1
    return [part for part in found if part != ""]


def _joins(part: Part) -> bool:
    return isinstance(part, str) and BETWEEN.fullmatch(part) is not None


def _said(run: Sequence[Box], form: BoxForm, seen: Sequence[Seen]) -> str:
    numbers = [_on_grid(box, form, seen) for box in run]
    if run[0].bare:
        return json.dumps(numbers[0])
    if form != "tokens":
        objects = [
            {"bbox_2d" if len(box.corners) == 4 else "point_2d": of} | ({"label": box.label} if box.label else {})
            for box, of in zip(run, numbers, strict=True)
        ]
        return json.dumps(objects, ensure_ascii=False)
    said, named = "", ""
    for box, of in zip(run, numbers, strict=True):
        if box.label != named or not of:  # neighbours of one label share its reference
            said += f"<|object_ref_start|>{box.label}<|object_ref_end|>" if box.label else "\n"
        named = box.label
        pairs = ",".join(f"({x},{y})" for x, y in zip(of[::2], of[1::2], strict=True))
        said += f"<|box_start|>{pairs}<|box_end|>" if of else ""
    return said


def _on_grid(box: Box, form: BoxForm, seen: Sequence[Seen]) -> list[int]:
    """The nearest points of the family's grid."""
    of = seen[box.picture] if box.corners else None
    if of is None:
        return []
    sides = zip(box.corners, (of.width, of.height) * 2, _grid(form, of) * 2, strict=False)
    return [round(corner * most / side) for corner, side, most in sides]


def _grid(form: BoxForm, of: Seen) -> tuple[int, int]:
    return (of.shown_width, of.shown_height) if form == "pixels" else (THOUSAND, THOUSAND)


# ---- from an answer ----


def read_answer(text: str, form: BoxForm, seen: Sequence[Seen]) -> list[Box]:
    """The boxes and points of an answer, in px of the last picture as it is seen; of JSON that was cut off those that are whole.

    Any way of writing is read; what its numbers are follows from the family. They are not checked: a model says what it says.
    """
    if not seen:
        return []
    of = seen[-1]
    found = []
    pieces = list(marks(text, as_json=True))
    closed = max((at for at, piece in enumerate(pieces) if isinstance(piece, str) and "}" in piece), default=-1)
    for at, piece in enumerate(pieces):
        if isinstance(piece, Mark) and piece.numbers and (piece.kind != "bare" or at < closed):
            sides = zip(piece.numbers, (of.width, of.height) * 2, _grid(form, of) * 2, strict=False)
            corners = tuple(number * side / most for number, side, most in sides)
            found.append(Box(corners, piece.label, len(seen) - 1, bare=piece.kind == "bare"))
    return found


def facts_of(box: Box) -> dict[str, Any]:
    """A box for a program: px to a tenth, the picture counted from 0."""
    key = "bbox_2d" if len(box.corners) == 4 else "point_2d"
    return {key: [round(corner, 1) for corner in box.corners], "label": box.label, "picture": box.picture}
