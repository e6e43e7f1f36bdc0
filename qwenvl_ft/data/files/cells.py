"""The bytes that a row of a parquet or Arrow file holds, read in place and at random.

Each process opens a file once. Of a parquet file it keeps the row groups that it last read, at most KEPT_BYTES of them.
"""

from bisect import bisect_right
from collections import OrderedDict
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from qwenvl_ft.data.records import InTable

OPEN_FILES = 256
KEPT_BYTES = 256 << 20


def cell(source: InTable) -> bytes:
    """The bytes of one cell. Raises OSError where the file does not hold them any more."""
    try:
        state = source.path.stat()
        value = _opened(source.path, state.st_size, state.st_mtime_ns).value(source.column, source.row)
        if source.item >= 0:
            value = value[source.item]
        if isinstance(value, pa.StructScalar):
            value = value["bytes"]
        found = value.as_py()
    except (pa.ArrowException, LookupError) as error:
        raise OSError(f"row {source.row} cannot be read: {str(error).splitlines()[0][:200]}") from error
    if not isinstance(found, bytes):
        raise OSError(f"row {source.row} holds no bytes")
    return found


@lru_cache(OPEN_FILES)
def _opened(path: Path, num_bytes: int, mtime_ns: int) -> "_Parquet | _Arrow":
    """The size and the time are those of the file, which may be another one the next time."""
    with path.open("rb") as file:
        is_parquet = file.read(4) == b"PAR1"
    return _Parquet(path) if is_parquet else _Arrow(path)


class _Parquet:
    def __init__(self, path: Path):
        self.file = pq.ParquetFile(path, memory_map=True)
        sizes = (self.file.metadata.row_group(group).num_rows for group in range(self.file.num_row_groups))
        self.starts = list(accumulate(sizes, initial=0))
        self.kept: OrderedDict[tuple[str, int], pa.ChunkedArray] = OrderedDict()
        self.lock = Lock()

    def value(self, column: str, row: int) -> Any:
        group = bisect_right(self.starts, row) - 1
        return self.column(column, group)[row - self.starts[group]]

    def column(self, name: str, group: int) -> pa.ChunkedArray:
        with self.lock:
            if (name, group) in self.kept:
                self.kept.move_to_end((name, group))
                return self.kept[name, group]
            found = self.file.read_row_group(group, columns=[name], use_threads=False).column(name)
            self.kept[name, group] = found
            while len(self.kept) > 1 and sum(of.nbytes for of in self.kept.values()) > KEPT_BYTES:
                self.kept.popitem(last=False)
            return found


class _Arrow:
    """Mapped into memory, so that nothing is read but what is asked for; a compressed batch is unpacked each time."""

    def __init__(self, path: Path):
        mapped = pa.memory_map(str(path))
        try:
            file = pa.ipc.open_file(mapped)
            self.batches = [file.get_batch(at) for at in range(file.num_record_batches)]
        except pa.ArrowInvalid:
            mapped.seek(0)
            self.batches = list(pa.ipc.open_stream(mapped))
        self.starts = list(accumulate((batch.num_rows for batch in self.batches), initial=0))

    def value(self, column: str, row: int) -> Any:
        at = bisect_right(self.starts, row) - 1
        return self.batches[at].column(column)[row - self.starts[at]]
