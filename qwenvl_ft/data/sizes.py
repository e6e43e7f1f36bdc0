"""The sizes of pictures whose headers were read before, known again by path, size and time of the file that holds them.

A table of 16 bytes a picture, sorted and mapped into memory: processes share its pages, and one look-up takes 2 µs. New ones
are kept apart and merged into a new table, which takes the old one's place at once.
"""

import hashlib
import os
from bisect import bisect_left
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

NAME = "sizes-1.npy"  # raised with every change to what is in it
SIDE_BITS, CHECK_BITS = 18, 28  # of a value: height, width, and as much of the key's digest as is left
KEPT_APART = 100_000  # new ones, before they are merged
LOCK_S = 10


class Sizes:
    """The table of one folder. It never fails: where it cannot be read or written, nothing is known."""

    def __init__(self, folder: Path):
        self.path = folder / NAME
        self.new: dict[int, int] = {}
        self._open()

    def _open(self) -> None:
        table: NDArray[np.uint64] = np.zeros((2, 0), np.uint64)
        with suppress(OSError, ValueError, EOFError):  # ValueError: a table that is damaged
            found = np.load(self.path, mmap_mode="r", allow_pickle=False)
            if found.dtype == np.uint64 and found.ndim == 2 and len(found) == 2:
                table = found
        self.keys, self.values = memoryview(table[0]), memoryview(table[1])

    def get(self, text: str) -> tuple[int, int] | None:
        """(height, width) in px of what `text` says; None of what is not known."""
        key, check = _digest(text)
        value = self.new.get(key)
        if value is None:
            at = bisect_left(self.keys, key)
            if at == len(self.keys) or self.keys[at] != key:
                return None
            value = self.values[at]
        if value & (1 << CHECK_BITS) - 1 != check:
            return None
        value >>= CHECK_BITS
        return value >> SIDE_BITS, value & (1 << SIDE_BITS) - 1

    def add(self, text: str, height: int, width: int) -> None:
        """Keeps a size, which is written now and then, and with `save`."""
        if max(height, width) >> SIDE_BITS:
            return
        key, check = _digest(text)
        self.new[key] = (height << SIDE_BITS | width) << CHECK_BITS | check
        if len(self.new) >= max(KEPT_APART, len(self.keys) // 8):
            self.save()

    def join(self, new: Mapping[int, int]) -> None:
        """Keeps those that another process found."""
        self.new.update(new)
        if len(self.new) >= max(KEPT_APART, len(self.keys) // 8):
            self.save()

    def save(self) -> None:
        """Merges what is new into the table, with what other processes have added to it."""
        if not self.new:
            return
        from filelock import FileLock, Timeout

        with suppress(OSError, Timeout):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{self.path}.lock", timeout=LOCK_S):
                self._open()
                keys = np.concatenate([np.fromiter(self.new, np.uint64, len(self.new)), np.asarray(self.keys, np.uint64)])
                values = np.concatenate(
                    [np.fromiter(self.new.values(), np.uint64, len(self.new)), np.asarray(self.values, np.uint64)]
                )
                keys, first = np.unique(keys, return_index=True)  # the first of each: what is new
                aside = self.path.with_name(f"{NAME}.{os.getpid()}")
                with aside.open("wb") as file:
                    np.save(file, np.stack([keys, values[first]]))
                aside.replace(self.path)
                self._open()
        self.new = {}


def _digest(text: str) -> tuple[int, int]:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=12).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little") & (1 << CHECK_BITS) - 1
