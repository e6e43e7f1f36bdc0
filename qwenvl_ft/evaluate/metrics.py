"""What an answer is worth, each metric as it was published; the docstring of each names its source.

A metric turns questions into counts, one row a question, and sums of rows into a value: the same few lines make the value of all
questions, of those of one kind, and of a resample (uncertainty.py). Error rates are no means over questions: edits and letters are
summed first.

>>> relaxed("16.5", "16"), relaxed("17", "16"), relaxed("ferrari", "Ferrari"), relaxed("16%", "0.16"), relaxed("16%", "16")
(True, False, True, True, False)
>>> anls("Hello Wrld", "hello world"), f1("the red car", "a red sports car"), letter("B, as C is red"), letter("b.")
(0.9090909090909091, 0.8, '', 'B')
"""

import importlib
import json
import math
import re
import string
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwenvl_ft.data.records import Box, Record
from qwenvl_ft.data.template import split_thought
from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.evaluate.overlap import HIT, partners

TOLERANCE = 0.05  # of the wanted number; Source: Masry et al. 2022, ChartQA
ANLS_THRESHOLD = 0.5  # Source: Biten et al. 2019, Scene Text Visual Question Answering
MOST_CLASSES = 100  # of answers, and of labels of boxes
OTHER = "(other)"  # the class of an answer that names none, or several
Prediction = dict[str, Any]
Floats = NDArray[np.float64]


def ratio(sums: Floats) -> Floats:
    """(..., 2) sums of what was reached and of what could be -> (...); NaN where nothing could be."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums[..., 0] / sums[..., 1]


@dataclass(frozen=True)
class Metric:
    """`counts` of questions, (Q, K), and the `value` of sums of them, (..., K) -> (...).

    `is_share`: 0 to 1. `is_error`: less is better.
    """

    counts: Callable[[Sequence[Prediction]], Floats]
    value: Callable[[Floats], Floats] = ratio
    is_share: bool = True
    is_error: bool = False


def texts(of: Prediction) -> tuple[str, str]:
    """The answer and what was wanted. A thought before them counts neither for it nor against it."""
    return split_thought(of["answer"])[1], split_thought(of["wanted"])[1]


# ---- of one text ----


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


def edits(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Levenshtein's distance: how many items must be put in, taken out or changed to make one of the other."""
    names = {item: number for number, item in enumerate(dict.fromkeys(other))}
    codes, steps = np.array([names[item] for item in other], np.int64), np.arange(len(other) + 1)
    row = steps
    for number, item in enumerate(one, start=1):
        best = np.minimum(row[1:] + 1, row[:-1] + (codes != names.get(item, -1)))
        row = np.minimum.accumulate(np.concatenate(([number], best)) - steps) + steps
    return int(row[-1])


def anls(answer: str, wanted: str) -> float:
    """DocVQA's: 1 less the edits as a share of the longer text, 0 where that share is half or more; case and the width of white
    space do not count.

    Source: Biten et al. 2019; the lower case and the joined words are those of the evaluation of DocVQA (Mathew et al. 2021).
    """
    answer, wanted = (" ".join(text.lower().split()) for text in (answer, wanted))
    share = edits(answer, wanted) / max(len(answer), len(wanted), 1)
    return 1 - share if share < ANLS_THRESHOLD else 0.0


def f1(answer: str, wanted: str) -> float:
    """SQuAD's: the harmonic mean of precision and recall of the words, without case, punctuation, a, an and the. Chinese, which
    has no spaces, is one word: take `cer` for it.

    Source: Rajpurkar et al. 2016, as its version 2.0 has it of texts in which no word is left: those are 1 if both are, else 0.
    """
    said, meant = _words(answer), _words(wanted)
    common = sum((Counter(said) & Counter(meant)).values())
    if not said or not meant:
        return float(said == meant)
    return 2 * common / (len(said) + len(meant))


def _words(text: str) -> list[str]:
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


