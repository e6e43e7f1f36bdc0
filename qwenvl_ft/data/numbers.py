"""Numbers of many records: read by slices, so that all of them need not be in memory."""

import os
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qwenvl_ft.errors import Problem, UserError

Indices = NDArray[np.signedinteger[Any]]
Ints = NDArray[np.int32]
BLOCK = 2**16  # numbers that are looked at together
IN_MEMORY = 2**17  # of a spool, at most


class Numbers(Protocol):
    """One of every record."""

    def __len__(self) -> int: ...
    def __getitem__(self, at: slice, /) -> ArrayLike: ...


def blocks(of: Numbers) -> Iterator[tuple[int, Ints]]:
    """The numbers in blocks, each with the place of its first."""
    for start in range(0, len(of), BLOCK):
        yield start, np.asarray(of[start : start + BLOCK], dtype=np.int32)


class Spool:
    """Numbers of one type that are added one after another and read by slices. Many lie in a file without a name, which is gone
    with the process; the children that it forks may read it, too, and one to which it is pickled has a copy."""

    def __init__(self, dtype: str, numbers: Iterable[int] = ()):
        self.dtype = np.dtype(dtype)
        self.file: IO[bytes] | None = None
        self.num_written = 0
        self.waiting: list[NDArray[Any]] = []
        self.num_waiting = 0
        self.extend(np.fromiter(numbers, self.dtype))

    def __reduce__(self) -> tuple[type, tuple[str, NDArray[Any]]]:
        return type(self), (self.dtype.str, self[:])

    def __len__(self) -> int:
        return self.num_written + self.num_waiting

    def extend(self, numbers: NDArray[Any]) -> None:
        """Adds them. Raises UserError where the disk is full."""
        self.waiting.append(numbers.astype(self.dtype))
        self.num_waiting += len(numbers)
        if self.num_waiting <= IN_MEMORY:
            return
        try:
            if self.file is None:
                self.file = tempfile.TemporaryFile()  # noqa: SIM115 - it lasts as long as the numbers
                weakref.finalize(self, self.file.close)
            for some in self.waiting:
                self.file.write(some.data)
            self.file.flush()
        except OSError as error:
            fix = "make room there, or set TMPDIR to a folder that has some"
            where = tempfile.tempdir or "the folder of temporary files"  # None where there is no such folder
            raise UserError(Problem(where, f"cannot be written ({error.strerror})", fix)) from error
        self.num_written += self.num_waiting
        self.waiting, self.num_waiting = [], 0

    def __getitem__(self, at: slice) -> NDArray[Any]:
        start, stop, step = at.indices(len(self))
        found = [self._read(start, min(stop, self.num_written))]
        if stop > self.num_written:
            behind = np.concatenate([np.zeros(0, self.dtype), *self.waiting])
            found.append(behind[max(0, start - self.num_written) : stop - self.num_written])
        return np.concatenate(found)[::step]

    def _read(self, start: int, stop: int) -> NDArray[Any]:
        if self.file is None or start >= stop:
            return np.zeros(0, self.dtype)
        size = self.dtype.itemsize
        if hasattr(os, "pread"):  # which leaves alone where other processes read
            return np.frombuffer(os.pread(self.file.fileno(), (stop - start) * size, start * size), self.dtype)
        self.file.seek(start * size)
        held = np.frombuffer(self.file.read((stop - start) * size), self.dtype)
        self.file.seek(0, os.SEEK_END)
        return held
