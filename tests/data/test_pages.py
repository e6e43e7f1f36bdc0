"""Values out of the middle of a parquet file, whichever way it is written, are those that pyarrow reads from the whole."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qwenvl_ft.data import sources
from qwenvl_ft.data.files.snappy import Blocks, find_blocks
from qwenvl_ft.data.records import InTable

IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})
WRITTEN = {
    "as it comes": {}, "small pages": {"data_page_size": 500}, "small groups": {"row_group_size": 7, "data_page_size": 300},
    "no dictionary": {"use_dictionary": False, "data_page_size": 500}, "second version": {"data_page_version": "2.0", "data_page_size": 500},
    "second version, plain": {"data_page_version": "2.0", "compression": "none"}, "plain": {"compression": "none", "data_page_size": 500},
    "zstd": {"compression": "zstd"}, "gzip": {"compression": "gzip"}, "brotli": {"compression": "brotli"},
    "index": {"write_page_index": True, "data_page_size": 500}, "by content": {"use_content_defined_chunking": True},
    "small dictionary": {"dictionary_pagesize_limit": 2000, "data_page_size": 500}, "checksums": {"write_page_checksum": True},
}  # fmt: skip


@pytest.fixture(scope="module")
def table() -> pa.Table:
    random = np.random.default_rng(0)

    def value() -> bytes | None:
        return None if random.random() < 0.2 else random.bytes(int(random.integers(0, 200))) * int(random.integers(1, 3))

    def image() -> dict | None:
        return None if random.random() < 0.1 else {"bytes": value(), "path": "x" if random.random() < 0.5 else None}

    def some(make) -> list | None:
        return None if random.random() < 0.1 else [make() for _ in range(int(random.integers(0, 5)))]

    rows = 150
    return pa.table({
        "n": range(rows), "raw": pa.array([value() for _ in range(rows)], pa.binary()), "image": pa.array([image() for _ in range(rows)], IMAGE),
        "raws": pa.array([some(value) for _ in range(rows)], pa.list_(pa.binary())), "images": pa.array([some(image) for _ in range(rows)], pa.list_(IMAGE)),
        "few": pa.array([random.choice([b"a", b"bb", b""]) for _ in range(rows)], pa.large_binary()),
    })  # fmt: skip


def held(table: pa.Table, file: Path) -> list[tuple[InTable, bytes]]:
    """Every cell that holds bytes, and they."""
    found = []
    for column in table.column_names[1:]:
        for row, value in enumerate(table.column(column).to_pylist()):
            for item, one in enumerate(value) if isinstance(value, list) else [(-1, value)]:
                content = one.get("bytes") if isinstance(one, dict) else one
                if content is not None:
                    found.append((InTable(file, "x", column, row, item), content))
    return found


@pytest.mark.parametrize("name", WRITTEN)
def test_every_value_is_the_one_that_pyarrow_reads(name, table, tmp_path, monkeypatch):
    pq.write_table(table, tmp_path / "a.parquet", **WRITTEN[name])
    wanted = held(pq.read_table(tmp_path / "a.parquet"), tmp_path / "a.parquet")
    assert len(wanted) > 400
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", None)  # so it is by their pages that they are found
    order = np.random.default_rng(1).permutation(len(wanted))
    assert [sources.read(wanted[at][0]) for at in order] == [wanted[at][1] for at in order]


def test_a_column_of_a_rare_encoding_is_read_by_pyarrow(table, tmp_path):
    encoding = {"raw": "DELTA_LENGTH_BYTE_ARRAY", "few": "DELTA_BYTE_ARRAY"}
    for way in ({"use_dictionary": False, "column_encoding": encoding}, {"compression": "lz4"}):
        pq.write_table(table, tmp_path / "a.parquet", row_group_size=40, **way)
        for source, wanted in held(table, tmp_path / "a.parquet"):
            assert sources.read(source) == wanted


def test_what_is_not_there_is_an_os_error(table, tmp_path):
    file = tmp_path / "a.parquet"
    pq.write_table(table, file)
    for column, row, item in (("raw", 150, -1), ("raw", -1, -1), ("images", 3, 9), ("none", 0, -1), ("n", 0, -1)):
        with pytest.raises(OSError):
            sources.read(InTable(file, "x", column, row, item))
    null = table.column("raw").to_pylist().index(None)
    with pytest.raises(OSError, match="holds no bytes"):
        sources.read(InTable(file, "x", "raw", null))


@pytest.mark.parametrize(
    "written", [{}, {"use_dictionary": False}, {"data_page_version": "2.0", "use_dictionary": False}, {"row_group_size": 100}]
)
def test_a_large_page_is_read_by_its_blocks(written, tmp_path, monkeypatch):
    """Of pictures, which do not compress, of drawings, which do, and of what lies across several blocks of 64 KiB."""
    random = np.random.default_rng(0)
    wanted = [
        None
        if at % 7 == 3
        else random.bytes(int(random.integers(0, 200_000)))
        if at % 2
        else b"abc%d" % at * int(random.integers(0, 50_000))
        for at in range(200)
    ]
    pq.write_table(pa.table({"raw": wanted}), tmp_path / "a.parquet", **written)
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", None)
    cut = []
    real = Blocks.__getitem__
    monkeypatch.setattr(Blocks, "__getitem__", lambda self, part: (cut.append(part.stop - part.start), real(self, part))[1])
    for at in random.permutation(200):
        if wanted[at] is not None:
            assert sources.read(InTable(tmp_path / "a.parquet", "x", "raw", int(at))) == wanted[at]
    assert len(cut) > 150 and max(cut) == max(len(value) for value in wanted if value)


def test_what_is_not_made_of_blocks_is_not_taken_for_it(tmp_path):
    whole = pa.Codec("snappy").compress(np.random.default_rng(0).bytes(200_000)).to_pybytes()
    (tmp_path / "whole").write_bytes(b"..." + whole)
    assert len(find_blocks(tmp_path / "whole", 3, len(whole))) == 200_000
    letters = bytes(70_000)
    of_one = b"\xf0\xa2\x04" + bytes([62 << 2]) + (len(letters) - 1).to_bytes(3, "little") + letters
    assert pa.Codec("snappy").decompress(of_one, 70_000).to_pybytes() == letters
    (tmp_path / "one").write_bytes(of_one)
    assert find_blocks(tmp_path / "one", 0, len(of_one)) is None
