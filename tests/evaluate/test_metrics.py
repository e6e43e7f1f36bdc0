"""What an answer is worth, case by case, worked out by hand from the published definitions."""

import doctest
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenvl_ft.errors import UserError
from qwenvl_ft.evaluate import metrics
from qwenvl_ft.evaluate.metrics import METRICS, edits, exact, metric_named, relaxed

RELAXED = [  # each worked out by hand from the published rule
    # answer, wanted, right
    ("105", "100", True),
    ("95", "100", True),
    ("105.1", "100", False),
    ("94.9", "100", False),
    ("-105", "-100", True),
    ("-94.9", "-100", False),
    ("-100", "100", False),
    ("100", "105.3", False),  # 5 % of the wanted number, not of the answer
    ("0", "0", True),
    ("0.0", "0", False),  # what is wanted as 0 has no 5 %: the same text
    ("0", "0.0", False),
    ("0%", "0%", True),
    ("0", "0%", False),
    ("0.001", "0", False),
    ("0", "0.001", False),
    ("16%", "16", False),  # percent is a hundredth
    ("16", "16 %", False),
    ("16", "16%", False),
    ("0.16", "16%", True),
    ("16.5 %", "16%", True),
    ("17%", "16%", False),
    ("1,234", "1234", False),  # thousands separators are not read
    ("1,234", "1,234", True),
    ("1,234", "1,235", False),
    ("1,234,567.8", "1,234,567", False),
    ("1_6", "16", True),  # as Python reads it
    (" 16 ", "16", True),
    ("1.6e1", "16", True),
    ("16 titles", "16", False),
    ("sixteen", "16", False),
    ("League of legends ", "League of Legends", True),
    ("STRASSE", "Straße", False),
    ("League", "League of Legends", False),
    ("nan", "5", False),
    ("inf", "inf", False),  # inf - inf is no 5 %
    ("1e999", "inf", False),
    ("inf", "5", False),
    ("", "", False),  # ours: an empty answer is wrong; no record wants one
    (" \n", " ", False),
    ("", "0", False),
    ("0", "", False),
    ("%", "0", False),
    ("%", "%", True),
]


def published(prediction: str, target: str, max_relative_change: float = 0.05) -> bool:
    """`relaxed_correctness` as pix2struct and Qwen-VL's evaluation have it, word for word but for the strip before it."""

    def _to_float(text):
        try:
            if text.endswith("%"):
                # Convert percentages to floats.
                return float(text.rstrip("%")) / 100.0
            else:
                return float(text)
        except ValueError:
            return None

    prediction, target = prediction.strip(), target.strip()
    prediction_float = _to_float(prediction)
    target_float = _to_float(target)
    if prediction_float is not None and target_float:
        relative_change = abs(prediction_float - target_float) / abs(target_float)
        return relative_change <= max_relative_change
    else:
        return prediction.lower() == target.lower()


def test_relaxed_is_the_published_rule_whatever_is_said():
    """It forgave a percent sign, separators and a point behind a 0, which the published rule does not."""
    said = {text for pair in RELAXED for text in pair[:2]} | {f"{sign}{n}{unit}" for sign in ("", "-") for n in (0, 1, 95, 100.5)
                                                              for unit in ("", "%", " %", "%%", " m")}  # fmt: skip
    for answer in (text for text in said if text.strip()):
        for wanted in said:
            assert relaxed(answer, wanted) is published(answer, wanted), (answer, wanted)


@pytest.mark.parametrize(("answer", "wanted", "right"), RELAXED)
def test_the_relaxed_rule(answer, wanted, right):
    assert relaxed(answer, wanted) is right


@pytest.mark.parametrize(
    ("answer", "wanted", "right"),
    [("16", "16", True), (" Ferrari\n", "ferrari", True), ("16.0", "16", False), ("16%", "16", False), ("", "", False)],
)
def test_the_exact_rule_forgives_case_and_white_space_only(answer, wanted, right):
    assert exact(answer, wanted) is right


def test_the_examples_in_the_docstrings_hold():
    result = doctest.testmod(metrics)
    assert result.attempted and not result.failed


# ---- the other metrics, worked out by hand from their published definitions ----

