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
from itertools import pairwise
from typing import NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from qwenvl_ft.data.numbers import Indices, Ints, Numbers, Spool

WINDOW = 2**18  # records that are packed together: more of them leave no fuller rows, and take more memory
MOST_KEYS = 16  # to a token of a group: the keys of its prefix are gathered once for each record
LEAST_SHARED = 64  # tokens: for fewer of them records are kept together only where they are half of the record


class PackedRows(Sequence[list[int]]):
    """The indices that each row holds; those of row i are `members[starts[i] : starts[i + 1]]`.

    One that shares the prefix of the index before it in its row stands there as ~index. `windows` are (row, record) that each
    window of records begins with, and at last how many there are of both.
    """

    def __init__(self, starts: Indices, members: Numbers, windows: Sequence[tuple[int, int]]):
        self.starts, self.members, self.windows = starts, members, windows

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
        """What a row holds, by what shares its prefix."""
        at = range(len(self))[row]
        found: list[list[int]] = []
        for member in np.asarray(self.members[self.starts[at] : self.starts[at + 1]]).tolist():
            if member < 0:
                found[-1].append(~member)
            else:
                found.append([member])
        return found

    @property
    def shares(self) -> bool:
        """Whether a row holds a prefix once for several records."""
        return any((members < 0).any() for _, members in self._windows())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(list.__eq__, self, other))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(list(self))

    def sums(self, of: Numbers, once: bool = False) -> Indices:
        """For each row the sum of a number that every record has; `once` for what the records of a group have in common."""
        sums = np.zeros(len(self), np.int64)
        for number, (rows, members) in enumerate(self._windows()):
            first, end = (at for _, at in self.windows[number : number + 2])
            numbers = np.asarray(of[first:end], np.int64)[np.where(members < 0, ~members, members) - first]
            if once:
                numbers[members < 0] = 0
            sums[rows] = np.add.reduceat(numbers, self.starts[rows] - self.starts[rows.start])
        return sums

    def _windows(self) -> Iterator[tuple[slice, Ints]]:
        """Of each window its rows and their members."""
        for (row, _), (end, _) in pairwise(self.windows):
            yield slice(row, end), np.asarray(self.members[self.starts[row] : self.starts[end]], np.int32)


@dataclass(frozen=True)
class Plan:
    """`rows` hold indices into the lengths that were packed, as `too_long` does; `lengths` are the records that are in rows,
    counted by their tokens. `tokens` are those of each row, `row_tokens` the most that it holds, `fill` the share of the rows'
    room that is taken, 0 to 1."""

    rows: PackedRows
    tokens: Indices = field(compare=False)
    lengths: Counter[int]
    too_long: list[int]
    row_tokens: int
    fill: float


def pack(lengths: Numbers, row_tokens: int, alike: "Alike | None" = None) -> Plan:
    """Best fit, longest first: each record goes into the fullest row that still has room. `alike` says what records share: see
    `grouped`.

    Rows keep their records in file order and stand in the order of their first record, so equal input gives equal rows. A window
    of records is packed by itself; what is kept of a record is 4 bytes on the disk. Records of one length are placed together, so
    the time grows with the rows and the number of different lengths.
    """
    counts, too_long = np.zeros(row_tokens + 1, np.int64), list[int]()
    members, sizes, tokens, windows = Spool("i4"), [np.zeros(1, np.int64)], [np.zeros(0, np.int64)], [(0, 0)]
    for start in range(0, len(lengths), WINDOW):
        window = np.asarray(lengths[start : start + WINDOW], np.int32)
        counts += np.bincount(window[window <= row_tokens], minlength=row_tokens + 1)
        too_long += (start + np.flatnonzero(window > row_tokens)).tolist()
        back, shared = np.zeros((2, len(window)), np.int32)
        if alike:
            back, shared = (np.asarray(of[start : start + WINDOW], np.int32) for of in alike)
        packed = _pack_window(grouped(window, back, shared, row_tokens), row_tokens)
        members.extend(np.where(packed.members < 0, packed.members - start, packed.members + start))
        sizes.append(packed.sizes)
        tokens.append(packed.tokens)
        windows.append((windows[-1][0] + len(packed.sizes), start + len(window)))
    used = Counter({length: int(counts[length]) for length in np.flatnonzero(counts).tolist()})
    rows = PackedRows(np.cumsum(np.concatenate(sizes)), members, windows)
    of_rows = np.concatenate(tokens)
    fill = int(of_rows.sum()) / (len(rows) * row_tokens) if len(rows) else 0.0
    return Plan(rows, of_rows, used, too_long, row_tokens, fill)


class Alike(NamedTuple):
    """What each record shares, of all records: how many records ago stood the last one that it shares a prefix with, 0 for none,
    and how many tokens both begin with."""

    back: Numbers
    shared: Numbers


