"""Which records share a row: never cut, never lost, the same every time."""

import doctest
import random
from collections import Counter

import pytest

from qwenvl_ft.data import packing as module
from qwenvl_ft.data.packing import Schedule, deal, pack


def steps(num_rows, rows_per_step, seed, epoch):
    return [rows for of, rows in Schedule(num_rows, rows_per_step, seed, epoch + 1) if of == epoch]


LENGTHS = [[random.Random(seed).randint(1, 1200) for _ in range(seed * 20)] for seed in range(20)]


@pytest.mark.parametrize("lengths", LENGTHS, ids=len)
@pytest.mark.parametrize("share", [True, False])
def test_every_record_is_whole_in_one_row_or_too_long(lengths, share):
    plan = pack(lengths, row_tokens=1000, share=share)
    assert sorted([index for row in plan.rows for index in row] + plan.too_long) == list(range(len(lengths)))
    assert plan.too_long == [index for index, length in enumerate(lengths) if length > 1000]
    assert all(sum(lengths[index] for index in row) <= 1000 for row in plan.rows)
    if not share:
        assert all(len(row) == 1 for row in plan.rows)


@pytest.mark.parametrize("lengths", LENGTHS, ids=len)
def test_no_two_rows_would_fit_into_one(lengths):
    plan = pack(lengths, row_tokens=1000)
    sums = sorted(sum(lengths[index] for index in row) for row in plan.rows)
    assert len(sums) < 2 or sums[0] + sums[1] > 1000


def test_a_record_as_long_as_a_row_fills_it_and_one_token_more_is_too_long():
    plan = pack([1000, 1001, 1], row_tokens=1000)
    assert (plan.rows, plan.too_long) == ([[0], [2]], [1])
    assert plan.fill == 1001 / 2000


def test_records_and_rows_stand_in_the_order_of_the_file():
    plan = pack([10, 500, 20, 990, 500], row_tokens=1000)
    assert plan.rows == sorted(sorted(row) for row in plan.rows) == [[0, 3], [1, 4], [2]]


def test_nothing_to_pack_is_no_rows():
    assert (pack([], 10).rows, pack([], 10).fill, pack([11], 10).rows, pack([11], 10).too_long) == ([], 0.0, [], [0])


def test_equal_lengths_give_equal_plans():
    assert pack(LENGTHS[9], 1000) == pack(tuple(LENGTHS[9]), 1000)


def best_fit(lengths, row_tokens):
    """Best fit, longest first, as a textbook has it: each record looks at all rows."""
    rows = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        fits = [row for row in rows if sum(lengths[of] for of in row) + lengths[index] <= row_tokens]
        fullest = max(fits, key=lambda row: sum(lengths[of] for of in row), default=None)
        if fullest is None:
            rows.append(fullest := [])
        fullest.append(index)
    return sorted(sorted(row) for row in rows)


@pytest.mark.parametrize("most", [5, 60, 700, 1000])
def test_records_of_one_length_placed_together_come_to_the_rows_of_one_at_a_time(most):
    for seed in range(10):
        lengths = [random.Random(f"{seed} {number}").randint(1, most) for number in range(150)]
        assert pack(lengths, 1000).rows == best_fit(lengths, 1000)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("block", [1, 7, 64])
def test_records_that_are_looked_at_in_blocks_come_to_the_same_rows(block, share, monkeypatch):
    lengths, of = LENGTHS[12], random.Random(0).choices(range(9), k=len(LENGTHS[12]))
    whole = pack(lengths, 1000, share)
    monkeypatch.setattr(module, "BLOCK", block)
    assert pack(lengths, 1000, share) == whole
    assert whole.rows.sums(of).tolist() == [sum(of[index] for index in row) for row in whole.rows]
    inside = [length for length in lengths if length <= 1000]
    assert whole.lengths == Counter(inside) and whole.fill == sum(inside) / (len(whole.rows) * 1000)


def test_rows_of_a_vqa_mix_are_at_least_99_percent_full():
    """Pictures of 256 to 1280 tokens with a short talk, a quarter without one: at most half a percent more rows than tokens."""
    draw = random.Random(0)
    lengths = [draw.choice([0, 256, 729, 1280]) + int(draw.lognormvariate(4.5, 0.7)) + 20 for _ in range(20_000)]
    assert pack(lengths, 4096).fill >= 0.99


@pytest.mark.parametrize("hands", [1, 2, 3, 8])
@pytest.mark.parametrize("num_rows", [1, 2, 7, 8, 16, 17])
def test_processes_get_every_row_once_equally_many_and_equal_work(num_rows, hands):
    costs = [random.Random(number).randint(500, 4096) for number in range(num_rows)]
    dealt = deal(range(num_rows), costs, hands)
    assert sorted(row for hand in dealt for row in hand if row is not None) == list(range(num_rows))
    assert len(dealt) == hands and {len(hand) for hand in dealt} == {-(-num_rows // hands)}
    assert all(None not in hand[: hand.index(None)] for hand in dealt if None in hand)
    if num_rows % hands == 0:
        in_turn = [sum(costs[hand::hands]) for hand in range(hands)]
        sums = [sum(costs[row] for row in hand) for hand in dealt]
        assert max(sums) <= max(in_turn)


@pytest.mark.parametrize("rows_per_step", [1, 3, 8, 1000])
@pytest.mark.parametrize("num_rows", [0, 1, 7, 8, 9, 16, 17, 100])
def test_an_epoch_takes_every_row_once_in_as_few_steps_as_it_can(num_rows, rows_per_step):
    epoch = steps(num_rows, rows_per_step, seed=42, epoch=3)
    assert sorted(row for rows in epoch for row in rows) == list(range(num_rows))
    assert len(epoch) == -(-num_rows // rows_per_step) and all(len(rows) <= rows_per_step for rows in epoch)


@pytest.mark.parametrize("num_rows", range(1, 40))
@pytest.mark.parametrize("rows_per_step", [1, 2, 5, 8, 64])
def test_no_step_of_an_epoch_is_left_with_a_few_rows(num_rows, rows_per_step):
    """Nine rows with eight a step were steps of 8 and 1: the loss jumped in every second one, and the one row had as much say."""
    sizes = {len(rows) for rows in steps(num_rows, rows_per_step, seed=42, epoch=0)}
    assert max(sizes) - min(sizes) <= 1


def test_what_divides_evenly_fills_every_step():
    assert [len(rows) for rows in steps(24, 8, seed=42, epoch=0)] == [8, 8, 8]


def test_the_order_is_drawn_from_seed_and_epoch_and_from_nothing_else():
    first = steps(100, 8, seed=42, epoch=0)
    random.seed(1)
    assert first == steps(100, 8, seed=42, epoch=0)
    assert first != steps(100, 8, seed=42, epoch=1)
    assert first != steps(100, 8, seed=43, epoch=0)
    assert steps(100, 8, seed=1, epoch=23) != steps(100, 8, seed=12, epoch=3)
    by_five = steps(100, 5, seed=42, epoch=0)
    assert [row for rows in first for row in rows] == [row for rows in by_five for row in rows]


def test_the_order_is_the_one_that_older_checkpoints_were_trained_in():
    """A run goes on in the middle of an epoch: another order after an update would repeat some rows and miss others."""
    assert steps(6, 6, seed=42, epoch=0) == [[4, 2, 1, 5, 0, 3]]
    assert steps(6, 4, seed=42, epoch=0) == [[4, 2, 1], [5, 0, 3]]


def test_the_examples_in_the_docstrings_hold():
    result = doctest.testmod(module)
    assert result.attempted and not result.failed
