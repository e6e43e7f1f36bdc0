"""One value out of the middle of a parquet column, by its page alone: a row group may be gigabytes, a page is one megabyte.

What a page is made of is in github.com/apache/parquet-format, README.md and Encodings.md. Encodings that are rare for bytes, and
encryption, are not read here: `Unread` says so, and pyarrow reads the row group.
"""

import struct
from bisect import bisect_right
from collections import OrderedDict
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from qwenvl_ft.data.files.snappy import Blocks, find_blocks

KEPT_BYTES = 128 << 20  # of decompressed pages
LARGE_BYTES = 1 << 18  # of a page: one that Snappy compressed is not decompressed whole
HEAD_BYTES = 256  # of a page, in which its header is if it has no statistics
DATA, DICTIONARY, DATA_V2 = 0, 2, 3  # kinds of pages
PLAIN, PLAIN_DICTIONARY, RLE_DICTIONARY = 0, 2, 8
_LENGTH = struct.Struct("<I")
CODECS = {"SNAPPY": "snappy", "GZIP": "gzip", "BROTLI": "brotli", "ZSTD": "zstd", "LZ4_RAW": "lz4_raw"}


class Unread(Exception):
    """A column that is written in a way that is not read here."""


class Page(NamedTuple):
    """A page: where its body lies, its header by the numbers of Thrift's fields, and which of the column's slots is its first."""

    offset: int
    header: dict[int, Any]
    first: int


Body = memoryview | Blocks  # of a page; slices of either are bytes


class Values(NamedTuple):
    """The values of a page, which lie in `body` from each start to 4 bytes before the next; `which` they are of a dictionary's."""

    body: Body
    starts: NDArray[np.int64]
    which: NDArray[np.uint32] | None

    @property
    def num_bytes(self) -> int:
        """What it costs in memory."""
        return self.starts.nbytes + (len(self.body) if isinstance(self.body, memoryview) else self.body.starts.nbytes)

    def take(self, number: int) -> bytes:
        """One of them."""
        at = number if self.which is None else int(self.which[number])
        return bytes(self.body[int(self.starts[at]) : int(self.starts[at + 1]) - 4])


