"""Parquet, Arrow and Feather files, and the folders that `datasets` saves: rows in batches, pictures left where they are.

A column of bytes, of Hugging Face's Image feature (a struct of bytes and path), or of lists of them becomes InTable; a struct
with a path alone becomes the path. What is null is as if it were not there.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from qwenvl_ft.data.files.csv_table import nested
from qwenvl_ft.data.files.entry import Entry
from qwenvl_ft.data.records import InTable
from qwenvl_ft.errors import Problem, UserError

BATCH_ROWS = 256
STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"
AGAIN = "copy it again from its source"
# What a damaged file makes Arrow raise, and its bytes where they are made values of Python.
DAMAGED = (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError)


def table_entries(file: Path, name: str, is_parquet: bool) -> Iterator[Entry]:
    """Each row as NAME[row]."""
    row = 0
    try:
        for batch in _parquet(file) if is_parquet else _arrow(file):
            batch.validate(full=True)
            columns = {column: _values(batch.column(column), file, column, row) for column in batch.schema.names}
            for at in range(batch.num_rows):
                where = f"{name}[{row + at}]"
                entry = {column: values[at] for column, values in columns.items() if values[at] is not None}
                yield Entry(where, _checked(entry, where), empty=[column for column in columns if column not in entry])
            row += batch.num_rows
    except DAMAGED as error:
        said = (str(error).splitlines() or [""])[0][:200]
        yield Entry("", Problem(name, f"is a damaged {'parquet' if is_parquet else 'Arrow'} file: {said}", AGAIN))
        return
    if not row:
        yield Entry("", Problem(name, "holds no rows", "give a table with a record a row"))


def split_files(folder: Path) -> list[Path]:
    """The Arrow files of what `datasets` saved, in their order. Raises UserError where they are not there."""
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(path.parent.name for path in folder.glob("*/state.json"))
        fix = f"name one: {folder / splits[0]}" if splits else "save it again with save_to_disk"
        raise UserError(Problem(str(folder), f"holds {len(splits)} splits: {', '.join(splits)}", fix))
    try:
        files = [folder / str(of["filename"]) for of in json.loads((folder / "state.json").read_bytes())["_data_files"]]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(Problem(str(folder / "state.json"), "does not list the files of a data set", AGAIN)) from error
    if lacking := [file for file in files if not file.is_file()]:
        raise UserError(*(Problem(str(file), "is not there, and state.json lists it", AGAIN) for file in lacking))
    return files


def _parquet(file: Path) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(file) as opened:
        rows = 0
        for group in range(opened.num_row_groups):  # each by itself: over several, pyarrow keeps what it has read of all
            for batch in opened.iter_batches(BATCH_ROWS, row_groups=[group], use_threads=False):
                rows += batch.num_rows
                yield batch
        if rows != opened.metadata.num_rows:
            raise ValueError(f"it holds {rows} rows and says {opened.metadata.num_rows}")


def _arrow(file: Path) -> Iterator[pa.RecordBatch]:
    with pa.memory_map(str(file)) as mapped:
        if mapped.read(6) == b"ARROW1":
            opened = pa.ipc.open_file(mapped)
            for at in range(opened.num_record_batches):
                yield from _cut(opened.get_batch(at))
            return
        mapped.seek(max(0, mapped.size() - len(STREAM_END)))
        if mapped.read() != STREAM_END:
            raise ValueError("it ends without its end mark, so it was cut off")
        mapped.seek(0)
        for batch in pa.ipc.open_stream(mapped):
            yield from _cut(batch)


def _cut(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    for at in range(0, batch.num_rows, BATCH_ROWS):
        yield batch.slice(at, BATCH_ROWS)


def _values(column: pa.Array, file: Path, name: str, first: int) -> list[Any]:
    """The cells of a column of a batch whose first row is `first` of the file."""
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    listed = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
    inner = column.flatten() if listed else column
    if not _holds_bytes(inner.type):
        return [_plain(value) for value in column.to_pylist()]
    held = _held(inner)  # of each (has bytes, path), or None

    def medium(at: int, row: int, item: int) -> InTable | str | None:
        if (kept := held[at]) is None:
            return None
        has_bytes, path = kept
        said = path or f"{name} of row {row}" + (f", {item}" if item >= 0 else "")
        return InTable(file, said, name, row, item) if has_bytes else path

    if not listed:
        return [medium(at, first + at, -1) for at in range(len(column))]
    found, at = list[Any](), 0
    for row, length in enumerate(pc.list_value_length(column).to_pylist(), first):
        found.append(None if length is None else [medium(at + item, row, item) for item in range(length)])
        at += length or 0
    return found


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        at = kind.get_field_index("bytes")
        return at >= 0 and _is_binary(kind.field(at).type) and {field.name for field in kind} <= {"bytes", "path"}
    return _is_binary(kind)


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _held(inner: pa.Array) -> list[tuple[bool, str | None] | None]:
    if not pa.types.is_struct(inner.type):
        return [(True, None) if valid else None for valid in inner.is_valid().to_pylist()]
    has_bytes = pc.struct_field(inner, "bytes").is_valid().to_pylist()
    has_path = inner.type.get_field_index("path") >= 0
    paths = pc.struct_field(inner, "path").to_pylist() if has_path else [None] * len(inner)
    both = zip(inner.is_valid().to_pylist(), has_bytes, paths, strict=True)
    return [(has, path) if valid and (has or path) else None for valid, has, path in both]


def _plain(value: Any) -> Any:
    """As JSON would have it: no key that is null, texts for times."""
    if isinstance(value, dict):
        return {key: _plain(held) for key, held in value.items() if held is not None}
    if isinstance(value, list):
        return [_plain(held) for held in value]
    return value if value is None or isinstance(value, str | int | float | bytes) else str(value)


def _checked(entry: dict[str, Any], where: str) -> Any:
    for column, value in entry.items():
        if _has_bytes(value):
            return Problem(f"{where}.{column}", "holds bytes within other things", "put its pictures into a column of their own")
    return nested(entry, where)


def _has_bytes(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_has_bytes, value.values()))
    return any(map(_has_bytes, value)) if isinstance(value, list) else isinstance(value, bytes)
