"""How far a score can be trusted: intervals and tests by resampling, the same for every metric, from a fixed seed.

What is drawn are groups of questions: those about the same pictures share their luck, and so are drawn together.

Axes: Q = questions, G = groups, K = counts of a metric, D = draws.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from qwenvl_ft.evaluate.metrics import Floats, Metric

LEVEL = 0.95
RESAMPLES, WAYS = 4_999, 9_999  # of an interval, of a test
AT_ONCE = 4_000_000  # numbers in memory
SAME = 1e-12


def grouped(counts_QK: Floats, groups_Q: Sequence[int]) -> Floats:
    """(G, K): the sums of each group."""
    groups = np.asarray(groups_Q, np.int64)
    sums = np.zeros((groups.max(initial=-1) + 1, counts_QK.shape[1]))
    np.add.at(sums, groups, counts_QK)
    return sums


def interval(counts_GK: Floats, metric: Metric, seed: int) -> tuple[float, float] | None:
    """The 95 % interval of a metric's value: the percentiles of its bootstrap over groups (Efron and Tibshirani 1993).

    Where all that counts is right, or all wrong, a bootstrap sees no spread: for shares it is then that of Clopper and Pearson
    (1934) over the groups. None where nothing counts, or where there is one group.
    """
    counts_GK = counts_GK[counts_GK.any(1)]
    num_groups = len(counts_GK)
    value = float(metric.value(counts_GK.sum(0)))
    if not num_groups or np.isnan(value):
        return None
    tail = (1 - LEVEL) / 2
    if metric.is_share and value in (0, 1):
        bound = tail ** (1 / num_groups)
        return (0.0, 1 - bound) if value == 0 else (bound, 1.0)
    if num_groups == 1:
        return None
    values = np.concatenate([
        metric.value(counts_GK[draws].sum(1)) for draws in _draws(num_groups, counts_GK.shape[1], seed)
    ])  # fmt: skip
    low, high = np.nanquantile(values, [tail, 1 - tail])
    return float(low), float(high)


def _draws(num_groups: int, num_counts: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Resamples of the groups, (D, G), RESAMPLES in all, as many at a time as memory should hold."""
    random = np.random.default_rng(seed)
    step = max(1, AT_ONCE // (num_groups * num_counts))
    for start in range(0, RESAMPLES, step):
        yield random.integers(num_groups, size=(min(step, RESAMPLES - start), num_groups))


def paired_p(one_GK: Floats, other_GK: Floats, value: Callable[[Floats], Floats], seed: int) -> float:
    """The two-sided p-value of a difference between two who answered the same questions: how often it would be as large if it were
    chance which of them gave which answers of a group.

    Exact where all ways can be tried (of right and wrong answers, a question a group, it is McNemar's exact test), else by WAYS
    of them. Source: approximate randomisation, Noreen 1989.
    """
    differ = (one_GK != other_GK).any(1)
    total = one_GK.sum(0) + other_GK.sum(0)
    alike, change_GK = one_GK[~differ].sum(0), (other_GK - one_GK)[differ]
    rest = alike + one_GK[differ].sum(0)
    observed = abs(float(value(rest)) - float(value(total - rest)))
    num_ways = 2 ** len(change_GK) if len(change_GK) < 13 else None
    if num_ways:
        ways = (np.arange(num_ways)[:, None] >> np.arange(len(change_GK))) & 1
        return float(np.mean(_as_large(ways, rest, change_GK, total, value, observed)))
    random, found = np.random.default_rng(seed), 0
    step = max(1, AT_ONCE // len(change_GK))
    for start in range(0, WAYS, step):
        ways = random.integers(2, size=(min(step, WAYS - start), len(change_GK)))
        found += int(_as_large(ways, rest, change_GK, total, value, observed).sum())
    return (found + 1) / (WAYS + 1)


def _as_large(
    ways: NDArray[np.int64], rest: Floats, change_GK: Floats, total: Floats, value: Callable[[Floats], Floats], observed: float
) -> NDArray[np.bool_]:
    """Whether the difference is as large as `observed`, of each way to give the groups' answers to the two."""
    one = rest + ways @ change_GK
    return np.asarray(np.abs(value(one) - value(total - one)) >= observed - SAME)
