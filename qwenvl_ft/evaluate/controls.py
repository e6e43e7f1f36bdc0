"""What is right without looking: the same questions over blank pictures, over those of other records, without any; and the answer
that is most often right. And what is right where the same is asked with the text before the pictures.

A model that looks must do better than in each of the former, and must answer otherwise where the picture is another; it should do
as well with the text first.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from random import Random
from typing import Literal

from qwenvl_ft.data.media_position import placed
from qwenvl_ft.data.records import Medium, Picture, Record, Turn, Video
from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.evaluate.metrics import Prediction, boxes_of
from qwenvl_ft.evaluate.overlap import pair
from qwenvl_ft.infer.engine import blank

Control = Literal["blank", "shuffled", "no_pictures", "text_first"]
UNSEEN = {"blank": "blank pictures", "shuffled": "other pictures", "no_pictures": "no pictures", "prior": "prior"}
NAMES = UNSEEN | {"text_first": "text first"}


def shown_by(control: Control, records: Sequence[Record], seed: int) -> Callable[[Record], Record]:
    """How a control shows a record, or the beginning of one. Raises UserError where there are no other pictures to show, or none
    that stand before their text."""
    if control == "blank":
        return lambda record: _with(record, lambda medium: [blank(medium)])
    if control == "no_pictures":
        return lambda record: _with(record, lambda _: [])
    if control == "text_first":
        if not num_moved(records):
            what, fix = "no question has its pictures before its text", "evaluate without --text-first"
            raise UserError(Problem("the questions", what, fix))
        return text_first
    other = _others(records, seed)
    return lambda record: _with(record, lambda medium: [other[medium]])


def text_first(record: Record) -> Record:
    """The record with the text of each turn before its pictures; one whose pictures stand among its text as it is."""
    return placed(record, "last")


def num_moved(records: Iterable[Record]) -> int:
    """How many records are others with their text first."""
    return sum(text_first(record) is not record for record in records)


def _with(record: Record, shown: Callable[[Medium], Sequence[Medium]]) -> Record:
    """The record with what is `shown` in place of its media."""

    def changed(turn: Turn) -> Turn:
        parts = [shown(part) if isinstance(part, Picture | Video) else [part] for part in turn.parts]
        return replace(turn, parts=tuple(part for some in parts for part in some))

    return replace(record, turns=tuple(map(changed, record.turns)))


def _others(records: Sequence[Record], seed: int) -> dict[Medium, Medium]:
    """For each medium one of its kind that is in no record with it: the next such in an order of chance."""
    beside: dict[Medium, dict[Medium, str]] = {}
    for record in records:
        for medium in record.media:
            beside.setdefault(medium, {}).update(dict.fromkeys(record.media, record.where))
    order = list(beside)
    Random(seed).shuffle(order)
    found = {}
    for number, medium in enumerate(order):
        ring = (order[(number + step) % len(order)] for step in range(1, len(order)))
        other = next((one for one in ring if one.kind == medium.kind and one not in beside[medium]), None)
        if other is None:
            what = f"no other record has another {medium.kind} to show in its place"
            fix = "evaluate on records of several pictures, or without --shuffled"
            raise UserError(Problem(beside[medium][medium], what, fix))
        found[medium] = other
    return found


def prior(predictions: Sequence[Prediction]) -> list[Prediction]:
    """What would be answered without a model: the answer that is wanted most often of questions of the same text, or where no other
    has it of all questions; the first of those that are wanted equally often. One that no other question wants is not known.

    With the question itself left out of the count, as many yes as no would make the prior always wrong.
    """
    everywhere, of_text = Counter[str](), defaultdict[str, Counter[str]](Counter)
    for of in predictions:
        everywhere[of["wanted"]] += 1
        of_text[of["question"]][of["wanted"]] += 1
    two = {text: wanted.most_common(2) for text, wanted in of_text.items() if wanted.total() > 1}
    any_text = everywhere.most_common(2)
    example = {of["wanted"]: of for of in predictions}
    found = []
    for of in predictions:
        known = [said for said, count in two.get(of["question"], any_text) if said != of["wanted"] or count > 1]
        found.append(of | {"answer": known[0] if known else ""})
        if "iou" in of:
            found[-1]["boxes"] = example[known[0]].get("wanted_boxes", []) if known else []
            found[-1]["iou"] = pair(boxes_of(of, "wanted_boxes"), boxes_of(found[-1], "boxes"))
    return found
