"""The prepared table: the scripts of all records in files that are mapped into memory, each made when it is asked for.

    scripts.arrow   a row a script: where, ids, what is taught, counts, grids, the numbers of its media
    numbers.i32     of each script NUMBERS: its length, its taught tokens, its media's tokens, its record's number, what it shares
    media.arrow     a row a medium, each different one once: the picture or video as JSON
    files.arrow     the files that hold them, with size and both times, and names that were not there
    facts.json      counts, problems, notes, hashes

Rows and numbers are read in place: processes share their pages, and a million records take none of their memory. The Arrow files
are streams, as `datasets` writes them: `datasets.Dataset.from_file` opens them, too.
"""

import hashlib
import json
import mmap
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from qwenvl_ft.console import writable
from qwenvl_ft.data.chat import IGNORE, Script
from qwenvl_ft.data.numbers import Ints
from qwenvl_ft.data.packed import LISTS, NUMBERS, FileState, Packed, PackedMedium, read_medium
from qwenvl_ft.data.records import Medium

if TYPE_CHECKING:
    import pyarrow

FACTS = "facts.json"
BATCH_BYTES = 8 << 20  # of what is written at once
ROW_BYTES = 4 * len(NUMBERS)
MOST_SEEN = 50_000  # files that are remembered while a table is written


class TableWriter:
    """Writes a table part by part, and remembers 16 bytes of each different medium."""

    def __init__(self, folder: Path):
        self.folder = folder
        whole = dict.fromkeys(("num_bytes", "mtime_ns", "ctime_ns"), "int64")
        self.scripts = _Stream(folder / "scripts.arrow", {"where": "string"} | dict.fromkeys(LISTS, "list"))
        self.media = _Stream(folder / "media.arrow", {"medium": "string"})
        self.files = _Stream(folder / "files.arrow", {"path": "string"} | whole)
        self.numbers = (folder / "numbers.i32").open("wb")
        self.index: dict[bytes, int] = {}  # of each medium, by its digest
        self.seen: set[str] = set()  # of the files: a tar comes again with each part, and twice does no harm
        self.hashes = {name: hashlib.sha256() for name in ("ids", "taught", "grids", "media", "digests")}
        self.num_records = self.num_pictures = self.num_shrunk = 0

    def add(self, scripts: Packed, media: Sequence[PackedMedium], num_records: int) -> list[PackedMedium]:
        """One part: `num_records` of the file, and what they came to. Returns the media that were not there before."""
        import pyarrow as pa

        new = self._add_media(media)
        numbers = np.array([self.index[medium.digest] for medium in media], np.int32)
        if scripts.where:
            columns = scripts.columns | {"media": (numbers[scripts.columns["media"][0]], scripts.columns["media"][1])}
            for name in ("ids", "taught", "grids", "media"):
                for values in columns[name]:
                    self.hashes[name].update(values.tobytes())
            lists = [
                pa.ListArray.from_arrays(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32), values)
                for values, counts in (columns[name] for name in LISTS)
            ]
            self.scripts.add(pa.record_batch([pa.array(map(writable, scripts.where), pa.string()), *lists], ["where", *LISTS]))
            before = [self.num_records if name == "record" else 0 for name in NUMBERS]
            self.numbers.write((scripts.numbers + np.array(before, np.int32)).tobytes())
        self.num_records += num_records
        return new

    def _add_media(self, media: Sequence[PackedMedium]) -> list[PackedMedium]:
        new = [medium for medium in media if medium.digest not in self.index]
        for medium in new:
            self.index[medium.digest] = len(self.index)
            self.hashes["digests"].update(medium.digest)
            self.num_pictures += medium.is_picture
            self.num_shrunk += medium.is_shrunk
        if new:
            self.media.add(_batch({"medium": [medium.text for medium in new]}))
            self.add_files([state for medium in new for state in medium.files])
        return new

    def add_files(self, states: Sequence[FileState]) -> None:
        """Files that the table depends on."""
        new = [state for state in dict.fromkeys(states) if state.path not in self.seen]
        if len(self.seen) > MOST_SEEN:
            self.seen.clear()
        self.seen.update(state.path for state in new)
        if new:
            columns = dict(zip(FileState._fields, zip(*new, strict=True), strict=True))
            self.files.add(_batch(columns | {"path": [json.dumps(state.path) for state in new]}))

    def close(self, facts: dict[str, Any]) -> None:
        """Nothing comes any more; these are the facts, with what is counted here."""
        for stream in (self.scripts, self.media, self.files, self.numbers):
            stream.close()
        counted = {"records": self.num_records, "pictures": self.num_pictures, "pictures_shrunk": self.num_shrunk}
        hashes = {name: made.hexdigest() for name, made in self.hashes.items()}
        text = json.dumps(counted | {"hashes": hashes} | facts)
        (self.folder / FACTS).write_text(text, encoding="utf-8")