ANLS = [  # Biten et al. 2019: 1 - edits / longer, 0 from a half on; lower case, single spaces
    ("hello world", "Hello  World", 1),
    ("hello wrld", "hello world", 1 - 1 / 11),
    ("abcd", "abxy", 0),  # 2 of 4 is a half
    ("abcde", "abxye", 1 - 2 / 5),
    ("a", "abc", 0),
    ("", "abc", 0),
    ("北京市", "北京", 1 - 1 / 3),
]
F1 = [  # SQuAD: words without case, punctuation, articles
    ("The red car.", "a red car", 1),
    ("red", "the red car", 2 * 1 * 0.5 / 1.5),
    ("red red", "red car", 0.5),  # a word counts as often as it is there
    ("blue", "red", 0),
    ("the", "a", 1),  # version 2.0: no word on either side
    ("the", "red", 0),
    ("U.S.", "us", 1),
]
CHOICE = [
    ("B", "B", True), ("b.", "B", True), ("(B)", "B", True), ("B. A red car", "B", True), ("The answer is B.", "B", True),
    ("A cat is shown, so C", "C", True), ("A", "A", True), ("Option A is right", "A", True), ("I rule out A and C. Answer: D", "D", True),
    ("答案是B", "B", True), ("选C。", "C", True), ("**D**", "D", True), ("B) because C is red", "B", True), ("B", "(B) a car", True),
    ("A or B", "A", False), ("no idea", "A", False), ("", "A", False), ("I'd say it is red", "I", False), ("C", "B", False),
    ("The vitamin is C", "C", True), ("A red car", "A", False), ("a red car", "A", False),
]  # fmt: skip


@pytest.mark.parametrize(
    ("metric", "answer", "wanted", "value"),
    [(metric, *case) for metric, cases in ((metrics.anls, ANLS), (metrics.f1, F1), (metrics.choice, CHOICE)) for case in cases],
)
def test_a_metric_of_one_text(metric, answer, wanted, value):
    assert metric(answer, wanted) == pytest.approx(value)


def plain_edits(one, other):
    """Wagner and Fischer's table, cell by cell."""
    table = [[row + column if not row * column else 0 for column in range(len(other) + 1)] for row in range(len(one) + 1)]
    for row in range(1, len(one) + 1):
        for column in range(1, len(other) + 1):
            changed = table[row - 1][column - 1] + (one[row - 1] != other[column - 1])
            table[row][column] = min(table[row - 1][column] + 1, table[row][column - 1] + 1, changed)
    return table[-1][-1]


@settings(max_examples=200, deadline=None)
@given(st.text("abc", max_size=12), st.text("abc", max_size=12))
def test_edits_are_those_of_the_textbook(one, other):
    assert edits(one, other) == plain_edits(one, other) == edits(list(one), list(other))


def value(name, *pairs, **more):
    """A metric's value of (answer, wanted) pairs."""
    predictions = [{"answer": answer, "wanted": wanted, **more} for answer, wanted in pairs]
    metric = METRICS[name]
    return float(metric.value(metric.counts(predictions).sum(0)))


def test_error_rates_are_edits_over_all_that_is_wanted():
    """jiwer's: summed before they are divided, so that a long text counts for more; more errors than letters pass 1."""
    assert value("cer", ("abc", "abd"), ("x" * 10, "x" * 9)) == pytest.approx(2 / 12)
    assert value("wer", ("the cat sat", "the cat sat on"), ("a", "b")) == pytest.approx(2 / 5)
    assert value("cer", ("  a   b ", "a b")) == 0 and value("cer", ("aaaa", "b")) == 4
    assert value("cer", ("Abc", "abc")) == pytest.approx(1 / 3)


def test_fields_of_json_are_scored_as_donut_does():
    """2 of 3 fields said are right, 2 of 4 wanted are found: F1 of 4/7, over all records together."""
    wanted = '{"shop": "Rewe", "items": [{"name": "tea", "price": 2}, {"name": "jam"}]}'
    answer = '```json\n{"shop": "Rewe", "items": [{"name": "tea", "price": "3"}]}\n```'
    assert value("json", (answer, wanted)) == pytest.approx(4 / 7)
    assert value("json", (answer, wanted), ('{"a": 1}', '{"a": 1}')) == pytest.approx(6 / 9)
    assert value("json", ('{"price": "2 "}', '{"price": 2}')) == 1, "values are compared as texts"
    assert value("json", ('{"a": [1, 1]}', '{"a": [1, 2]}')) == pytest.approx(0.5), "a value counts as often as it is there"
    assert value("json", ("no json", wanted)) == 0 and value("json_valid", ("no json", wanted), ("{}", wanted)) == 0.5
    assert value("json_valid", ("3", wanted), ("[]", wanted), ("no", "text")) == 0.5, "a bare number is no document"
    found = metrics.by_field([{"answer": answer, "wanted": wanted}, {"answer": "", "wanted": '{"shop": "Aldi"}'}])
    assert found == {"shop": (1, 2), "items.name": (1, 2), "items.price": (0, 1)}