LETTER = r"(?<![A-Za-z0-9'])([A-J])(?![A-Za-z0-9'])"
NAMED = re.compile(rf"(?i:answer|option|choice|答案|选择?)(?i:\s+is|是|为)?[\s:：*(\[（]*{LETTER}")
FIRST = re.compile(rf"[\s*(\[（]*{LETTER}[*\s]*[).:\]）、．:：]")  # "B. A cat", "(B)"
ARTICLE = re.compile(r"(?<![A-Za-z0-9'(\[])(?<!ption )(?<!hoice )(?<!nswer )A(?= [a-z])")  # of "A cat", not of "option A is"


def letter(answer: str) -> str:
    """The choice that a free answer makes, A to J: the last that it names as its answer, else the one that it begins with, else the
    only one that stands alone in it; "" where there is none or several. A small letter counts where it is the whole answer.

    Source: the rule of VLMEvalKit (`can_infer_option`) that one option alone may stand there, and that of MMMU that the last one
    named counts. Neither an option's text nor chance is taken for an answer.
    """
    if re.fullmatch(r"\W*[A-Ja-j]\W*", answer):
        return re.sub(r"\W", "", answer).upper()
    answer = ARTICLE.sub("", answer)
    if named := NAMED.findall(answer):
        return str(named[-1])
    if first := FIRST.match(answer):
        return first[1]
    alone = set(re.findall(LETTER, answer))
    return alone.pop() if len(alone) == 1 else ""


def choice(answer: str, wanted: str) -> bool:
    """Whether an answer makes the wanted choice."""
    return bool(letter(answer)) and letter(answer) == letter(wanted)


# ---- of JSON ----

FENCE = re.compile(r"\s*```(?:json)?\s*(.*?)\s*```\s*", re.DOTALL)


def fields(text: str) -> Counter[tuple[str, str]] | None:
    """(path, value) of each leaf of a JSON object or list, fenced or not, with how often it is there; None for other texts. The
    items of a list have its path.

    Source: `JSONParseEvaluator` of Donut (Kim et al. 2022), which compares values as texts. It leaves out what is empty; here
    that nothing is there is an answer, too.
    """
    try:
        value = json.loads(match[1] if (match := FENCE.fullmatch(text)) else text)
    except (ValueError, RecursionError):
        return None
    return Counter(_leaves(value, "")) if isinstance(value, dict | list) else None


def _leaves(value: Any, path: str) -> list[tuple[str, str]]:
    if isinstance(value, dict):
        return [leaf for key, part in value.items() for leaf in _leaves(part, f"{path}.{key}" if path else key)]
    if isinstance(value, list):
        return [leaf for part in value for leaf in _leaves(part, path)]
    return [(path, str(value).strip())]


def by_field(predictions: Sequence[Prediction]) -> dict[str, tuple[int, int]]:
    """(right, wanted) of each path that wanted JSON has."""
    found: dict[str, tuple[int, int]] = {}
    for of in predictions:
        said, meant = map(fields, texts(of))
        for (path, value), count in (meant or Counter()).items():
            right, wanted = found.get(path, (0, 0))
            found[path] = right + min(count, (said or Counter())[path, value]), wanted + count
    return found


def _json(of: Prediction) -> tuple[float, float]:
    """Twice the fields that are right, and the fields on both sides: their ratio is Donut's F1 over all records."""
    said, meant = map(fields, texts(of))
    if meant is None:
        return 0, 0
    said = said or Counter()
    return 2 * (said & meant).total(), said.total() + meant.total()


def _json_valid(of: Prediction) -> tuple[float, float]:
    said, meant = map(fields, texts(of))
    return float(said is not None and meant is not None), float(meant is not None)


# ---- of classes ----


def classes(predictions: Sequence[Prediction]) -> list[str]:
    """The answers that are wanted, each once, the most frequent first."""
    return [name for name, _ in Counter(texts(of)[1].strip().casefold() for of in predictions).most_common()]


