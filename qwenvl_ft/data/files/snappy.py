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


class Blocks:
    """A compressed stream at `offset` of a file; `starts` are those of its blocks there, and its end."""

    def __init__(self, path: Path, offset: int, starts: NDArray[np.int64], num_bytes: int):
        self.path, self.offset, self.starts, self.num_bytes = path, offset, starts, num_bytes

    def cut(self, start: int, end: int) -> bytes:
        """The bytes from `start` to `end` of what was compressed."""
        if start == end:
            return b""
        first, last = start // BLOCK, (end - 1) // BLOCK
        with self.path.open("rb") as file:
            file.seek(self.offset + int(self.starts[first]))
            raw = file.read(int(self.starts[last + 1] - self.starts[first]))
        found = []
        for at in range(first, last + 1):
            size = min(BLOCK, self.num_bytes - at * BLOCK)
            block = raw[self.starts[at] - self.starts[first] : self.starts[at + 1] - self.starts[first]]
            found.append(CODEC.decompress(_varint(size) + block, size).to_pybytes())
        return b"".join(found)[start - first * BLOCK : end - first * BLOCK]


def find_blocks(path: Path, offset: int, raw: bytes) -> Blocks | None:
    """The blocks of a stream that lies at `offset` of a file; None where it is not made of blocks."""
    size = at = shift = 0
    while True:
        byte = raw[at]
        size, shift, at = size | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            break
    starts, done, due, end = [at], 0, BLOCK, len(raw)
    while at < end:
        tag = raw[at]
        kind, length = tag & 3, (tag >> 2) + 1
        if kind == 0:  # letters
            if length > 60:
                extra = length - 60
                length = int.from_bytes(raw[at + 1 : at + 1 + extra], "little") + 1
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
