"""The bytes of a picture or a film, wherever they lie: in a file, in a tar, in a row of a table. Nothing is unpacked.

Whatever cannot be read is an OSError.
"""

import re
from io import BytesIO
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from qwenvl_ft.data.magic import PICTURE_ENDINGS
from qwenvl_ft.data.records import InTable, InTar, Source

NUMBER = re.compile(r"(\d+)")


class Stamp(NamedTuple):
    """What tells a file from what it was before."""

    path: Path
    num_bytes: int
    mtime_ns: int


def natural(text: str) -> list[int | str]:
    """What sorts a2 before a10."""
    return [int(part) if part.isdecimal() else part for part in NUMBER.split(text)]


def paths_of(name: str) -> list[str]:
    """What a name may mean: itself, or of a file:// URL what follows, as it stands, which is how Qwen's own reader takes it, or
    with its %20 and the like read."""
    if not name.startswith("file://"):
        return [name]
    rest = name.removeprefix("file://")
    return [*dict.fromkeys((rest, unquote(rest), unquote(rest).removeprefix("localhost")))]


def frames_of(folder: Path) -> list[Path]:
    """The pictures of a folder, a2 before a10."""
    found = [path for path in folder.iterdir() if path.suffix.lower().lstrip(".") in PICTURE_ENDINGS and path.is_file()]
    return sorted(found, key=lambda path: natural(path.name))


def holder(source: Source) -> Path:
    """The file that holds the bytes."""
    return source if isinstance(source, Path) else source.path


def stamp(source: Source) -> Stamp:
    """The holder as it is now."""
    path = holder(source)
    state = path.stat()
    return Stamp(path, state.st_size, state.st_mtime_ns)


def key(source: Source) -> str:
    """A text that no other source has; sources sort by it."""
    if isinstance(source, Path):
        return str(source)
    if isinstance(source, InTar):
        return f"{source.path}\0{source.offset:020}\0{source.num_bytes}"
    return f"{source.path}\0{source.column}\0{source.row:020}\0{source.item}"


def place(source: Source) -> str:
    """Where a person finds it."""
    return str(source) if isinstance(source, Path) else f"{source.path}, {source.name}"


def num_bytes(source: Source) -> int | None:
    """How many bytes it has; None where that is not known without reading them."""
    if isinstance(source, Path):
        return source.stat().st_size
    return source.num_bytes if isinstance(source, InTar) else None


def opened(source: Source) -> Path | BytesIO:
    """What Pillow and PyAV open: the file itself, or its bytes."""
    return source if isinstance(source, Path) else BytesIO(read(source))


def read(source: Source) -> bytes:
    """All bytes."""
    if isinstance(source, Path):
        return source.read_bytes()
    if isinstance(source, InTable):
        from qwenvl_ft.data.files.cells import cell

        return cell(source)
    with source.path.open("rb") as file:  # 10 µs, so none is kept open
        file.seek(source.offset)
        found = file.read(source.num_bytes)
    if len(found) < source.num_bytes:
        raise OSError(f"{source.path.name} ends within {source.name}")
    return found