def class_of(answer: str, names: Sequence[str]) -> str:
    """The class that an answer is, or the only one that it names; else OTHER."""
    answer = answer.strip().casefold()
    if answer in names:
        return answer
    named = [name for name in names if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", answer)]
    return named[0] if len(named) == 1 else OTHER


def confusion(predictions: Sequence[Prediction]) -> dict[str, dict[str, int]]:
    """How often each wanted class was answered as which."""
    names = classes(predictions)
    table: dict[str, Counter[str]] = {name: Counter() for name in names}
    for of in predictions:
        answer, wanted = texts(of)
        table[wanted.strip().casefold()][class_of(answer, names)] += 1
    return {name: dict(row) for name, row in table.items()}


def _class_counts(predictions: Sequence[Prediction]) -> Floats:
    """(Q, 2 C): whether it is right, and 1, at the wanted class."""
    names = classes(predictions)
    if len(names) > MOST_CLASSES:
        what = f"{len(names):,} different answers are wanted: those are no classes"
        raise UserError(Problem("--metric class", what, "take another metric; the answers are kept"))
    counts = np.zeros((len(predictions), len(names), 2))
    for number, of in enumerate(predictions):
        answer, wanted = texts(of)
        at = names.index(wanted.strip().casefold())
        counts[number, at] = class_of(answer, names) == names[at], 1
    return counts.reshape(len(predictions), -1)


def _mean_over_classes(sums: Floats) -> Floats:
    """Of those classes that are among the questions."""
    shares = ratio(sums.reshape(*sums.shape[:-1], -1, 2))
    there = ~np.isnan(shares)
    means: Floats = np.where(there, shares, 0).sum(-1) / np.maximum(there.sum(-1), 1)
    return means


# ---- of boxes ----


def _iou(of: Prediction) -> tuple[float, float]:
    return sum(of.get("iou", [])), len(of.get("iou", []))


def _iou_at_50(of: Prediction) -> tuple[float, float]:
    return sum(overlap >= HIT for overlap in of.get("iou", [])), len(of.get("iou", []))


def _ap_counts(predictions: Sequence[Prediction]) -> Floats:
    """(Q, 3 L): hits, boxes answered, boxes wanted of each label that is wanted. An answer's box without a label has that of its
    partner, else of the first wanted one. Of more than MOST_CLASSES labels, which are descriptions, all boxes are of one."""
    boxes = [[boxes_of(of, key) for key in ("wanted_boxes", "boxes")] for of in predictions]
    labels = [*dict.fromkeys(_label(box) for wanted, _ in boxes for box in wanted)]
    place = {label: number if len(labels) <= MOST_CLASSES else 0 for number, label in enumerate(labels)}
    labels = labels[: max(place.values(), default=-1) + 1]
    counts = np.zeros((len(predictions), len(labels), 3))
    for row, (wanted, said) in zip(counts, boxes, strict=True):
        found = partners(wanted, said)
        names = [box.label and _label(box) for box in said]
        for target, (at, overlap) in zip(wanted, found, strict=True):
            row[place[_label(target)]] += overlap >= HIT, 0, 1
            if at is not None:
                names[at] = _label(target)
        for name in names:
            name = name or (_label(wanted[0]) if wanted else "")
            if len(labels) < len(place) or name in place:
                row[place.get(name, 0), 1] += 1
    return counts.reshape(len(predictions), -1)


def boxes_of(of: Prediction, key: str) -> list[Box]:
    """A prediction's `boxes` or `wanted_boxes`, without points."""
    return [Box(tuple(box["bbox_2d"]), box["label"]) for box in of.get(key, []) if "bbox_2d" in box]


def _label(box: Box) -> str:
    return box.label.strip().casefold() or "(none)"


def _average_precision(sums: Floats) -> Floats:
    """The area under the curve of precision over recall, the mean over labels. Answers carry no confidence, so the curve has one
    step: recall x precision. Source: COCO's AP at an IoU of 0.5, its interpolation over all points."""
    hits, said, wanted = np.moveaxis(sums.reshape(*sums.shape[:-1], -1, 3), -1, 0)
    there = wanted > 0
    area = hits / np.maximum(wanted, 1) * hits / np.maximum(said, 1)
    return np.where(there.any(-1), np.where(there, area, 0).sum(-1) / np.maximum(there.sum(-1), 1), np.nan)


# ---- all of them ----


def each(pair_of: Callable[[Prediction], tuple[float, float]]) -> Callable[[Sequence[Prediction]], Floats]:
    """Counts of K = 2, question by question."""
    return lambda predictions: np.array([pair_of(of) for of in predictions], np.float64).reshape(-1, 2)


def mean_of(function: Callable[[str, str], float]) -> Callable[[Sequence[Prediction]], Floats]:
    """Counts whose ratio is the mean over questions."""
    return each(lambda of: (function(*texts(of)), 1))


def _errors(split: Callable[[str], Sequence[Any]]) -> Metric:
    """Edits over the length of what is wanted, both summed over all questions; it may pass 1. Source: jiwer, but that any white
    space between words is one space here, at their ends none."""

    def errors(of: Prediction) -> tuple[float, float]:
        answer, wanted = (split(" ".join(text.split())) for text in texts(of))
        return edits(answer, wanted), len(wanted)

    return Metric(each(errors), is_share=False, is_error=True)


METRICS = {
    "exact": Metric(mean_of(exact)),
    "relaxed": Metric(mean_of(relaxed)),
    "anls": Metric(mean_of(anls)),
    "f1": Metric(mean_of(f1)),
    "cer": _errors(str),
    "wer": _errors(str.split),
    "choice": Metric(mean_of(choice)),
    "class": Metric(_class_counts, _mean_over_classes),
    "json": Metric(each(_json)),
    "json_valid": Metric(each(_json_valid)),
    "mean_iou": Metric(each(_iou)),
    "iou_at_50": Metric(each(_iou_at_50)),
    "ap_50": Metric(_ap_counts, _average_precision),
}
DEFAULT, OF_BOXES = ("relaxed", "exact"), ("mean_iou", "iou_at_50", "ap_50")


def check_stated(records: Sequence[Record]) -> None:
    """Raises UserError for metrics that records name and that are not ours: a file of data brings no code."""
    problems = [
        Problem(
            f"{record.where}.metric", f"is {record.metric[:60]!r}, which is none", f"write one of {', '.join(METRICS)}", "metric"
        )
        for record in records
        if record.metric and record.metric not in METRICS
    ]
    if problems:
        raise UserError(*problems)


def metric_named(name: str) -> Metric:
    """A metric of ours, or the mean of `package.module:function`, which takes answer and wanted text. Raises UserError."""
    if name in METRICS:
        return METRICS[name]
    module, _, function_name = name.partition(":")
    if not function_name:
        ours = ", ".join(METRICS)
        raise UserError(Problem(f"--metric {name}", "is none", f"take one of {ours}, or package.module:function of yours"))
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)  # a console script does not look there
    try:
        function = getattr(importlib.import_module(module), function_name)
    except (ImportError, AttributeError) as error:
        fix = "name a module that Python finds from this folder, and a function in it"
        raise UserError(Problem(f"--metric {name}", f"cannot be imported: {error}", fix)) from error

    def value(answer: str, wanted: str) -> float:
        try:
            number = float(function(answer, wanted))
        except Exception as error:
            said = f"failed on answer {answer[:60]!r}, wanted {wanted[:60]!r}: {type(error).__name__}: {error}"
            raise UserError(Problem(f"--metric {name}", said, "let it return a number for every text")) from error
        if not math.isfinite(number):
            raise UserError(Problem(f"--metric {name}", f"returned {number} for {answer[:60]!r}", "let it return a finite number"))
        return number

    return Metric(mean_of(value), is_share=False)
