"""When an answer counts as right, case by case; the relaxed rule is ChartQA's (Masry et al. 2022)."""

import doctest

import pytest

from qwenvl_ft.evaluate import scoring
from qwenvl_ft.evaluate.scoring import exact, relaxed

RELAXED = [
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
    ("0.0", "0", True),
    ("0.001", "0", False),
    ("0", "0.001", False),
    ("16%", "16", True),
    ("16", "16 %", True),
    ("0.16", "16%", False),
    ("1,234", "1234", True),
    ("1,234,567.8", "1,234,567", True),
    (" 16 ", "16", True),
    ("1.6e1", "16", True),
    ("16 titles", "16", False),
    ("sixteen", "16", False),
    ("League of legends ", "League of Legends", True),
    ("STRASSE", "Straße", True),
    ("League", "League of Legends", False),
    ("nan", "NaN", True),
    ("nan", "5", False),
    ("inf", "inf", True),
    ("inf", "infinity", False),
    ("1e999", "inf", False),
    ("inf", "5", False),
    ("", "", False),
    (" \n", " ", False),
    ("", "0", False),
    ("0", "", False),
    ("%", "0", False),
]


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
