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
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

Indices = NDArray[np.signedinteger[Any]]
Ints = NDArray[np.int32]
BLOCK = 2**16  # records that are looked at together
MOST_KEYS = 16  # to a token of a group: the keys of its beginning are gathered once for each record
LEAST_SHARED = 64  # tokens: for fewer of them records are not kept together


class Numbers(Protocol):
    """One of every record, read by slices: all of them need not be in memory."""

    def __len__(self) -> int: ...
    def __getitem__(self, at: slice, /) -> ArrayLike: ...


class PackedRows(Sequence[list[int]]):
    """The indices that each row holds; those of row i are `members[starts[i] : starts[i + 1]]`.

    With `grouped` the members are the groups of that, of records that share their beginning.
    """

    def __init__(self, starts: Indices, members: Indices, grouped: "Grouped | None" = None):
        self.starts, self.members, self.grouped = starts, members, grouped

    def __len__(self) -> int:
        return len(self.starts) - 1

    @overload
    def __getitem__(self, row: int) -> list[int]: ...
    @overload
    def __getitem__(self, row: slice) -> list[list[int]]: ...
    def __getitem__(self, row: int | slice) -> list[int] | list[list[int]]:
        if isinstance(row, slice):
            return [self[at] for at in range(len(self))[row]]
        return [index for group in self.groups(row) for index in group]

    def groups(self, row: int) -> list[list[int]]:
        """What a row holds, by what shares its beginning."""
        at = range(len(self))[row]
        held: list[int] = self.members[self.starts[at] : self.starts[at + 1]].tolist()
        return [[one] if self.grouped is None else self.grouped.of(one) for one in held]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(list.__eq__, self, other))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(list(self))

    def sums(self, of: Numbers, once: bool = False) -> Indices:
        """For each row the sum of a number that every record has; `once` for what the records of a group have in common."""
        numbers = _whole(of)
        if self.grouped:
            order, firsts = self.grouped.order, self.grouped.firsts[:-1]
            numbers = numbers[order[firsts]] if once else np.add.reduceat(numbers[order], firsts)
        return self.sums_of_members(numbers)

    def sums_of_members(self, of: Numbers) -> Indices:
        """For each row the sum of a number that every member has."""
        numbers, sums = _whole(of), np.zeros(len(self), np.int64)
        for start in range(0, len(self), BLOCK):
            edges = self.starts[start : start + BLOCK + 1]
            inside = numbers[self.members[edges[0] : edges[-1]]]
            sums[start : start + BLOCK] = np.add.reduceat(inside, edges[:-1] - edges[0], dtype=np.int64)
        return sums


@dataclass(frozen=True)
class Plan:
    """`rows` hold indices into the lengths that were packed, as `too_long` does; `lengths` are the records that are in rows,
    counted by their tokens. `row_tokens` is in tokens, `fill` the share of the rows' room that records take, 0 to 1; `members`
    are the tokens that each member of the rows takes in them."""

    rows: PackedRows
    lengths: Counter[int]
    too_long: list[int]
    row_tokens: int
    fill: float
    members: Numbers = field(compare=False)


def pack(lengths: Numbers, row_tokens: int, share: bool = True, alike: "Alike | None" = None) -> Plan:
    """Best fit, longest first: each record goes into the fullest row that still has room. `share=False`: one record a row.
    `alike` says what records share: see Groups.

    Rows keep their records in file order and stand in the order of their first record, so equal input gives equal rows. Records
    of one length are placed together, so the time grows with the rows and the number of different lengths; the memory with 8 bytes
    a record, of which 4 stay, and where records are grouped with 4 more, and 16 a group: `lengths` are read in blocks, several
    times.
    """
    counts, too_long = _counted(lengths, row_tokens)
    used = Counter({length: int(counts[length]) for length in np.flatnonzero(counts).tolist()})
    if alike and len(groups := Groups(lengths, alike, row_tokens)) < len(lengths):
        packed = pack(groups, row_tokens)
        rows_of_groups = PackedRows(packed.rows.starts, packed.rows.members, groups.grouped)
        return Plan(rows_of_groups, used, too_long, row_tokens, packed.fill, groups)
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
    fill = tokens / (room.num_rows * row_tokens) if room.num_rows else 0.0
    return Plan(PackedRows(starts, members), used, too_long, row_tokens, fill, lengths)


class Alike(NamedTuple):
    """What each record shares, of all records: how many records ago stood the last one that it shares a beginning with, 0 for none,
    and how many tokens both begin with."""

    back: Numbers
    shared: Numbers


class Grouped(NamedTuple):
    """Records in groups: those of group g are `order[firsts[g] : firsts[g + 1]]`, in file order, as groups are by their first."""

    order: Ints
    firsts: Ints

    def of(self, group: int) -> list[int]:
        """The records of a group."""
        held: list[int] = self.order[self.firsts[group] : self.firsts[group + 1]].tolist()
        return held


