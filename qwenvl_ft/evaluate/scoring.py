"""Asks a model every question of a meta-file and counts what is right: exactly, or by ChartQA's relaxed rule.

Each assistant turn is one question, the turns before it as they stand in the record. Every prediction is kept.

>>> relaxed("16.5", "16"), relaxed("17", "16"), relaxed("ferrari", "Ferrari"), relaxed("", "")
(True, False, True, False)
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from qwenvl_ft.data.records import Record, Turn
from qwenvl_ft.infer.engine import Engine

TOLERANCE = 0.05  # of the wanted number; Source: Masry et al. 2022, ChartQA


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
        {"where": where, "question": " ".join(part for part in turns[-1].parts if isinstance(part, str)), "wanted": wanted,
         "answer": answers[index], "exact": exact(answers[index], wanted), "relaxed": relaxed(answers[index], wanted)}
        for index, (where, turns, wanted) in enumerate(asked)
    ]  # fmt: skip
    number = len(asked) or 1
    scores = {
        "questions": len(asked),
        "exact_accuracy": round(sum(prediction["exact"] for prediction in predictions) / number, 4),
        "relaxed_accuracy": round(sum(prediction["relaxed"] for prediction in predictions) / number, 4),
        "empty_answers": sum(not answer.strip() for answer in answers.values()),
    }
    return scores, predictions


def exact(answer: str, wanted: str) -> bool:
    """The same text, but for white space around it and the case of letters. An empty answer is wrong."""
    return bool(answer.strip()) and answer.strip().casefold() == wanted.strip().casefold()


def relaxed(answer: str, wanted: str) -> bool:
    """Numbers within 5 % of the wanted one, zero exactly; everything else as `exact`."""
    number, target = _number(answer), _number(wanted)
    if number is None or target is None:
        return exact(answer, wanted)
    return abs(number - target) <= TOLERANCE * abs(target)


def _number(text: str) -> float | None:
    """The number that the whole text is, a percent sign and thousands separators allowed."""
    try:
        number = float(text.strip().rstrip("%").replace(",", "").replace("_", "?"))  # 1_6 is no number, but Python's
    except ValueError:
        return None
    return number if abs(number) < float("inf") else None  # "nan" and "infinity" are words here
