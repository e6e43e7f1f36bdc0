"""Which records share a row, decided from lengths alone, before any picture is opened.

A record is never split and never cut: one that does not fit is returned in `too_long` with its place. Millions of records are a
few arrays here, and no object each.

    >>> pack([3000, 2000, 1000, 900], row_tokens=4096).rows
    [[0, 2], [1, 3]]
"""

import heapq
import random
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

Indices = NDArray[np.signedinteger[Any]]
Ints = NDArray[np.int32]
BLOCK = 2**16  # records that are looked at together


class Numbers(Protocol):
    """One of every record, read by slices: all of them need not be in memory."""

    def __len__(self) -> int: ...
    def __getitem__(self, at: slice, /) -> ArrayLike: ...


class PackedRows(Sequence[list[int]]):
    """The indices that each row holds; those of row i are `members[starts[i] : starts[i + 1]]`."""

    def __init__(self, starts: Indices, members: Indices):
        self.starts, self.members = starts, members

    def __len__(self) -> int:
        return len(self.starts) - 1

    @overload
    def __getitem__(self, row: int) -> list[int]: ...
    @overload
    def __getitem__(self, row: slice) -> list[list[int]]: ...
    def __getitem__(self, row: int | slice) -> list[int] | list[list[int]]:
        if isinstance(row, slice):
            return [self[at] for at in range(len(self))[row]]
        at = range(len(self))[row]
        held: list[int] = self.members[self.starts[at] : self.starts[at + 1]].tolist()
        return held

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(list.__eq__, self, other))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(list(self))

    def sums(self, of: Numbers) -> Indices:
        """For each row the sum of a number that every record has."""
        numbers = np.concatenate([np.zeros(0, np.int32), *(block for _, block in blocks(of))])
        sums = np.zeros(len(self), np.int64)
        for start in range(0, len(self), BLOCK):
            edges = self.starts[start : start + BLOCK + 1]
            inside = numbers[self.members[edges[0] : edges[-1]]]
            sums[start : start + BLOCK] = np.add.reduceat(inside, edges[:-1] - edges[0], dtype=np.int64)
        return sums


@dataclass(frozen=True)
class Plan:
    """`rows` hold indices into the lengths that were packed, as `too_long` does; `lengths` are the records that are in rows,
    counted by their tokens. `row_tokens` is in tokens, `fill` the share of the rows' room that records take, 0 to 1."""

    rows: PackedRows
    lengths: Counter[int]
    too_long: list[int]
    row_tokens: int
    fill: float


def pack(lengths: Numbers, row_tokens: int, share: bool = True) -> Plan:
    """Best fit, longest first: each record goes into the fullest row that still has room. `share=False`: one record a row.

    Rows keep their records in file order and stand in the order of their first record, so equal input gives equal rows. Records
    of one length are placed together, so the time grows with the rows and the number of different lengths; the memory with 8 bytes
    a record, of which 4 stay: `lengths` are read in blocks, several times.
    """
    counts, too_long = np.zeros(row_tokens + 1, np.int64), list[int]()
    for start, sizes in blocks(lengths):
        counts += np.bincount(sizes[sizes <= row_tokens], minlength=row_tokens + 1)
        too_long += (start + np.flatnonzero(sizes > row_tokens)).tolist()
    room = Room(row_tokens)
    rows, takes = array("i"), array("i")
    for length in np.flatnonzero(counts)[::-1].tolist():
        for row, count in room.take(length, int(counts[length])) if share else room.take_alone(int(counts[length])):
            rows.append(row)
            takes.append(count)
    row_of = _in_file_order(lengths, row_tokens, counts, np.repeat(np.array(rows, np.int32), takes), room.num_rows)
    starts = np.zeros(room.num_rows + 1, np.int64)
    for _, block in blocks(row_of):
        of, number = np.unique(block, return_counts=True)
        starts[of + 1] += number
    np.cumsum(starts, out=starts)
    members, place, done = np.empty(len(row_of), np.int32), starts[:-1].copy(), 0
    for start, sizes in blocks(lengths):
        inside = start + np.flatnonzero(sizes <= row_tokens)
        members[_next(place, row_of[done : done + len(inside)])] = inside
        done += len(inside)
    tokens = int(counts @ np.arange(row_tokens + 1))
    used = Counter({length: int(counts[length]) for length in np.flatnonzero(counts).tolist()})
    fill = tokens / (room.num_rows * row_tokens) if room.num_rows else 0.0
    return Plan(PackedRows(starts, members), used, too_long, row_tokens, fill)


def blocks(of: Numbers) -> Iterator[tuple[int, Ints]]:
    """The numbers in blocks, each with the place of its first."""
    for start in range(0, len(of), BLOCK):
        yield start, np.asarray(of[start : start + BLOCK], dtype=np.int32)


def _in_file_order(lengths: Numbers, row_tokens: int, counts: Indices, row_of_place: Ints, num_rows: int) -> Ints:
    """Of each record that fits its row, the rows numbered by their first record. `row_of_place` has them as the records were
    placed: the longest first, those of one length in file order."""
    place = counts.sum() - np.cumsum(counts)  # of each length, where its next record was placed
    number, numbered = np.full(num_rows, -1, np.int32), 0
    row_of, done = np.empty(len(row_of_place), np.int32), 0
    for _, sizes in blocks(lengths):
        found = row_of_place[_next(place, sizes[sizes <= row_tokens])]
        of, first = np.unique(found, return_index=True)
        new = of[np.argsort(first)]
        new = new[number[new] < 0]
        number[new] = np.arange(numbered, numbered + len(new))
        numbered += len(new)
        row_of[done : done + len(found)] = number[found]
        done += len(found)
    return row_of


