"""Which records share a row, decided from lengths alone, before any picture is opened.

A record is never split and never cut: one that does not fit is returned in `too_long` with its place.

    >>> pack([3000, 2000, 1000, 900], row_tokens=4096).rows
    [[0, 2], [1, 3]]
"""

import bisect
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Plan:
    """`rows` hold indices into the lengths that were packed; `lengths` and `row_tokens` are in tokens."""

    rows: list[list[int]]
    too_long: list[int]
    lengths: list[int]
    row_tokens: int

    @property
    def fill(self) -> float:
        """Share of the rows' room that records take, 0 to 1."""
        used = sum(self.lengths[index] for row in self.rows for index in row)
        return used / (len(self.rows) * self.row_tokens) if self.rows else 0.0


def pack(lengths: Sequence[int], row_tokens: int, share: bool = True) -> Plan:
    """Best fit, longest first: each record goes into the fullest row that still has room. `share=False`: one record a row.

    Rows keep their records in file order and stand in the order of their first record, so equal input gives equal rows.
    """
    too_long = [index for index, length in enumerate(lengths) if length > row_tokens]
    fitting = [index for index, length in enumerate(lengths) if length <= row_tokens]
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for index in sorted(fitting, key=lambda index: (-lengths[index], index)):
        at = bisect.bisect_left(room, (lengths[index], -1)) if share else len(room)
        if at == len(room):
            rows.append([index])
            bisect.insort(room, (row_tokens - lengths[index], len(rows) - 1))
        else:
            free, row = room.pop(at)
            rows[row].append(index)
            bisect.insort(room, (free - lengths[index], row))
    return Plan(sorted(sorted(row) for row in rows), too_long, list(lengths), row_tokens)


def steps(num_rows: int, rows_per_step: int, seed: int, epoch: int) -> list[list[int]]:
    """The rows of each optimizer step of one epoch: every row once, in an order drawn from (seed, epoch) and nothing else.

    The steps are as few as `rows_per_step` allows and take equally many rows, to within one: a step of the few rows that are
    left would take a full step's stride on them, and its loss would look like a jump.

    >>> [len(rows) for rows in steps(9, rows_per_step=8, seed=42, epoch=0)]
    [5, 4]
    """
    order = list(range(num_rows))
    random.Random(f"{seed} {epoch}").shuffle(order)
    count = -(-num_rows // rows_per_step)
    bounds = [-(-num_rows * number // count) for number in range(count + 1)] if count else []
    return [order[start:end] for start, end in pairwise(bounds)]
