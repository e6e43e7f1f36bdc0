"""Asks every question of a meta-file and keeps every answer.

Each assistant turn is one question, the turns before it as they stand in the record. Where boxes are wanted, how well those of the
answer lie on them is kept, too (overlap.py); both are read out of the texts in the same way. What an answer is worth: metrics.py.
"""

import json
import os
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from qwenvl_ft.data import sources
from qwenvl_ft.data.box_marks import has_json, has_tags
from qwenvl_ft.data.boxes import facts_of
from qwenvl_ft.data.chat import Chat
from qwenvl_ft.data.records import Box, Record, Source
from qwenvl_ft.data.template import split_thought
from qwenvl_ft.evaluate.controls import Control, shown_by
from qwenvl_ft.evaluate.metrics import Prediction, exact, relaxed
from qwenvl_ft.evaluate.overlap import HIT, areas, pair
from qwenvl_ft.folders.whole import short_hash
from qwenvl_ft.infer.batch_file import append_answers, other_answers, read_answers, together
from qwenvl_ft.infer.engine import Answer, Engine

Question = tuple[Record, str]
Reply = tuple[int, Answer, dict[str, Any]]  # which question, what was said, what else is kept of it
Replies = Callable[[Sequence[Record]], Iterator[list[Reply]]]


def questions(records: Sequence[Record], chat: Chat | None = None) -> Iterator[Question]:
    """(the record as far as before the answer, the wanted answer) of each assistant turn, but of those that are not to be learnt.
    Calls of tools are wanted as `chat` writes them.
    """
    for record in records:
        for number, turn in enumerate(record.turns):
            if turn.role == "assistant" and turn.taught:
                asked = Record(f"{record.where}.conversations[{number}]", record.turns[:number], record.tools, record.metric)
                yield asked, chat.answer_of(turn) if chat and turn.calls else turn.text


@dataclass(frozen=True)
class Sheet:
    """The questions of a meta-file, as one model is asked them.

    `chosen` are the places in `asked` of those that are asked, in their order. `control` shows other pictures than their own, as
    `shown_by` has it.
    """

    asked: Sequence[Question]
    chosen: Sequence[int]
    control: Control | None = None
    show: Callable[[Record], Record] = lambda record: record

    @classmethod
    def of(
        cls, records: Sequence[Record], chat: Chat | None = None, limit: int | None = None, seed: int = 0,
        control: Control | None = None,
    ) -> "Sheet":  # fmt: skip
        """Those of all records, boxes as `chat` writes them; with a `limit` as many of them, by chance: fewer are among more."""
        asked = list(questions([_written(record, chat) for record in records] if chat else records, chat))
        order = list(range(len(asked)))
        if limit is not None:
            Random(seed).shuffle(order)
        show = shown_by(control, [record for record, _ in asked], seed) if control else cls.show
        return cls(asked, sorted(order[:limit]), control, show)

    def hashes(self, who: Any) -> list[str]:
        """Of each question, what is asked of whom."""
        # A white picture costs memory, and nothing but its size is in it.
        shown = [_shown(record if self.control == "blank" else self.show(record)) for record, _ in self.asked]
        return [
            short_hash([who, self.control, record.where, what, wanted])
            for what, (record, wanted) in zip(shown, self.asked, strict=True)
        ]


def ask_all(
    sheet: Sheet, replies: Replies, who: Any, on_answer: Callable[[int, int], None], out: Path | None = None,
    engine: Engine | None = None,
) -> list[Prediction]:  # fmt: skip
    """A prediction of each chosen question, in their order: where, pictures, question, wanted, answer, cut, exact, relaxed, asked;
    with boxes on either side, those of the answer and the wanted ones in px, and the overlap of each wanted one.

    Each goes to `out`, a JSON line, as it comes; what is there already, of `who` and the same questions (`asked` is their hash), is
    not asked again. Raises UserError where `out` holds the answers of others. `engine` reads the wanted boxes.
    """
    hashes = sheet.hashes(who)
    said = {line["asked"]: line for line in read_answers(out)} if out else {}
    if said.keys() - set(hashes):
        raise other_answers(out or Path())
    left = [index for index in sheet.chosen if hashes[index] not in said]
    num_before = len(sheet.chosen) - len(left)
    asked = [sheet.asked[index] for index in left]
    for new in answered(asked, replies([sheet.show(record) for record, _ in asked]), engine) if left else ():
        lines = {hashes[left[number]]: line | {"asked": hashes[left[number]]} for number, line in new.items()}
        if out:
            append_answers(out, list(lines.values()))
        said |= lines
        num_before += len(lines)
        on_answer(num_before, len(sheet.chosen))
    if out and left:  # once all are there, in the meta-file's order
        aside = out.with_name(out.name + ".incoming")
        aside.write_text("", encoding="utf-8")
        append_answers(aside, [said[name] for name in hashes if name in said])
        os.replace(aside, out)
    # A record may have been told since how it is scored; that is no reason to ask again.
    metrics = [{"metric": metric} if (metric := record.metric) else {} for record, _ in sheet.asked]
    return [said[hashes[index]] | metrics[index] for index in sheet.chosen]