class Chunk:
    """The pages of one column in one row group. A slot is a value or a null; of lists each item is one, and so is an empty list."""

    def __init__(self, path: Path, file: pq.ParquetFile, group: int, column: str):
        self.path = path
        row_group, schema = file.metadata.row_group(group), file.schema
        leaves = [at for at in range(row_group.num_columns) if _leads_to_bytes(row_group.column(at).path_in_schema, column)]
        if len(leaves) != 1 or row_group.column(leaves[0]).physical_type != "BYTE_ARRAY":
            raise Unread
        of, leaf = row_group.column(leaves[0]), schema.column(leaves[0])
        self.most_defined, self.most_repeated = leaf.max_definition_level, leaf.max_repetition_level
        if self.most_repeated > 1 or (of.compression != "UNCOMPRESSED" and of.compression not in CODECS):
            raise Unread
        self.compression = of.compression
        self.codec = pa.Codec(CODECS[of.compression]) if of.compression in CODECS else None
        self.pages: list[Page] = []
        self.dictionary: Page | None = None
        self.words: Values | None = None
        start = of.data_page_offset if of.dictionary_page_offset is None else min(of.dictionary_page_offset, of.data_page_offset)
        self._find_pages(start, start + of.total_compressed_size)
        self.firsts = [page.first for page in self.pages]
        self.rows: NDArray[np.int64] | None = None  # of lists, the slot that each row begins with
        if self.most_repeated:
            levels = [self._levels(number)[0] for number in range(len(self.pages))]
            self.rows = np.flatnonzero(np.concatenate(levels) == 0)

    def _find_pages(self, at: int, end: int) -> None:
        slots = 0
        with self.path.open("rb") as file:
            while at < end:
                header, length = _page_header(file, at)
                page = Page(at + length, header, slots)
                if header[1] in (DATA, DATA_V2):
                    self.pages.append(page)
                    slots += header[5 if header[1] == DATA else 8][1]
                elif header[1] == DICTIONARY:
                    self.dictionary = page
                at += length + header[3]

    def value(self, row: int, item: int) -> bytes | None:
        """The bytes of a row of the group, of its list's `item` where there are lists."""
        slot = row if self.rows is None else int(self.rows[row]) + item
        if self.rows is not None and slot >= (self.rows[row + 1] if row + 1 < len(self.rows) else slot + 1):
            raise IndexError(f"row {row} has no {item}")
        at = bisect_right(self.firsts, slot) - 1
        defined, values = KEPT.get(self, at)
        if not 0 <= (place := slot - self.firsts[at]) < len(defined):
            raise IndexError(f"row {row} is in no page")
        if not defined[place]:
            return None
        return values.take(int(np.count_nonzero(defined[:place])))

    def body(self, page: Page) -> Body:
        """The page, decompressed, without the levels that the second version has before it."""
        before = page.header[8][5] + page.header[8][6] if page.header[1] == DATA_V2 else 0
        offset, length, size = page.offset + before, page.header[3] - before, page.header[2] - before
        plain = page.header[1] == DATA_V2 and not page.header[8].get(7, True)
        if self.compression == "SNAPPY" and not plain and size >= LARGE_BYTES:
            blocks = find_blocks(self.path, offset, length)
            if blocks is not None and len(blocks) == size:
                return blocks
        raw = self._read(offset, length)
        return memoryview(raw if self.codec is None or plain or not size else self.codec.decompress(raw, size)).cast("B")

    def _read(self, offset: int, length: int) -> bytes:
        with self.path.open("rb", buffering=0) as file:
            file.seek(offset)
            return file.read(length)

    def _levels(self, number: int) -> tuple[NDArray[np.uint32], NDArray[np.uint32], Body, int]:
        """(repetition levels, definition levels, the body, where in it the values begin) of a page."""
        page, found, at = self.pages[number], [], 0
        body = self.body(page)
        if page.header[1] == DATA_V2:
            head = page.header[8]
            levels = memoryview(self._read(page.offset, head[5] + head[6]))
            repeated, defined = levels[: head[6]], levels[head[6] :]
            return (
                hybrid(repeated, self.most_repeated.bit_length(), head[1]),
                hybrid(defined, self.most_defined.bit_length(), head[1]),
                body,
                0,
            )
        for most in (self.most_repeated, self.most_defined):
            length = 0
            if most:
                length, at = _LENGTH.unpack(body[at : at + 4])[0], at + 4
            found.append(hybrid(memoryview(body[at : at + length]), most.bit_length(), page.header[5][1]))
            at += length
        return found[0], found[1], body, at

    def decoded(self, number: int) -> tuple[NDArray[np.bool_], Values]:
        """Which slots of a page have a value, and the values."""
        page = self.pages[number]
        _, levels, body, at = self._levels(number)
        defined = levels == self.most_defined
        count = int(defined.sum())
        encoding = page.header[5][2] if page.header[1] == DATA else page.header[8][4]
        if encoding == PLAIN:
            return defined, plain_values(body, at, count)
        if encoding not in (PLAIN_DICTIONARY, RLE_DICTIONARY) or self.dictionary is None:
            raise Unread
        words = self._words()
        which = hybrid(memoryview(body[at + 1 :]), body[at : at + 1][0], count) if count else np.zeros(0, np.uint32)
        if count and which.max() >= len(words.starts) - 1:
            raise ValueError("a value that is not in the dictionary")
        return defined, words._replace(which=which)

    def _words(self) -> Values:
        """The values of the dictionary."""
        if self.words is None and self.dictionary is not None:
            self.words = plain_values(self.body(self.dictionary), 0, self.dictionary.header[7][1])
        assert self.words is not None
        return self.words