def _next(place: Indices, kinds: Ints) -> Indices:
    """The next place of each one's kind, which moves it on: equal ones get places one after another."""
    order = np.argsort(kinds, kind="stable")
    of, first, count = np.unique(kinds[order], return_index=True, return_counts=True)
    found = np.empty(len(kinds), np.int64)
    found[order] = np.arange(len(kinds)) - np.repeat(first, count) + np.repeat(place[of], count)
    place[of] += count
    return found


class Room:
    """The rows by their free tokens: a whole number of at most `row_tokens`, so each has a heap of its rows, and which heaps are
    not empty are the bits of one integer."""

    def __init__(self, row_tokens: int):
        self.row_tokens, self.num_rows = row_tokens, 0
        self.rows: defaultdict[int, list[int]] = defaultdict(list)
        self.bits = 0

    def take_alone(self, count: int) -> Iterator[tuple[int, int]]:
        """Places `count` records in a row each."""
        for _ in range(count):
            yield self.num_rows, 1
            self.num_rows += 1

    def take(self, length: int, count: int) -> Iterator[tuple[int, int]]:
        """Places `count` records of `length` tokens, not longer than any before: (row, how many of them it takes) of each row.

        A row that takes one and has room for another is the fullest of those that have, so it takes that, too.
        """
        while count:
            if fits := self.bits >> length:
                free = length + (fits & -fits).bit_length() - 1
                row = heapq.heappop(self.rows[free])
                if not self.rows[free]:
                    self.bits ^= 1 << free
            else:
                free, row = self.row_tokens, self.num_rows
                self.num_rows += 1
            taken = min(count, free // length)
            yield row, taken
            count -= taken
            free -= taken * length
            heapq.heappush(self.rows[free], row)
            self.bits |= 1 << free


class Schedule(Sequence[tuple[int, list[int]]]):
    """(epoch, rows) of every optimizer step: an epoch takes every row once, in an order drawn from (seed, epoch) and nothing else.

    Its steps are as few as `rows_per_step` allows and take equally many rows, to within one: a step of the few rows that are
    left would take a full step's stride on them, and its loss would look like a jump. `max_steps` goes before `epochs`.

    >>> [(epoch, len(rows)) for epoch, rows in Schedule(9, rows_per_step=8, seed=42, epochs=2)]
    [(0, 5), (0, 4), (1, 5), (1, 4)]
    """

    def __init__(self, num_rows: int, rows_per_step: int, seed: int, epochs: int = 1, max_steps: int | None = None):
        self.num_rows, self.seed = num_rows, seed
        self.steps_per_epoch = -(-num_rows // rows_per_step)
        self.num_steps = (max_steps or epochs * self.steps_per_epoch) if num_rows else 0
        self.drawn: tuple[int, array[int]] = (-1, array("i"))  # the epoch that was asked for last, and its order

    def __len__(self) -> int:
        return self.num_steps

    @overload
    def __getitem__(self, step: int) -> tuple[int, list[int]]: ...
    @overload
    def __getitem__(self, step: slice) -> list[tuple[int, list[int]]]: ...
    def __getitem__(self, step: int | slice) -> tuple[int, list[int]] | list[tuple[int, list[int]]]:
        if isinstance(step, slice):
            return [self[at] for at in range(len(self))[step]]
        epoch, number = divmod(range(len(self))[step], self.steps_per_epoch)
        start, end = (-(-self.num_rows * at // self.steps_per_epoch) for at in (number, number + 1))
        return epoch, self.order(epoch)[start:end].tolist()

    def since(self, step: int) -> Iterator[tuple[int, list[int]]]:
        """The steps behind the first `step` ones."""
        return (self[at] for at in range(step, len(self)))

    def order(self, epoch: int) -> "array[int]":
        """The rows of an epoch as its steps take them."""
        if self.drawn[0] != epoch:
            order = array("i", range(self.num_rows))  # four bytes a row; numpy's own permutation may change with its version
            random.Random(f"{self.seed} {epoch}").shuffle(order)
            self.drawn = epoch, order
        return self.drawn[1]


def deal(rows: Sequence[int], costs: Sequence[float], hands: int) -> list[list[int | None]]:
    """The rows of a step for each of `hands` processes, so that none has much more work: the dearest first, each to whoever has
    least so far. All get equally many, with None at the end of those that have one less: they make the same number of passes.

    >>> deal([0, 1, 2, 3, 4], costs=[9, 1, 1, 8, 1], hands=2)
    [[0, 2, None], [3, 1, 4]]
    """
    if hands == 1:
        return [list(rows)]
    each = -(-len(rows) // hands)
    held: list[list[int | None]] = [[] for _ in range(hands)]
    load = [(0.0, 0, hand) for hand in range(hands)]  # a heap: work, rows, process
    for at in sorted(range(len(rows)), key=lambda at: (-costs[at], at)):
        work, count, hand = heapq.heappop(load)
        held[hand].append(rows[at])
        if count + 1 < each:
            heapq.heappush(load, (work + costs[at], count + 1, hand))
    return [hand + [None] * (each - len(hand)) for hand in held]
