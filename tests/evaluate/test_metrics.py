"""When an answer counts as right, case by case; the relaxed rule is ChartQA's (Masry et al. 2022)."""

import doctest

import pytest

from qwenvl_ft.evaluate import scoring
from qwenvl_ft.evaluate.scoring import exact, relaxed

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
    result = doctest.testmod(scoring)
    assert result.attempted and not result.failed
