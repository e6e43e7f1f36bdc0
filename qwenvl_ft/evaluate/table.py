"""One table of all who answered the same questions: each metric with its interval, what controls get, what is chance.

The first is what the others are compared with. A percentage never stands alone: 9 of 20 is 45 %, and anything from 25 to 65.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from qwenvl_ft.evaluate.controls import NAMES, UNSEEN, Control, prior
from qwenvl_ft.evaluate.metrics import (
    DEFAULT,
    OF_BOXES,
    Floats,
    Metric,
    Prediction,
    by_field,
    classes,
    confusion,
    metric_named,
    texts,
)
from qwenvl_ft.evaluate.uncertainty import grouped, interval, paired_p

CHANCE = 0.05  # a p-value below it is taken for a difference
MOST_KINDS = 8  # of answers, and of forms of questions, that have a line
FEW = 3  # questions of a kind that say something
MOST_CONFUSED = 20  # of a confusion table
SENTENCE = re.compile(r"(?<=[.!?。！？])\s*|\s*\n\s*")


@dataclass(frozen=True)
class Column:
    """Who answered, and what; with what was answered under each control. All have the same questions in the same order."""

    name: str
    predictions: Sequence[Prediction]
    controls: dict[Control, Sequence[Prediction]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Scale:
    """A metric, the questions that it is taken of, and the group of each."""

    metric: Metric
    at: Sequence[int]
    groups: Sequence[int]
    seed: int

    def of(self, predictions: Sequence[Prediction]) -> list[Prediction]:
        """Those of its questions."""
        return [predictions[number] for number in self.at]

    def counts(self, predictions: Sequence[Prediction]) -> Floats:
        return grouped(self.metric.counts(self.of(predictions)), _numbered([self.groups[number] for number in self.at]))

    def cell(self, predictions: Sequence[Prediction], other: Sequence[Prediction] | None = None) -> dict[str, Any]:
        """The value with its interval, and the p-value of its difference from `other`'s."""
        counts = self.counts(predictions)
        value = float(self.metric.value(counts.sum(0)))
        if np.isnan(value):
            return {"value": None}
        low, high = interval(counts, self.metric, self.seed) or (None, None)
        cell = {"value": value, "low": low, "high": high}
        return cell if other is None else cell | {"p": paired_p(counts, self.counts(other), self.metric.value, self.seed)}


def tabulate(columns: Sequence[Column], names: Sequence[str], seed: int) -> dict[str, Any]:
    """For a program: `rows` (a metric and a model each), the scores `by_answer` and `by_question` under the first metric, `words`
    for what a reader must not miss, and the confusion of classes or the share of each JSON field where those are asked for.

    No `names`: those of boxes where any are wanted, then relaxed and exact; but of questions whose record says so, the metric that
    it names. Raises UserError for a metric that there is not.
    """
    first = columns[0].predictions
    groups = groups_of(first)
    scales = {name: _Scale(metric_named(name), at, groups, seed) for name, at in _asked_for(first, names).items()}
    rows = [_row(name, scale, column, columns[0]) for name, scale in scales.items() for column in columns]
    first_name, main = next(iter(scales.items()))
    forms = forms_of([of["question"] for of in first])
    table: dict[str, Any] = {
        "questions": len(first), "groups": len(set(groups)), "rows": rows,
        "words": [word for row in rows if row["metric"] == first_name for word in _words(row, main.metric)],
        "by_answer": _by([of["wanted"] for of in first], columns, main), "by_question": _by(forms, columns, main),
    }  # fmt: skip
    if "class" in scales and len(classes(scales["class"].of(first))) <= MOST_CONFUSED:
        table["confusion"] = {column.name: confusion(scales["class"].of(column.predictions)) for column in columns}
    if "json" in scales:
        table["fields"] = {column.name: by_field(scales["json"].of(column.predictions)) for column in columns}
    return table


def _asked_for(first: Sequence[Prediction], names: Sequence[str]) -> dict[str, list[int]]:
    """Each metric, with the places of the questions that it is taken of."""
    everywhere = list(range(len(first)))
    if names:
        return dict.fromkeys(names, everywhere)
    boxes = OF_BOXES if any(of.get("iou") for of in first) else ()
    if not any("metric" in of for of in first):
        return dict.fromkeys((*boxes, *DEFAULT), everywhere)
    stated: dict[str, list[int]] = {}
    for number, of in enumerate(first):
        for name in [of["metric"]] if "metric" in of else (*(boxes if of.get("iou") else ()), *DEFAULT):
            stated.setdefault(name, []).append(number)
    return stated


def _row(name: str, scale: _Scale, column: Column, first: Column) -> dict[str, Any]:
    own = column.predictions
    row: dict[str, Any] = {"metric": name, "questions": len(scale.at), "model": column.name} | scale.cell(
        own, None if column is first else first.predictions
    )
    for control, predictions in (*column.controls.items(), ("prior", prior(own))):
        row[control] = scale.cell(predictions, own)
    if shuffled := column.controls.get("shuffled"):
        with_pictures = [(of, other) for of, other in zip(scale.of(own), scale.of(shuffled), strict=True) if of["pictures"]]
        row["shuffled"]["answers_changed"] = sum(texts(of)[0] != texts(other)[0] for of, other in with_pictures)
        row["shuffled"]["of"] = len(with_pictures)
    return row