def answered(
    asked: Sequence[Question], replies: Iterator[list[Reply]], engine: Engine | None = None
) -> Iterator[dict[int, Prediction]]:  # fmt: skip
    """A prediction of each question by its number, as the replies come; `engine` reads the wanted boxes."""
    for new in replies:
        yield {
            number: prediction(asked[number], answer.text, answer.cut)
            | (box_facts(wanted_boxes(asked[number], engine), answer.boxes) if engine else {})
            | facts
            for number, answer, facts in new
        }


def batches(engine: Engine, batch_size: int, max_new_tokens: int) -> Replies:
    """What a model here says, questions about the same media in a batch, which are read once, else those of like length."""

    def replies(asked: Sequence[Record]) -> Iterator[list[Reply]]:
        by_length = sorted(range(len(asked)), key=lambda index: sum(len(turn.text) for turn in asked[index].turns))
        order = [by_length[place] for place in together([_begins(asked[index]) for index in by_length])]
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            answers = engine.answer_many([asked[index] for index in batch], max_new_tokens)
            yield [(index, answer, {}) for index, answer in zip(batch, answers, strict=True)]

    return replies


def _begins(record: Record) -> Hashable:
    """What a question begins with, as far as is needed to bring together those that may share it."""
    system = [turn.text for turn in record.turns if turn.role == "system"]
    return (record.tools, *system, *((medium.name, medium.height, medium.width) for medium in record.media))


def prediction(question: Question, answer: str, cut: bool) -> Prediction:
    """What is kept of an answer. A thought before it counts neither for it nor against it."""
    record, wanted = question
    said, meant = split_thought(answer)[1], split_thought(wanted)[1]
    return {
        "where": record.where, "pictures": [str(picture.source) for picture in record.pictures],
        "question": " ".join(part for part in record.turns[-1].parts if isinstance(part, str)), "wanted": wanted, "answer": answer,
        "cut": cut, "exact": exact(said, meant), "relaxed": relaxed(said, meant),
    }  # fmt: skip


def _written(record: Record, chat: Chat) -> Record:
    """The record with its boxes as the texts that the model reads and says."""
    boxes = any(turn.boxes for turn in record.turns)
    return replace(record, turns=tuple(chat.written(record.turns))) if boxes else record


def wanted_boxes(question: Question, engine: Engine) -> list[Box]:
    """The boxes of the wanted answer, read as those of the answer are."""
    record, wanted = question
    return engine.boxes(record.turns, wanted) if has_tags(wanted) or has_json(wanted) else []


def box_facts(wanted: Sequence[Box], said: Sequence[Box]) -> dict[str, Any]:
    """What a prediction keeps of boxes; nothing where there are none."""
    if not wanted and not said:
        return {}
    overlaps = [round(overlap, 4) for overlap in pair(areas(wanted), areas(said))]
    return {"boxes": [*map(facts_of, said)], "wanted_boxes": [*map(facts_of, wanted)], "iou": overlaps}


def score(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Questions, exact and relaxed accuracy (0 to 1), empty answers, answers that were cut; where boxes are wanted, how many, how
    many were answered, the mean overlap of the wanted ones and the share of at least HIT.
    """
    number = len(predictions) or 1
    overlaps = [overlap for of in predictions for overlap in of.get("iou", [])]
    said = sum("bbox_2d" in box for of in predictions for box in of.get("boxes", []))
    boxes = {
        "wanted_boxes": len(overlaps), "answered_boxes": said, "mean_iou": round(sum(overlaps) / len(overlaps), 4),
        "iou_at_50": round(sum(overlap >= HIT for overlap in overlaps) / len(overlaps), 4),
    } if overlaps else {}  # fmt: skip
    return {
        "questions": len(predictions),
        "exact_accuracy": round(sum(of["exact"] for of in predictions) / number, 4),
        "relaxed_accuracy": round(sum(of["relaxed"] for of in predictions) / number, 4),
        "empty_answers": sum(not of["answer"].strip() for of in predictions),
        "cut_answers": sum(of["cut"] for of in predictions),
        **boxes,
    }


def _shown(record: Record) -> list[list[str]]:
    """Turns and tools as JSON; a picture by its file and that file's size and time."""

    def shown(part: Any) -> str:
        if isinstance(part, str):
            return part
        if not isinstance(part.source, Source):
            return f"{part.width} x {part.height}"
        _, num_bytes, mtime_ns = sources.stamp(part.source)
        return json.dumps([sources.key(part.source), num_bytes, mtime_ns])

    turns = [[turn.role, *map(shown, turn.parts), *map(str, turn.calls)] for turn in record.turns]
    return turns + [[tool] for tool in record.tools]
