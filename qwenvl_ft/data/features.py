"""What a frozen vision tower makes of the pictures and videos of a row, kept on disk: from the second epoch on they are read.

    index     a row of a plan in 24 bytes: the part that holds it (0: none), the crc32 of its bytes, where they begin and end
    N.part    what one process added: of each row (T, W) numbers, T tokens of pictures, then of videos

A row is kept whole, not by its pictures: what the tower makes of one may differ in its last bit with what is beside it, and a run
would end in other weights whenever its rows were read at another pace. What is torn or damaged is not what its crc32 says,
and is made again.
"""

import shutil
import zlib
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qwenvl_ft.console import print_note

INDEX = "index"
ENTRY = np.dtype([("part", "<u4"), ("crc", "<u4"), ("start", "<u8"), ("end", "<u8")])
KEPT = 4  # folders: the ones used last


class Features:
    """Those of one plan, one tower and one precision, in a folder of that name. `width` is W. It goes to other processes by its
    folder; what one of them writes the others read.
    """

    def __init__(self, folder: Path, num_rows: int, width: int, dtype: torch.dtype):
        self.folder, self.width, self.dtype = folder, width, dtype
        self.part: Path | None = None  # that this process adds to
        self.full = False
        self.waiting = deque[tuple[int, torch.Tensor, Any]]()  # rows on their way from the GPU
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / INDEX).open("ab") as index:
            index.truncate(num_rows * ENTRY.itemsize)
        folder.touch()
        _remove_old(folder.parent)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"part": None, "waiting": deque()}

    def read(self, row: int) -> torch.Tensor | None:
        """(T, W), or None for a row that is not kept."""
        try:
            (entry,) = np.fromfile(self.folder / INDEX, ENTRY, 1, offset=row * ENTRY.itemsize)
            if not entry["part"]:
                return None
            start, size = int(entry["start"]), int(entry["end"]) - int(entry["start"])
            held = np.fromfile(self.folder / f"{entry['part']}.part", np.uint8, size, offset=start)
        except (OSError, ValueError):  # taken away while a run goes on
            return None
        if len(held) != size or zlib.crc32(held.data) != entry["crc"]:
            return None
        return torch.from_numpy(held).view(self.dtype).view(-1, self.width)

    def write(self, row: int, features: torch.Tensor) -> None:
        """Keeps (T, W). Nothing waits for a GPU: its features are written with those of a later row. A disk that is full is said,
        once, and no more is kept."""
        if self.full:
            return
        done = None
        if features.is_cuda:
            there = torch.empty(features.shape, dtype=features.dtype, pin_memory=True)
            there.copy_(features, non_blocking=True)
            done, features = torch.cuda.Event(), there  # type: ignore[no-untyped-call]
            done.record()
        self.waiting.append((row, features, done))
        while self.waiting and (self.waiting[0][2] is None or self.waiting[0][2].query()):
            row, features, _ = self.waiting.popleft()
            try:
                self._write(row, features.contiguous().view(torch.uint8).numpy().tobytes())
            except OSError as error:
                print_note(f"what the vision tower makes is not kept any more: {error.filename or self.folder}: {error.strerror}")
                self.full = True

    def _write(self, row: int, held: bytes) -> None:
        self.part = self.part or self._new_part()
        with self.part.open("ab") as part:
            start = part.tell()
            part.write(held)
        entry = np.array([(int(self.part.stem), zlib.crc32(held), start, start + len(held))], ENTRY)
        with (self.folder / INDEX).open("r+b") as index:
            index.seek(row * ENTRY.itemsize)
            index.write(entry.tobytes())

    def _new_part(self) -> Path:
        for number in count(1):
            with suppress(FileExistsError):
                (path := self.folder / f"{number}.part").touch(exist_ok=False)
                return path
        raise AssertionError

    def num_kept(self) -> int:
        """How many rows are there."""
        return int((np.fromfile(self.folder / INDEX, ENTRY)["part"] > 0).sum())


def _remove_old(folder: Path) -> None:
    """Those that were not used for longest. Another process may be doing the same."""
    with suppress(OSError):
        kept: Iterable[Path] = [path for path in folder.iterdir() if (path / INDEX).is_file()]
        for old in sorted(kept, key=lambda path: path.stat().st_mtime)[:-KEPT]:
            shutil.rmtree(old, ignore_errors=True)
