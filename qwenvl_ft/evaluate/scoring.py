"""Asks a model every question of a meta-file and counts what is right: exactly, or by ChartQA's relaxed rule.

Each assistant turn is one question, the turns before it as they stand in the record. Every prediction is kept. Where boxes are
wanted, how well those of the answer lie on them is counted, too (overlap.py); both are read out of the texts in the same way.

>>> relaxed("16.5", "16"), relaxed("17", "16"), relaxed("ferrari", "Ferrari"), relaxed("16%", "0.16"), relaxed("16%", "16")
(True, False, True, True, False)
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qwenvl_ft.data import sources
from qwenvl_ft.data.box_marks import HINT, JSON_HINT
from qwenvl_ft.data.boxes import facts_of
from qwenvl_ft.data.chat import Chat
from qwenvl_ft.data.records import Box, Record, Source
from qwenvl_ft.data.template import split_thought
from qwenvl_ft.evaluate.overlap import HIT, areas, pair
from qwenvl_ft.folders.whole import short_hash
from qwenvl_ft.infer.batch_file import append_answers, other_answers, read_answers
from qwenvl_ft.infer.engine import Engine

TOLERANCE = 0.05  # of the wanted number; Source: Masry et al. 2022, ChartQA
Question = tuple[Record, str]


def questions(records: Sequence[Record], chat: Chat | None = None) -> Iterator[Question]:
    """(the record as far as before the answer, the wanted answer) of each assistant turn, but of those that are not to be learnt.
    Calls of tools are wanted as `chat` writes them.
    """
    for record in records:
        for number, turn in enumerate(record.turns):
            if turn.role == "assistant" and turn.taught:
                asked = Record(f"{record.where}.conversations[{number}]", record.turns[:number], record.tools)
                yield asked, chat.answer_of(turn) if chat and turn.calls else turn.text


def evaluate(
    engine: Engine, records: Sequence[Record], batch_size: int, max_new_tokens: int, on_answer: Callable[[int, int], None],
    out: Path | None = None, who: str = "",
) -> tuple[dict[str, Any], list[dict[str, Any]]]:  # fmt: skip
    """(scores, predictions). Scores: questions, exact and relaxed accuracy (0 to 1), empty answers, answers that were cut; where
    boxes are wanted, how many, how many were answered, the mean overlap of the wanted ones and the share of at least HIT.

    A prediction: where, pictures, question, wanted, answer, cut, exact, relaxed, asked; with boxes on either side, those of the
    answer and the wanted ones in px, and the overlap of each wanted one. Order is the meta-file's. Each goes to
    `out`, a JSON line, as it comes; what is there already, of `who` and the same questions (`asked` is their hash), is not asked
    again. Raises UserError where `out` holds the answers of others.
    """
    asked = list(questions([_written(record, engine) for record in records], engine.chat))
    hashes = [short_hash([who, max_new_tokens, record.where, _shown(record), wanted]) for record, wanted in asked]
    said = {line["asked"]: line for line in read_answers(out)} if out else {}
    if said.keys() - set(hashes):
        raise other_answers(out or Path())
    left = [index for index, name in enumerate(hashes) if name not in said]
    left.sort(key=lambda index: sum(len(turn.text) for turn in asked[index][0].turns))
    for start in range(0, len(left), batch_size):  # questions of like length share a batch
        batch = left[start : start + batch_size]
        answers = engine.answer_many([asked[index][0] for index in batch], max_new_tokens)
        new = {
            hashes[index]: prediction(asked[index], answer.text, answer.cut)
            | box_facts(wanted_boxes(asked[index], engine), answer.boxes)
            | {"asked": hashes[index]}
            for index, answer in zip(batch, answers, strict=True)
        }
        if out:
            append_answers(out, list(new.values()))
        said |= new
        on_answer(len(said), len(asked))
    predictions = [said[name] for name in hashes]
    if out and left:  # once all are there, in the meta-file's order
        aside = out.with_name(out.name + ".incoming")
        aside.write_text("", encoding="utf-8")
        append_answers(aside, predictions)
        os.replace(aside, out)
    return score(predictions), predictions


def prediction(question: Question, answer: str, cut: bool) -> dict[str, Any]:
    """What is kept of an answer. A thought before it counts neither for it nor against it."""
    record, wanted = question
    said, meant = split_thought(answer)[1], split_thought(wanted)[1]
    return {
        "where": record.where, "pictures": [str(picture.source) for picture in record.pictures],
        "question": " ".join(part for part in record.turns[-1].parts if isinstance(part, str)), "wanted": wanted, "answer": answer,
        "cut": cut, "exact": exact(said, meant), "relaxed": relaxed(said, meant),
    }  # fmt: skip


def _written(record: Record, engine: Engine) -> Record:
    """The record with its boxes as the texts that the model reads and says."""
    boxes = any(isinstance(part, Box) for turn in record.turns for part in turn.parts)
    return replace(record, turns=tuple(engine.chat.written(record.turns))) if boxes else record


def wanted_boxes(question: Question, engine: Engine) -> list[Box]:
    """The boxes of the wanted answer, read as those of the answer are."""
    record, wanted = question
    return engine.boxes(record.turns, wanted) if HINT.search(wanted) or JSON_HINT.search(wanted) else []


def box_facts(wanted: Sequence[Box], said: Sequence[Box]) -> dict[str, Any]:
    """What a prediction keeps of boxes; nothing where there are none."""
    if not wanted and not said:
        return {}
    overlaps = [round(overlap, 4) for overlap in pair(areas(wanted), areas(said))]
    return {"boxes": [*map(facts_of, said)], "wanted_boxes": [*map(facts_of, wanted)], "iou": overlaps}


def score(predictions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The scores of `evaluate`."""
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

    return [[turn.role, *map(shown, turn.parts), *turn.calls] for turn in record.turns] + [[tool] for tool in record.tools]


def exact(answer: str, wanted: str) -> bool:
    """The same text, but for white space around it and the case of letters. An empty answer is wrong."""
    return bool(answer.strip()) and answer.strip().casefold() == wanted.strip().casefold()


def relaxed(answer: str, wanted: str) -> bool:
    """ChartQA's relaxed correctness as it is published: numbers within 5 % of the wanted one, percent a hundredth; everything else,
    and all that is wanted as 0, the same text but for case. An empty answer is wrong.

    Source: Masry et al. 2022, and the evaluation of pix2struct and Qwen-VL (`relaxed_correctness`), which read no thousands
    separators, nor units.
    """
    answer, wanted = answer.strip(), wanted.strip()
    number, target = _number(answer), _number(wanted)
    if number is not None and target:
        return abs(number - target) / abs(target) <= TOLERANCE
    return bool(answer) and answer.lower() == wanted.lower()


def _number(text: str) -> float | None:
    """The number that Python reads in the whole text."""
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