class Kept:
    """The pages that were decompressed last, of all files of a process."""

    def __init__(self) -> None:
        self.pages: OrderedDict[tuple[int, int], tuple[Chunk, NDArray[np.bool_], Values]] = OrderedDict()
        self.num_bytes = 0
        self.lock = Lock()

    def get(self, chunk: Chunk, number: int) -> tuple[NDArray[np.bool_], Values]:
        with self.lock:
            if (id(chunk), number) not in self.pages:
                self.pages[id(chunk), number] = chunk, *chunk.decoded(number)  # the chunk itself, so that no other has its id
                self.num_bytes += self.pages[id(chunk), number][2].num_bytes
                while len(self.pages) > 1 and self.num_bytes > KEPT_BYTES:
                    _, (_, _, gone) = self.pages.popitem(last=False)
                    self.num_bytes -= gone.num_bytes
            self.pages.move_to_end((id(chunk), number))
            return self.pages[id(chunk), number][1:]


KEPT = Kept()


def _leads_to_bytes(path: str, column: str) -> bool:
    return path == column or (path.startswith(f"{column}.") and path.rpartition(".")[2] in ("bytes", "element", "item"))


def plain_values(body: Body, at: int, count: int) -> Values:
    """Values that each stand behind their length, the first one's at a place of the body."""
    starts = np.zeros(count + 1, np.int64)
    for number in range(count):
        starts[number] = at = at + 4
        at += _LENGTH.unpack(body[at - 4 : at])[0]
        if at > len(body):
            raise ValueError("a value ends behind its page")
    starts[count] = at + 4
    return Values(body, starts, None)


def hybrid(body: memoryview, width: int, count: int) -> NDArray[np.uint32]:
    """Numbers of `width` bits in runs, or packed by eights (parquet's RLE / bit-packing hybrid)."""
    found = np.zeros(count, np.uint32)
    if not width:
        return found
    at = done = 0
    while done < count:
        head, at = varint(body, at)
        if head & 1:
            packed = body[at : at + (head >> 1) * width]
            if len(packed) < (head >> 1) * width:
                raise ValueError("levels end behind their page")
            bits = np.unpackbits(np.frombuffer(packed, np.uint8), bitorder="little").reshape(-1, width)
            run = bits @ (1 << np.arange(width, dtype=np.uint32))
            at += len(packed)
        else:
            size = (width + 7) // 8
            run = np.full(min(head >> 1, count - done), int.from_bytes(body[at : at + size], "little"), np.uint32)
            at += size
        if not len(run):
            raise ValueError("an empty run")
        found[done : done + len(run)] = run[: count - done]
        done += len(run)
    return found


def varint(body: bytes | memoryview, at: int) -> tuple[int, int]:
    """(a number of any length, where it ends)."""
    value = shift = 0
    while True:
        byte = body[at]
        value |= (byte & 127) << shift
        at += 1
        if byte < 128:
            return value, at
        shift += 7


def _page_header(file: Any, offset: int) -> tuple[dict[int, Any], int]:
    """(the header at this place of the file, its length)."""
    size = HEAD_BYTES
    while True:
        file.seek(offset)
        head = file.read(size)
        try:
            return thrift(head, 0)
        except IndexError:
            if len(head) < size:
                raise
            size *= 4


def thrift(body: bytes, at: int) -> tuple[dict[int, Any], int]:
    """(a struct of Thrift's compact protocol by the numbers of its fields, where it ends)."""
    found: dict[int, Any] = {}
    field = 0
    while kind := body[at]:
        at += 1
        if kind >> 4:
            field += kind >> 4
        else:
            number, at = varint(body, at)
            field = (number >> 1) ^ -(number & 1)
        found[field], at = _thrift_value(body, at, kind & 15)
    return found, at + 1


def _thrift_value(body: bytes, at: int, kind: int) -> tuple[Any, int]:
    if kind in (1, 2):
        return kind == 1, at
    if kind in (4, 5, 6):
        number, at = varint(body, at)
        return (number >> 1) ^ -(number & 1), at
    if kind == 8:
        length, at = varint(body, at)
        if at + length > len(body):
            raise IndexError
        return body[at : at + length], at + length
    if kind == 12:
        return thrift(body, at)
    raise Unread
