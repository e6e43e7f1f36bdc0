"""How far a score can be trusted: intervals and tests by resampling, the same for every metric, from a fixed seed.

What is drawn are groups of questions: those about the same pictures share their luck, and so are drawn together.

Axes: Q = questions, G = groups, U = groups of different counts, K = counts of a metric, D = draws.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from qwenvl_ft.evaluate.metrics import Floats, Metric

LEVEL = 0.95
RESAMPLES, WAYS = 4_999, 9_999  # of an interval, of a test
AT_ONCE = 4_000_000  # numbers in memory
SAME = 1e-9


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
    # Groups of equal counts are as one that is drawn more often: a bootstrap of 10,000 right and wrong answers draws 2 numbers.
    rows_UK, often = np.unique(counts_GK, axis=0, return_counts=True)
    random, step = np.random.default_rng(seed), max(1, AT_ONCE // len(rows_UK))
    values = np.concatenate([
        metric.value(random.multinomial(num_groups, often / num_groups, min(step, RESAMPLES - start)) @ rows_UK)
        for start in range(0, RESAMPLES, step)
    ])  # fmt: skip
    low, high = np.nanquantile(values, [tail, 1 - tail])
    return float(low), float(high)


def paired_p(one_GK: Floats, other_GK: Floats, value: Callable[[Floats], Floats], seed: int) -> float:
    """The two-sided p-value of a difference between two who answered the same questions: how often it would be as large if it were
    chance which of them gave which answers of a group.

    Exact where all ways can be tried (of right and wrong answers, a question a group, it is McNemar's exact test), else by WAYS
    of them. Source: approximate randomisation, Noreen 1989.
    """
    differ = (one_GK != other_GK).any(1)
    total = one_GK.sum(0) + other_GK.sum(0)
    first, change_GK = one_GK.sum(0), (other_GK - one_GK)[differ]
    observed = abs(float(value(first)) - float(value(total - first)))
    num_ways = 2 ** len(change_GK) if len(change_GK) < 13 else None
    if num_ways:
        ways = (np.arange(num_ways)[:, None] >> np.arange(len(change_GK))) & 1
        return float(np.mean(_as_large(ways, first, change_GK, total, value, observed)))
    rows_UK, often = np.unique(change_GK, axis=0, return_counts=True)
    random, step, found = np.random.default_rng(seed), max(1, AT_ONCE // len(rows_UK)), 0
    for start in range(0, WAYS, step):
        swapped = random.binomial(often, 0.5, (min(step, WAYS - start), len(rows_UK)))
        found += int(_as_large(swapped, first, rows_UK, total, value, observed).sum())
    return (found + 1) / (WAYS + 1)


def _as_large(
    swapped_DU: NDArray[np.int64],
    first: Floats,
    change_UK: Floats,
    total: Floats,
    value: Callable[[Floats], Floats],
    observed: float,
) -> NDArray[np.bool_]:
    """Whether the difference is as large as `observed` where so many groups' answers are swapped between the two."""
    one = first + swapped_DU @ change_UK
    return np.asarray(np.abs(value(one) - value(total - one)) >= observed - SAME)
