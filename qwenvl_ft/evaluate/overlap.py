"""How well the boxes of an answer lie on those that are wanted.

A pair may have the same label, or one of the two none. The pair that overlaps most is taken first, then the next of what is left;
each box is in one pair. A wanted box without a pair has an overlap of 0. Points are not scored.

    >>> pair([Box((0, 0, 10, 10), "a")], [Box((0, 0, 10, 5), "A"), Box((0, 0, 10, 10), "b")])
    [0.5]
"""

from collections.abc import Mapping, Sequence
from typing import Any

from qwenvl_ft.data.records import Box

HIT = 0.5  # Source: Acc@0.5 of RefCOCO


def iou(one: Box, other: Box) -> float:
    """Area of the intersection over area of the union, 0 to 1; 0 where a box has no area."""
    (a, b, c, d), (e, f, g, h) = one.corners, other.corners
    both = max(0.0, min(c, g) - max(a, e)) * max(0.0, min(d, h) - max(b, f))
    union = max(0.0, c - a) * max(0.0, d - b) + max(0.0, g - e) * max(0.0, h - f) - both
    return both / union if union > 0 else 0.0


def pair(wanted: Sequence[Box], said: Sequence[Box]) -> list[float]:
    """The overlap of each wanted box with its partner, in the order of the wanted ones."""
    return [overlap for _, overlap in partners(wanted, said)]


def partners(wanted: Sequence[Box], said: Sequence[Box]) -> list[tuple[int | None, float]]:
    """The place in `said` of each wanted box's partner, and how they overlap; (None, 0.0) where it has none."""
    found: list[tuple[int | None, float]] = [(None, 0.0)] * len(wanted)
    pairs = [
        (iou(target, box), number, at)
        for number, target in enumerate(wanted)
        for at, box in enumerate(said)
        if not (target.label and box.label) or target.label.strip().casefold() == box.label.strip().casefold()
    ]
    free = set(range(len(said)))
    left = set(range(len(wanted)))
    for overlap, number, at in sorted(pairs, key=lambda of: (-of[0], of[1], of[2])):
        if number in left and at in free and overlap > 0:
            found[number] = at, overlap
            left.remove(number)
            free.remove(at)
    return found


def mean_overlap(prediction: Mapping[str, Any]) -> float | None:
    """Of the boxes that a prediction's question wants, 0 to 1; None where it wants none."""
    found = prediction.get("iou")
    return sum(found) / len(found) if found else None


def is_right(prediction: Mapping[str, Any]) -> bool:
    """What counts as a right answer wherever answers are shown: ChartQA's rule, or, where boxes are wanted, their mean overlap."""
    overlap = mean_overlap(prediction)
    return bool(prediction.get("relaxed")) if overlap is None else overlap >= HIT


def areas(boxes: Sequence[Box]) -> list[Box]:
    """Those that are no points."""
    return [box for box in boxes if len(box.corners) == 4]