class Groups(NamedTuple):
    """Records in groups: those of group g are `order[firsts[g] : firsts[g + 1]]`, in file order, as groups are by their first;
    `tokens` are those that each group takes in a row."""

    order: Indices
    firsts: Indices
    tokens: Ints


def grouped(lengths: Ints, back: Ints, shared: Ints, row_tokens: int) -> Groups:
    """Records that share a prefix, to be packed as one: the prefix once and the rest of each. Most groups hold one.

    Two records are parted where they share little, or less than half of what either shares with its other neighbour, and where a
    row would be too short or see too many keys. Little is less than LEAST_SHARED tokens that are not half of the later record.
    """
    together, begins = _together(back)
    shared = np.where(begins, 0, shared[together])
    firsts = _firsts(lengths[together], shared, row_tokens)
    tokens, counts = _tokens(lengths[together], shared, firsts), np.diff(np.append(firsts, len(lengths)))
    by_first = np.argsort(together[firsts])
    ranks = np.empty_like(by_first)
    ranks[by_first] = np.arange(len(firsts))
    order = together[np.argsort(np.repeat(ranks, counts), kind="stable")]
    return Groups(order, np.append(0, np.cumsum(counts[by_first])), tokens[by_first])


class _Window(NamedTuple):
    """Rows of some records: their members, how many each has, and its tokens; see PackedRows."""

    members: Indices
    sizes: Indices
    tokens: Indices


def _pack_window(found: Groups, row_tokens: int) -> _Window:
    fits = np.flatnonzero(found.tokens <= row_tokens)
    tokens = found.tokens[fits]
    by_length = np.argsort(-tokens, kind="stable")
    lengths, counts = np.unique(-tokens, return_counts=True)
    room = Room(row_tokens)
    rows, takes = array("q"), array("q")
    for length, count in zip((-lengths).tolist(), counts.tolist(), strict=True):
        for row, taken in room.take(length, count):
            rows.append(row)
            takes.append(taken)
    row_of = np.empty(len(tokens), np.int64)
    row_of[by_length] = np.repeat(np.array(rows, np.int64), takes)
    _, first, row_of = np.unique(row_of, return_index=True, return_inverse=True)
    row_of = np.argsort(np.argsort(first))[row_of]  # numbered by their first record
    by_row = np.argsort(row_of, kind="stable")
    sizes = np.diff(found.firsts)[fits]
    firsts, held = found.firsts[fits][by_row], sizes[by_row]
    begins = np.cumsum(held) - held
    members = found.order[np.repeat(firsts - begins, held) + np.arange(held.sum())]
    alone = np.zeros(len(members), np.bool_)
    alone[begins] = True
    of_rows = (np.bincount(row_of, numbers, room.num_rows).astype(np.int64) for numbers in (sizes, tokens))
    return _Window(np.where(alone, members, ~members), *of_rows)


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
    firsts = np.flatnonzero(is_little(shared, lengths) | (2 * shared < neighbours))
    whole, ends = _tokens(lengths, shared, firsts), np.append(firsts[1:], len(lengths))
    cuts, too_large = [firsts], (whole > row_tokens) | (np.add.reduceat(lengths, firsts, dtype=np.int64) > MOST_KEYS * whole)
    for start, end in zip(firsts[too_large].tolist(), ends[too_large].tolist(), strict=True):
        cuts.append(start + np.array([*_cuts(lengths[start:end].tolist(), shared[start:end].tolist(), row_tokens)], np.int64))
    return np.sort(np.concatenate(cuts))


def is_little(shared: Ints, lengths: Ints) -> NDArray[np.bool_]:
    """Of records, whether what each shares with the one before it is too little to keep them together."""
    little: NDArray[np.bool_] = (shared < LEAST_SHARED) & (2 * shared < lengths)
    return little


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


class Room:
    """The rows by their free tokens: a whole number of at most `row_tokens`, so each has a heap of its rows, and which heaps are
    not empty are the bits of one integer."""

    def __init__(self, row_tokens: int):
        self.row_tokens, self.num_rows = row_tokens, 0
        self.rows: defaultdict[int, list[int]] = defaultdict(list)
        self.bits = 0

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

    Where records share prefixes, rows are fewer than the `unshared` ones that these would fill each for itself, and hold more
    of them: there are as many steps as of those, or the same epochs would take fewer steps, and teach less.

    >>> [(epoch, len(rows)) for epoch, rows in Schedule(9, rows_per_step=8, seed=42, epochs=2)]
    [(0, 5), (0, 4), (1, 5), (1, 4)]
    """

    def __init__(
        self, num_rows: int, rows_per_step: int, seed: int, epochs: int = 1, max_steps: int | None = None, unshared: int = 0
    ):
        self.num_rows, self.seed = num_rows, seed
        self.steps_per_epoch = min(num_rows, -(-max(num_rows, unshared) // rows_per_step))
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