class Groups:
    """Records that share their beginning, packed as one: of each group its tokens in a row, the beginning once and the rest of each
    record. Most groups hold one.

    Two records are parted where they share little, or less than half of what either shares with its other neighbour, and where a
    row would be too short or see too many keys.
    """

    def __init__(self, lengths: Numbers, alike: Alike, row_tokens: int):
        order, firsts, self.tokens = np.empty(len(lengths), np.int32), array("i"), array("i")
        for start, sizes in blocks(lengths):
            together, begins = _together(_block(alike.back, start))
            shared = np.where(begins, 0, _block(alike.shared, start)[together])
            at = _firsts(sizes[together], shared, row_tokens)
            tokens, counts = _tokens(sizes[together], shared, at), np.diff(np.append(at, len(sizes)))
            by_first = np.argsort(together[at])
            ranks = np.empty_like(by_first)
            ranks[by_first] = np.arange(len(at))
            order[start : start + len(sizes)] = start + together[np.argsort(np.repeat(ranks, counts), kind="stable")]
            firsts.extend((start + np.cumsum(counts[by_first]) - counts[by_first]).tolist())
            self.tokens.extend(tokens[by_first].tolist())
        self.grouped = Grouped(order, np.array([*firsts, len(lengths)], np.int32))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, at: slice) -> ArrayLike:
        return self.tokens[at]


def _together(back: Ints) -> tuple[Indices, NDArray[np.bool_]]:
    """These records in an order in which those stand together that are linked, and which of them begin a chain of links."""
    places = np.arange(len(back))
    linked = places - np.where(back <= places, back, 0)
    roots, further = linked, linked[linked]
    while (roots != further).any():
        roots, further = further, further[further]
    order = np.argsort(roots, kind="stable")
    return order, linked[order] == order


def _firsts(lengths: Ints, shared: Ints, row_tokens: int) -> Indices:
    """Where groups begin among these records."""
    too_long = lengths > row_tokens
    shared = np.where(too_long | np.roll(too_long, 1), 0, shared)
    shared[0] = 0
    neighbours = np.maximum(np.append(shared[1:], 0), np.append(0, shared[:-1]))
    firsts = np.flatnonzero((shared < LEAST_SHARED) | (2 * shared < neighbours))
    whole, ends = _tokens(lengths, shared, firsts), np.append(firsts[1:], len(lengths))
    cuts, too_large = [firsts], (whole > row_tokens) | (np.add.reduceat(lengths, firsts, dtype=np.int64) > MOST_KEYS * whole)
    for start, end in zip(firsts[too_large].tolist(), ends[too_large].tolist(), strict=True):
        cuts.append(start + np.array([*_cuts(lengths[start:end].tolist(), shared[start:end].tolist(), row_tokens)], np.int64))
    return np.sort(np.concatenate(cuts))


def _cuts(lengths: Sequence[int], shared: Sequence[int], row_tokens: int) -> Iterator[int]:
    """Where a group that is too long for a row, or has too many keys, is cut: each part takes as many records as it may."""
    tokens, count, common = lengths[0], 1, row_tokens
    for at in range(1, len(lengths)):
        common = min(common, shared[at])
        tokens, count = tokens + lengths[at], count + 1
        once = tokens - (count - 1) * common
        if once > row_tokens or tokens > MOST_KEYS * once:
            yield at
            tokens, count, common = lengths[at], 1, row_tokens


def _tokens(lengths: Ints, shared: Ints, firsts: Indices) -> Ints:
    """Of each group that begins at one of `firsts`, its tokens in a row."""
    within = shared.copy()
    within[firsts] = np.iinfo(np.int32).max
    more = np.diff(np.append(firsts, len(lengths))) - 1
    found: Ints = (np.add.reduceat(lengths, firsts) - more * np.minimum.reduceat(within, firsts)).astype(np.int32)
    return found


def _counted(lengths: Numbers, row_tokens: int) -> tuple[Indices, list[int]]:
    """How many records have each length up to `row_tokens`, and which are longer."""
    counts, too_long = np.zeros(row_tokens + 1, np.int64), list[int]()
    for start, sizes in blocks(lengths):
        counts += np.bincount(sizes[sizes <= row_tokens], minlength=row_tokens + 1)
        too_long += (start + np.flatnonzero(sizes > row_tokens)).tolist()
    return counts, too_long


def _whole(of: Numbers) -> Ints:
    return np.concatenate([np.zeros(0, np.int32), *(block for _, block in blocks(of))])


def _block(of: Numbers, start: int) -> Ints:
    return np.asarray(of[start : start + BLOCK], dtype=np.int32)


def blocks(of: Numbers) -> Iterator[tuple[int, Ints]]:
    """The numbers in blocks, each with the place of its first."""
    for start in range(0, len(of), BLOCK):
        yield start, _block(of, start)


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
