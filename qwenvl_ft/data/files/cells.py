"""The bytes that a row of a parquet or Arrow file holds, read in place and at random.

Each process opens a file once.
"""

import struct
from bisect import bisect_right
from collections import OrderedDict
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from qwenvl_ft.data.files.pages import Chunk, Unread
from qwenvl_ft.data.records import InTable

OPEN_FILES = 256
KEPT_BYTES = 256 << 20  # of row groups of one file


def cell(source: InTable) -> bytes:
    """The bytes of one cell. Raises OSError where the file does not hold them any more."""
    try:
        state = source.path.stat()
        found = _opened(source.path, state.st_size, state.st_mtime_ns).bytes_of(source)
    except (pa.ArrowException, LookupError, ValueError, struct.error, MemoryError) as error:
        raise OSError(f"row {source.row} cannot be read: {(str(error).splitlines() or ['?'])[0][:200]}") from error
    if not isinstance(found, bytes):
        raise OSError(f"row {source.row} holds no bytes")
    return found


@lru_cache(OPEN_FILES)
def _opened(path: Path, num_bytes: int, mtime_ns: int) -> "_Parquet | _Arrow":
    """The size and the time are those of the file, which may be another one the next time."""
    with path.open("rb") as file:
        is_parquet = file.read(4) == b"PAR1"
    return _Parquet(path) if is_parquet else _Arrow(path)


def _bytes_in(value: Any, item: int) -> Any:
    value = value[item] if item >= 0 else value
    return (value["bytes"] if isinstance(value, pa.StructScalar) else value).as_py()


class _Parquet:
    """By pages; by whole row groups, of which the last are kept, where its pages are of a kind that is rare."""

    def __init__(self, path: Path):
        self.path, self.file = path, pq.ParquetFile(path, memory_map=True)
        sizes = (self.file.metadata.row_group(group).num_rows for group in range(self.file.num_row_groups))
        self.starts = list(accumulate(sizes, initial=0))
        self.chunks: dict[tuple[str, int], Chunk | None] = {}
        self.kept: OrderedDict[tuple[str, int], pa.ChunkedArray] = OrderedDict()
        self.lock = Lock()

    def bytes_of(self, source: InTable) -> Any:
        group = bisect_right(self.starts, source.row) - 1
        row = source.row - self.starts[group]
        with self.lock:
            try:
                if (chunk := self.chunk(source.column, group)) is not None:
                    return chunk.value(row, source.item)
            except Unread:
                self.chunks[source.column, group] = None
            return _bytes_in(self.column(source.column, group)[row], source.item)

    def chunk(self, column: str, group: int) -> Chunk | None:
        if (column, group) not in self.chunks:
            self.chunks[column, group] = Chunk(self.path, self.file, group, column)
        return self.chunks[column, group]

    def column(self, name: str, group: int) -> pa.ChunkedArray:
        if (name, group) not in self.kept:
            self.kept[name, group] = self.file.read_row_group(group, columns=[name], use_threads=False).column(name)
        self.kept.move_to_end((name, group))
        while len(self.kept) > 1 and sum(of.nbytes for of in self.kept.values()) > KEPT_BYTES:
            self.kept.popitem(last=False)
        return self.kept[name, group]


class _Arrow:
    """Mapped into memory, so that nothing is read but what is asked for. Of a file whose batches are compressed (Feather) the last
    batch is kept; a compressed stream, whose batches can only be read in a row, is unpacked whole."""

    def __init__(self, path: Path):
        mapped = pa.memory_map(str(path))
        try:
            file = pa.ipc.open_file(mapped)
            self.batch = lru_cache(1)(file.get_batch)
            number = file.num_record_batches
        except pa.ArrowInvalid:
            mapped.seek(0)
            batches = list(pa.ipc.open_stream(mapped))
            self.batch, number = lru_cache(1)(batches.__getitem__), len(batches)
        self.starts = list(accumulate((self.batch(at).num_rows for at in range(number)), initial=0))

    def bytes_of(self, source: InTable) -> Any:
        at = bisect_right(self.starts, source.row) - 1
        return _bytes_in(self.batch(at).column(source.column)[source.row - self.starts[at]], source.item)
