"""Scripts and media as arrays and texts: how they go from process to process, and into a table."""

import hashlib
import json
import os
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from qwenvl_ft.data.chat import IGNORE, Chat, Script
from qwenvl_ft.data.geometry import resized, shrunk
from qwenvl_ft.data.mirror import called
from qwenvl_ft.data.numbers import Ints
from qwenvl_ft.data.packing import LEAST_SHARED
from qwenvl_ft.data.records import InTable, InTar, Medium, Picture, Video
from qwenvl_ft.data.sources import holder

LISTS = ("ids", "taught", "counts", "grids", "media")  # the columns of numbers; `taught` are starts and ends of spans
# Of each script one. `back`: how many scripts ago stood the last one, of those that were read together, that shows the same media
# and begins alike, 0 for none; `shared`: the tokens that both begin with; `shown`: its media.
NUMBERS = ("length", "taught", "media_tokens", "record", "back", "shared", "shown")
GONE = -1  # the size of a file that is not there


@dataclass
class Packed:
    """Scripts as arrays: of each column the numbers of all, and how many are whose. `numbers` is (scripts, NUMBERS)."""

    where: list[str] = field(default_factory=list)
    columns: dict[str, tuple[Ints, Ints]] = field(default_factory=dict)
    numbers: Ints = field(default_factory=lambda: np.zeros((0, len(NUMBERS)), np.int32))


def prefix(script: Script) -> tuple[int, ...]:
    """The ids that scripts have in common if they share anything: those up to the last medium, or the least that is shared."""
    shown = (at for at, id in enumerate(script.ids) if id in script.placeholders)
    return tuple(script.ids[: max(shown, default=LEAST_SHARED - 1) + 1])


def pack_scripts(scripts: Sequence[tuple[int, Script]], media: Mapping[Medium, int]) -> Packed:
    """Scripts, each with the number of its record, whose media have these numbers."""
    columns = {name: (array("i"), array("i")) for name in LISTS}
    numbers = array("i")
    last = dict[tuple[object, ...], tuple[int, Script]]()  # by the media that it shows, and how it begins
    for at, (number, script) in enumerate(scripts):
        spans = spans_of(script)
        held: dict[str, Sequence[int]] = {
            "ids": script.ids, "taught": spans, "counts": script.counts,
            "grids": [side for grid in script.grids for side in grid], "media": (shown := [media[of] for of in script.media]),
        }  # fmt: skip
        for name, values in held.items():
            columns[name][0].extend(values)
            columns[name][1].append(len(values))
        before, other = last.get(begins := (*shown, prefix(script)), (at, script))
        last[begins] = at, script
        shared = script.shared_with(other) if at > before else 0
        taught = sum(spans[1::2]) - sum(spans[::2])
        numbers.extend((script.length, taught, sum(script.counts), number, at - before, shared, len(shown)))
    arrays = {name: (np.array(values, np.int32), np.array(counts, np.int32)) for name, (values, counts) in columns.items()}
    return Packed([script.where for _, script in scripts], arrays, np.array(numbers, np.int32).reshape(-1, len(NUMBERS)))


def spans_of(script: Script) -> list[int]:
    """Starts and ends of what is taught, one after another."""
    taught = np.array([IGNORE, *script.labels, IGNORE]) != IGNORE
    spans: list[int] = np.flatnonzero(taught[1:] != taught[:-1]).tolist()
    assert all(script.ids[start:end] == script.labels[start:end] for start, end in zip(spans[::2], spans[1::2], strict=True))
    return spans


class FileState(NamedTuple):
    """A file with what changes when it does; GONE where it is not there."""

    path: str
    num_bytes: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, path: str) -> "FileState":
        """As it is now."""
        try:
            state = os.stat(path)
        except (OSError, ValueError):
            return cls(path, GONE, 0, 0)
        return cls(path, state.st_size, state.st_mtime_ns, state.st_ctime_ns)


@dataclass
class PackedMedium:
    """A medium as JSON, the digest the same for equal ones, with the files that hold it.

    `area` is a picture's, in px as the model sees it, and `is_shrunk` whether it is made smaller for that; without a chat, and of
    a video, 0 and false.
    """

    text: str
    digest: bytes
    files: list[FileState]
    is_picture: bool
    is_shrunk: bool = False
    area: int = 0


def holders(medium: Medium) -> Iterator[str]:
    """The files that hold its bytes."""
    held = medium.source if isinstance(medium.source, tuple) else (medium.source,)
    return (str(holder(source)) for source in held if not isinstance(source, Image.Image))


def pack_medium(medium: Medium, chat: Chat | None) -> PackedMedium:
    """With a chat, as its model would see it."""
    values = {part.name: getattr(medium, part.name) for part in fields(medium)} | {"source": _written(medium.source)}
    compared = [values[part.name] for part in fields(medium) if part.compare]
    compared[0] = _written(medium.source, called)  # a copy by its address: another machine's cache lies elsewhere
    digest = hashlib.blake2b(json.dumps([medium.kind, compared]).encode(), digest_size=16).digest()
    paths = dict.fromkeys(holders(medium))
    if isinstance(medium.source, tuple):  # frames: one more in their folder changes what the folder means
        paths |= dict.fromkeys(str(Path(path).parent) for path in paths)
    packed = PackedMedium(json.dumps([medium.kind, *values.values()]), digest, list(map(FileState.of, paths)), False)
    if isinstance(medium, Picture):
        packed.is_picture = True
        if chat:
            limits = chat.limits.of(medium)
            height, width = resized(medium.height, medium.width, limits)
            packed.is_shrunk, packed.area = shrunk(medium.height, medium.width, limits), height * width
    return packed


def read_medium(text: str) -> Medium:
    """What `pack_medium` wrote."""
    kind, source, *rest = json.loads(text)
    values: list[Any] = [tuple(value) if isinstance(value, list) else value for value in rest]
    medium: Medium = {of.kind: of for of in (Picture, Video)}[kind](_read(source), *values)
    return medium


def _written(source: Any, named: Callable[[Path], str] = str) -> Any:
    if isinstance(source, tuple):
        return [_written(one, named) for one in source]
    if isinstance(source, Path):
        return named(source)
    values = {part.name: getattr(source, part.name) for part in fields(source)}
    return values | {"path": named(source.path), "of": type(source).__name__}


def _read(found: Any) -> Any:
    if isinstance(found, list):
        return tuple(map(_read, found))
    if isinstance(found, str):
        return Path(found)
    kind = {of.__name__: of for of in (InTar, InTable)}[found.pop("of")]
    return kind(**(found | {"path": Path(found["path"])}))
