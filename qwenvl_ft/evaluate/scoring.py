"""Asks a model every question of a meta-file and counts what is right.

Each assistant turn is one question, the turns before it as they stand in the record. Every prediction is kept.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from qwenvl_ft.data.records import Record, Turn
from qwenvl_ft.evaluate.metrics import exact, relaxed
from qwenvl_ft.infer.engine import Engine


def questions(records: Sequence[Record]) -> Iterator[tuple[str, tuple[Turn, ...], str]]:
    """(where, the turns before the answer, the wanted answer) of each assistant turn."""
    for record in records:
        for number, turn in enumerate(record.turns):
            if turn.role == "assistant":
                yield f"{record.where}.conversations[{number}]", record.turns[:number], turn.text


def evaluate(
    engine: Engine, records: Sequence[Record], batch_size: int, max_new_tokens: int, on_answer: Callable[[int, int], None]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(scores, predictions). Scores: questions, exact and relaxed accuracy (0 to 1), empty answers.

    A prediction: where, question, wanted, answer, exact, relaxed. Order is the meta-file's.
    """
    asked = list(questions(records))
    order = sorted(range(len(asked)), key=lambda index: sum(len(turn.text) for turn in asked[index][1]))
    answers: dict[int, str] = {}
    for start in range(0, len(order), batch_size):  # questions of like length share a batch
        batch = order[start : start + batch_size]
        answers.update(zip(batch, engine.ask_many([asked[index][1] for index in batch], max_new_tokens), strict=True))
        on_answer(len(answers), len(asked))
    predictions: list[dict[str, Any]] = [
        {"where": where, "question": _last_text(turns), "wanted": wanted, "answer": answers[index],
         "exact": exact(answers[index], wanted), "relaxed": relaxed(answers[index], wanted)}
        for index, (where, turns, wanted) in enumerate(asked)
    ]  # fmt: skip
    scores = {
        "questions": len(asked),
        "exact_accuracy": _share([prediction["exact"] for prediction in predictions]),
        "relaxed_accuracy": _share([prediction["relaxed"] for prediction in predictions]),
        "empty_answers": sum(not answer.strip() for answer in answers.values()),
    }
    return scores, predictions


def _last_text(turns: Sequence[Turn]) -> str:
    return " ".join(part for part in turns[-1].parts if isinstance(part, str))


def _share(right: Sequence[bool]) -> float:
    return round(sum(right) / len(right), 4) if right else 0.0