def test_class_accuracy_is_the_mean_over_classes_and_confusions_are_counted():
    """scikit-learn's balanced_accuracy_score: a class of four with three right, one of one with none."""
    pairs = [("cat", "cat"), ("Cat.", "cat"), ("It is a cat", "cat"), ("a dog", "cat"), ("cat or dog", "dog")]
    assert value("class", *pairs) == pytest.approx((3 / 4 + 0) / 2)
    predictions = [{"answer": answer, "wanted": wanted} for answer, wanted in pairs]
    assert metrics.confusion(predictions) == {"cat": {"cat": 3, "dog": 1}, "dog": {"(other)": 1}}
    assert metrics.class_of("catalogue", ["cat"]) == "(other)", "a class is a word of its own"


def boxes(*corners_and_labels):
    return [{"bbox_2d": list(corners), "label": label} for corners, label in corners_and_labels]


ONE, TWO, FAR = (0, 0, 10, 10), (20, 0, 30, 10), (80, 80, 90, 90)
AP = {  # wanted, answered, the mean over labels of recall x precision at an IoU of 0.5
    "all of them": ([(ONE, "a"), (TWO, "a")], [(TWO, "a"), (ONE, "a")], 1),
    "one of two": ([(ONE, "a"), (TWO, "a")], [(ONE, "a")], 1 / 2 * 1),
    "one too many": ([(ONE, "a")], [(ONE, "a"), (FAR, "a")], 1 * 1 / 2),
    "half an overlap": ([(ONE, "a")], [((0, 0, 10, 5), "a")], 1),
    "less than half": ([(ONE, "a")], [((0, 0, 10, 4.9), "a")], 0),
    "two labels": ([(ONE, "a"), (TWO, "b")], [(ONE, "a"), (FAR, "b")], (1 + 0) / 2),
    "a label that none has": ([(ONE, "a")], [(ONE, "a"), (TWO, "z")], 1),  # as COCO has it: no class of the set
    "no label": ([(ONE, "a"), (TWO, "b")], [(TWO, ""), (FAR, "")], (0 + 1) / 2),  # TWO is b's; FAR is taken for an a
    "none": ([(ONE, "a")], [], 0),
}


@pytest.mark.parametrize("name", AP)
def test_average_precision(name):
    wanted, said, expected = AP[name]
    assert value("ap_50", ("", ""), wanted_boxes=boxes(*wanted), boxes=boxes(*said)) == pytest.approx(expected)


def test_descriptions_are_no_classes():
    """Referring expressions have a label each: a table of labels would grow with the square of the records."""
    corners = [(20 * number, 0, 20 * number + 10, 10) for number in range(101)]
    wanted = [(of, f"thing {number}") for number, of in enumerate(corners)]
    said = [*wanted[:50], (FAR, "another thing")]
    assert value("ap_50", ("", ""), wanted_boxes=boxes(*wanted), boxes=boxes(*said)) == pytest.approx(50 / 101 * 50 / 51)
    fewer = value("ap_50", ("", ""), wanted_boxes=boxes(*wanted[:100]), boxes=boxes(*said))
    assert fewer == pytest.approx(50 / 100), "of 100 labels half are found, each without one too many"
    with pytest.raises(UserError, match="101 different answers are wanted"):
        value("class", *(("x", str(number)) for number in range(101)))


def test_a_metric_of_ones_own_is_a_function_of_two_texts(tmp_path, monkeypatch):
    (tmp_path / "of_mine.py").write_text("def first(answer, wanted):\n    return answer[:1] == wanted[:1]\n\n\n"
                                         "def broken(answer, wanted):\n    return 1 / 0\n\n\ndef text(*_):\n    return 'x'\n\n\n"
                                         "def endless(*_):\n    return float('nan')\n")  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    metric = metric_named("of_mine:first")
    assert metric.counts([{"answer": "ab", "wanted": "ac"}, {"answer": "<think>\nz\n</think>\n\nb", "wanted": "c"}]).tolist() == [
        [1, 1], [0, 1],
    ]  # fmt: skip
    for name, said in (
        ("of_mine:broken", "ZeroDivisionError"),
        ("of_mine:text", "ValueError"),
        ("of_mine:endless", "returned nan"),
    ):
        with pytest.raises(UserError, match=said):
            metric_named(name).counts([{"answer": "a", "wanted": "b"}])
    for name, said in (("of_mine:none", "cannot be imported"), ("nowhere:f", "cannot be imported"), ("bleu", "is none")):
        with pytest.raises(UserError, match=said):
            metric_named(name)
