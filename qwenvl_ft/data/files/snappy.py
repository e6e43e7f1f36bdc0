"""A part out of the middle of what Snappy compressed, without the rest.

Compressors take 64 KiB at a time, and none of these blocks refers to another: where each begins is found by walking through the
elements once. Source: github.com/google/snappy, format_description.txt and snappy.cc (kBlockSize).
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

BLOCK = 1 << 16
CODEC = pa.Codec("snappy")
WINDOW = 1 << 12  # bytes that are read where an element begins: most of what does not compress is passed over


class Blocks:
    """A compressed stream at `offset` of a file; `starts` are those of its blocks there, and its end. Slices are bytes of what was
    compressed."""

    def __init__(self, path: Path, offset: int, starts: NDArray[np.int64], num_bytes: int):
        self.path, self.offset, self.starts, self.num_bytes = path, offset, starts, num_bytes
        self.last = (-1, b"")  # the block that a few bytes were cut from last, and what is in it

    def __len__(self) -> int:
        return self.num_bytes

    def __getitem__(self, part: slice) -> bytes:
        start, end, _ = part.indices(self.num_bytes)
        if start >= end:
            return b""
        first, last = start // BLOCK, (end - 1) // BLOCK
        if end - start < WINDOW and first == last:
            if self.last[0] != first:
                self.last = first, bytes(self._decompressed(first, first))
            return self.last[1][start - first * BLOCK : end - first * BLOCK]
        return bytes(self._decompressed(first, last)[start - first * BLOCK : end - first * BLOCK])

    def _decompressed(self, first: int, last: int) -> memoryview:
        """Blocks one after another are a stream of their own."""
        size = min((last + 1) * BLOCK, self.num_bytes) - first * BLOCK
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset + int(self.starts[first]))
            raw = file.read(int(self.starts[last + 1] - self.starts[first]))
        return memoryview(CODEC.decompress(_varint(size) + raw, size)).cast("B")


def find_blocks(path: Path, offset: int, end: int) -> Blocks | None:
    """The blocks of a stream of `end` bytes that lies at `offset` of a file; None where it is not made of blocks.

    Raises IndexError where it breaks off.
    """
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        window, begins = file.read(min(WINDOW, end)), 0  # where in the stream the window does
        size = at = shift = 0
        while True:
            byte = window[at]
            size, shift, at = size | (byte & 127) << shift, shift + 7, at + 1
            if byte < 128:
                break
        starts, done, due = [at], 0, BLOCK
        while at < end:
            here = at - begins
            if here + 5 > len(window) and begins + len(window) < end:
                file.seek(offset + at)
                window, begins, here = file.read(min(WINDOW, end - at)), at, 0
            tag = window[here]
            kind, length = tag & 3, (tag >> 2) + 1
            if kind == 0:  # letters
                if length > 60:
                    extra = length - 60
                    length = int.from_bytes(window[here + 1 : here + 1 + extra], "little") + 1
                    at += extra
                at += 1 + length
            elif kind == 1:  # what stood before, at a distance of 11 bits
                length, at = (tag >> 2 & 7) + 4, at + 2
            else:
                at += 3 if kind == 2 else 5
            done += length
            if done >= due:
                if done > due:
                    return None
                starts.append(at)
                due += BLOCK
    if done != size:
        return None
    return Blocks(path, offset, np.array(starts if starts[-1] == end else [*starts, end], np.int64), size)


def _varint(number: int) -> bytes:
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found, number])