class _Stream:
    """An Arrow file in the making. Small batches are written as one: whoever opens the file touches each of them, and the system
    brings 64 KiB around what is touched."""

    def __init__(self, path: Path, columns: dict[str, str]):
        import pyarrow as pa

        types = {"string": pa.string(), "int64": pa.int64(), "list": pa.list_(pa.int32())}
        self.stream = pa.ipc.new_stream(str(path), pa.schema([(name, types[kind]) for name, kind in columns.items()]))
        self.waiting: list[pyarrow.RecordBatch] = []

    def add(self, batch: "pyarrow.RecordBatch") -> None:
        """One more."""
        self.waiting.append(batch)
        if sum(of.nbytes for of in self.waiting) >= BATCH_BYTES:
            self._write()

    def close(self) -> None:
        """Nothing comes any more."""
        self._write()
        self.stream.close()

    def _write(self) -> None:
        import pyarrow as pa

        if self.waiting:
            self.stream.write_table(pa.Table.from_batches(self.waiting).combine_chunks())
        self.waiting = []


def _batch(columns: dict[str, Sequence[Any]]) -> "pyarrow.RecordBatch":
    import pyarrow as pa

    texts = ("medium", "path")
    arrays = {name: pa.array(values, pa.string() if name in texts else pa.int64()) for name, values in columns.items()}
    return pa.record_batch(list(arrays.values()), list(arrays))


class Column:
    """One of the NUMBERS of every script. What was read is not kept in memory: of a table of millions of scripts that would be as
    much again in each process."""

    def __init__(self, numbers: mmap.mmap | bytes, at: int):
        self.numbers, self.at = numbers, at

    def __len__(self) -> int:
        return len(self.numbers) // ROW_BYTES

    @overload
    def __getitem__(self, number: int) -> int: ...
    @overload
    def __getitem__(self, number: slice) -> Ints: ...
    def __getitem__(self, number: int | slice) -> int | Ints:
        if not isinstance(number, slice):
            return int(self[number : number + 1][0])
        start, stop, step = number.indices(len(self))
        held = self.numbers[start * ROW_BYTES : stop * ROW_BYTES]  # a copy
        if isinstance(self.numbers, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):  # Windows has none
            page = start * ROW_BYTES // mmap.PAGESIZE * mmap.PAGESIZE
            self.numbers.madvise(mmap.MADV_DONTNEED, page, stop * ROW_BYTES - page)
        found: Ints = np.frombuffer(held, np.int32)[self.at :: len(NUMBERS)][::step]
        return found


class Scripts(Sequence[Script]):
    """The scripts of a table, in the order of their records. It goes to another process as the name of its folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.facts: dict[str, Any] = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        self.placeholders = tuple(self.facts["placeholders"])
        # Now, not when they are asked for: the folder may be taken away while a run goes on.
        with (folder / "numbers.i32").open("rb") as file:
            numbers = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if os.fstat(file.fileno()).st_size else b""
        columns = (Column(numbers, at) for at in range(len(NUMBERS)))
        self.lengths, self.taught, self.media_tokens, self.records, self.back, self.shared, self.num_media = columns
        self._table, self._media = _mapped(folder / "scripts.arrow"), _mapped(folder / "media.arrow").column("medium")

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        return type(self), (self.folder,)

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, number: int) -> Script: ...
    @overload
    def __getitem__(self, number: slice) -> list[Script]: ...
    def __getitem__(self, number: int | slice) -> Script | list[Script]:
        if isinstance(number, slice):
            return [self[at] for at in range(len(self))[number]]
        at = range(len(self))[number]
        ids, taught, counts, grids, media = (self._table.column(name)[at].values.to_numpy().tolist() for name in LISTS)
        labels = [IGNORE] * len(ids)
        for start, end in zip(taught[::2], taught[1::2], strict=True):
            labels[start:end] = ids[start:end]
        sides = iter(grids)
        shown = [read_medium(self._media[medium].as_py()) for medium in media]
        return Script(self.where(at), ids, labels, shown, list(zip(sides, sides, sides, strict=True)), counts, self.placeholders)

    def where(self, number: int) -> str:
        """The place of a script's record."""
        place: str = self._table.column("where")[int(number)].as_py()
        return place

    @property
    def media(self) -> Iterator[Medium]:
        """Each different one."""
        return (read_medium(text) for chunk in self._media.chunks for text in chunk.to_pylist())

    @property
    def files(self) -> Iterator[FileState]:
        """The files that hold the media, as they were, and those that were not there."""
        for batch in _mapped(self.folder / "files.arrow").to_batches():
            names, *numbers = (column.to_pylist() for column in batch.columns)
            yield from map(FileState._make, zip(map(json.loads, names), *numbers, strict=True))


def _mapped(path: Path) -> "pyarrow.Table":
    import pyarrow as pa

    return pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