def _words(row: dict[str, Any], metric: Metric) -> list[str]:
    """What a reader must not miss of a model."""
    found = []
    for control, name in NAMES.items():
        cell = row.get(control, {})
        if row["value"] is None or cell.get("value") is None:
            continue
        better = (cell["value"] - row["value"]) * (1 if metric.is_error else -1) > 0
        if control not in UNSEEN:
            if better and cell["p"] < CHANCE:
                found.append(f"{row['model']} is worse with the {name}: {shown(cell, metric)} against {shown(row, metric)}, "
                             f"p = {cell['p']:.2g}; ask it as it was taught, or teach both with media_position: both")  # fmt: skip
        elif not better or cell["p"] >= CHANCE:
            against = "what the commonest answer gets" if control == "prior" else f"with {name}"
            sure = "no better" if not better else "not surely better"
            found.append(f"{row['model']} is {sure} than {against}: {shown(row, metric)} against {shown(cell, metric)}, "
                         f"p = {cell['p']:.2g}")  # fmt: skip
    if changed := row.get("shuffled"):
        found.append(f"{row['model']} gave another answer to {changed['answers_changed']} of {changed['of']} questions over other "
                     "pictures")  # fmt: skip
    return found


def _by(kinds: Sequence[str], columns: Sequence[Column], scale: _Scale) -> list[dict[str, Any]]:
    """The scores of the questions of each kind, the most frequent kinds first."""
    found = []
    for kind, count in Counter(kinds[number] for number in scale.at).most_common(MOST_KINDS):
        part = replace(scale, at=[number for number in scale.at if kinds[number] == kind])
        scores = {column.name: part.cell(column.predictions) for column in columns}
        found.append({"kind": kind, "questions": count, "scores": scores})
    return found


def groups_of(predictions: Sequence[Prediction]) -> list[int]:
    """The number of each question's group: those about one picture, else those of one record."""
    return _numbered([(of["pictures"] or [of["where"].rpartition(".conversations[")[0]])[0] for of in predictions])


def _numbered(keys: Sequence[Any]) -> list[int]:
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return [numbers[key] for key in keys]


def forms_of(asked: Sequence[str]) -> list[str]:
    """The form of each question: those of its sentences and lines that other questions have, too, else its first two words."""
    parts = [[part for part in SENTENCE.split(text.strip()) if part] for text in asked]
    known = Counter(part for of in parts for part in set(of))
    shared = [" ".join(part for part in of if known[part] > 1) for of in parts]
    return [form or " ".join(text.split()[:2])[:20] + " ..." for form, text in zip(shared, asked, strict=True)]


# ---- for a reader ----


def shown(cell: dict[str, Any], metric: Metric) -> str:
    """A value and its interval."""
    return range_shown(cell, metric.is_share)


def range_shown(cell: dict[str, Any], is_share: bool) -> str:
    """A value and its interval, in percent or as they are."""
    if cell["value"] is None:
        return "-"
    scale, digits, unit = (100, 1, "%") if is_share else (1, 3, "")
    value, low, high = (None if of is None else f"{of * scale:.{digits}f}" for of in (cell["value"], cell["low"], cell["high"]))
    return f"{value}{unit} ({f'{low} to {high}' if low else 'no interval'})"


def sections(table: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, head, rows) of each table that a reader sees; the first is the one that counts."""
    models = list(dict.fromkeys(row["model"] for row in table["rows"]))
    metrics = {row["metric"]: metric_named(row["metric"]) for row in table["rows"]}
    controls = {name: title for name, title in NAMES.items() if name in table["rows"][0]}
    several, mixed = len(models) > 1, any(row["questions"] < table["questions"] for row in table["rows"])
    head = [
        "metric",
        *["questions"] * mixed,
        *["model"] * several,
        "score (95 %)",
        *[f"p, against {models[0]}"] * several,
        *controls.values(),
    ]
    lines = []
    for row in table["rows"]:
        metric = metrics[row["metric"]]
        against = f"{row['p']:.2g}" if "p" in row else ""
        cells = [
            row["metric"],
            *[f"{row['questions']:,}"] * mixed,
            *[row["model"]] * several,
            shown(row, metric),
            *[against] * several,
        ]
        lines.append([*cells, *(shown(row[name], metric) for name in controls)])
    found = [(f"{table['questions']:,} questions about {table['groups']:,} pictures or records", head, lines)]
    name, metric = next(iter(metrics.items()))
    for key, title in (("by_question", "form of the question"), ("by_answer", "wanted answer")):
        kinds = [[_short(of["kind"]), f"{of['questions']:,}", *(shown(of["scores"][model], metric) for model in models)]
                 for of in table[key] if of["questions"] >= FEW]  # fmt: skip
        found += [(f"{name} by {title}", [title, "questions", *models], kinds)] if kinds else []
    for model, rows in table.get("confusion", {}).items():
        answered = list(dict.fromkeys([*rows, *(name for row in rows.values() for name in row)]))
        cells = [[_short(wanted), *(str(row.get(name, 0)) for name in answered)] for wanted, row in rows.items()]
        found.append((f"what {model} answered", ["wanted", *map(_short, answered)], cells))
    if per_model := table.get("fields"):
        cells = [[path, *(f"{right:,} of {wanted:,}" for right, wanted in (of[path] for of in per_model.values()))]
                 for path in per_model[models[0]]]  # fmt: skip
        found.append(("fields that are right", ["field", *models], cells))
    return found


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


def markdown(table: dict[str, Any]) -> str:
    """The tables and the words, as they are written beside the answers."""
    parts = []
    for number, (title, head, rows) in enumerate(sections(table)):
        cells = [head, ["---"] * len(head), *rows]
        lines = ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in cells]
        parts += [f"{'#' if number == 0 else '##'} {title}", "\n".join(lines)]
        if number == 0 and table["words"]:
            parts.append("\n".join(f"* {word}" for word in table["words"]))
    return "\n\n".join(parts) + "\n"
