"""Intervals and p-values against closed forms: the binomial, McNemar's exact test, Clopper and Pearson's."""

import math

import numpy as np
import pytest

from qwenvl_ft.evaluate.metrics import METRICS, Metric
from qwenvl_ft.evaluate.uncertainty import grouped, interval, paired_p

MEAN = METRICS["exact"]


def right(*answers):
    """Counts of questions that are right or wrong, a group each."""
    return np.array([[answer, 1] for answer in answers], float)


def binomial_quantile(number, share, level):
    """The smallest count with this much of the binomial at or below it."""
    below = 0.0
    for count in range(number + 1):
        below += math.comb(number, count) * share**count * (1 - share) ** (number - count)
        if below >= level:
            return count


@pytest.mark.parametrize(("number", "hits"), [(20, 9), (60, 33), (400, 20)])
def test_an_interval_is_that_of_the_binomial_which_the_bootstrap_of_right_and_wrong_is(number, hits):
    low, high = interval(right(*[1] * hits, *[0] * (number - hits)), MEAN, seed=0)
    exact = [binomial_quantile(number, hits / number, level) for level in (0.025, 0.975)]
    assert [low * number, high * number] == pytest.approx(exact, abs=1)
    assert low < hits / number < high


def test_an_interval_of_means_is_as_wide_as_the_normal_one():
    values = np.random.default_rng(1).normal(5, 2, 2000)
    low, high = interval(np.stack([values, np.ones(2000)], 1), Metric(lambda _: values, is_share=False), seed=0)
    half = 1.96 * values.std() / math.sqrt(2000)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=half * 0.12)


def test_an_interval_comes_from_a_seed():
    counts = right(*[1] * 30, *[0] * 33)
    assert interval(counts, MEAN, 3) == interval(counts, MEAN, 3)
    values = np.stack([np.random.default_rng(0).random(50), np.ones(50)], 1)
    assert interval(values, MEAN, 3) != interval(values, MEAN, 4)


@pytest.mark.parametrize("number", [1, 5, 20])
def test_where_all_is_wrong_or_right_the_interval_is_clopper_and_pearsons(number):
    """A bootstrap of twenty wrong answers is 0 to 0, as if nothing could be learnt from a twenty-first."""
    low, high = interval(right(*[0] * number), MEAN, 0)
    assert low == 0 and (1 - high) ** number == pytest.approx(0.025)
    low, high = interval(right(*[1] * number), MEAN, 0)
    assert high == 1 and low**number == pytest.approx(0.025)


def test_there_is_no_interval_of_one_group_or_of_nothing():
    assert interval(np.array([[1.0, 2.0]]), MEAN, 0) is None
    assert interval(np.array([[0.0, 0.0]] * 3), MEAN, 0) is None


def test_questions_about_one_picture_make_an_interval_wider():
    """Ten questions about each of six pictures are not sixty that know nothing of each other."""
    answers = right(*([1] * 10 + [0] * 10) * 3)
    alone, together = (interval(grouped(answers, groups), MEAN, 0) for groups in (range(60), np.arange(60) // 10))
    assert together[1] - together[0] > 2 * (alone[1] - alone[0])


def mcnemar(only_one, only_other):
    """The two-sided exact test, from the binomial of a half."""
    number, least = only_one + only_other, min(only_one, only_other)
    return min(1.0, 2 * sum(math.comb(number, count) for count in range(least + 1)) / 2**number)


@pytest.mark.parametrize(("only_one", "only_other"), [(0, 0), (5, 0), (6, 1), (4, 4), (9, 3), (25, 9), (60, 40)])
def test_a_p_value_of_right_and_wrong_is_mcnemars(only_one, only_other):
    one = right(*[1] * only_one, *[0] * only_other, *[1] * 7, *[0] * 5)
    other = right(*[0] * only_one, *[1] * only_other, *[1] * 7, *[0] * 5)
    p = paired_p(one, other, MEAN.value, seed=0)
    exact = only_one + only_other < 13
    assert p == pytest.approx(mcnemar(only_one, only_other), abs=1e-12 if exact else 0.01)
    assert p == paired_p(one, other, MEAN.value, seed=0)


def test_a_p_value_of_an_error_rate_swaps_whole_groups():
    """Three groups, eight ways: only all three kept or all three swapped differ as much as was seen."""
    one, other = np.array([[1, 10], [2, 10], [3, 10.0]]), np.array([[5, 10], [5, 10], [5, 10.0]])
    assert paired_p(one, other, METRICS["cer"].value, seed=0) == 2 / 8
