"""What a frozen vision tower makes of the pictures and videos of a row, kept on disk: from the second epoch on they are read.

    index     a row of a plan in 24 bytes: the part that holds it (0: none), the crc32 of its bytes, where they begin and end
    N.part    what one process added: of each row (T, W) numbers, T tokens of pictures, then of videos

A row is kept whole, not by its pictures: what the tower makes of one may differ in its last bit with what is beside it, and a run
would end in other weights whenever its rows were read at another pace. What is torn or damaged is not what its crc32 says,
and is made again.
"""

import os
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
from qwenvl_ft.data.packed import holders
from qwenvl_ft.data.records import Medium
from qwenvl_ft.folders.cache import remove_old

INDEX = "index"
ENTRY = np.dtype([("part", "<u4"), ("crc", "<u4"), ("start", "<u8"), ("end", "<u8")])
KEPT = 4  # folders: the ones used last, and those that may be in use
IN_USE_S = 2 * 24 * 3600.0


class Features:
    """Those of one plan, one tower and one precision, in a folder of that name. `width` is W; `since_ns` when it was named after
    what is in the files of the media. It goes to other processes by its folder; what one of them writes the others read.
    """

    def __init__(self, folder: Path, num_rows: int, width: int, dtype: torch.dtype, since_ns: int = 0):
        self.folder, self.width, self.dtype = folder, width, dtype
        self.part: Path | None = None  # that this process adds to
        self.full, self.since_ns = False, since_ns
        self.waiting = deque[tuple[int, torch.Tensor, Any]]()  # rows on their way from the GPU
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / INDEX).open("ab") as index:
            index.truncate(num_rows * ENTRY.itemsize)
        os.utime(folder)
        remove_old(folder.parent, INDEX, KEPT, IN_USE_S)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"part": None, "waiting": deque()}

    def read(self, row: int) -> torch.Tensor | None:
        """(T, W), or None for a row that is not kept."""
        try:
            (entry,) = np.fromfile(self.folder / INDEX, ENTRY, 1, offset=row * ENTRY.itemsize)
            if not entry["part"]:
                return None
            part, start, end = self.folder / f"{entry['part']}.part", int(entry["start"]), int(entry["end"])
            if not start < end <= part.stat().st_size:
                return None
            held = np.fromfile(part, np.uint8, size := end - start, offset=start)
        except (OSError, ValueError):  # taken away while a run goes on
            return None
        if len(held) != size or zlib.crc32(held.data) != entry["crc"]:
            return None
        return torch.from_numpy(held).view(self.dtype).view(-1, self.width)

    def may_keep(self, media: Iterable[Medium]) -> bool:
        """Whether none of their files changed since this run named what is in them; asked once they were read."""
        try:
            return all(os.stat(path).st_ctime_ns <= self.since_ns for medium in media for path in holders(medium))
        except OSError:
            return False

    def write(self, row: int, features: torch.Tensor) -> None:
        """Keeps (T, W), unless a number of it is not finite: that would spoil every later run. Nothing waits for a GPU: its
        features are written with those of a later row. What cannot be written is said, once, and no more is kept."""
        if self.full:
            return
        if features.dtype != self.dtype or features.shape[1] != self.width:
            return self._stop(f"it has {features.shape[1]} numbers a token of {features.dtype}, not {self.width} of {self.dtype}")
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
                if features.isfinite().all():
                    self._write(row, features.cpu().contiguous().view(torch.uint8).numpy().tobytes())
            except OSError as error:
                return self._stop(f"{error.filename or self.folder}: {error.strerror}")

    def _stop(self, why: str) -> None:
        print_note(f"what the vision tower makes is not kept any more: {why}")
        self.full = True
        self.waiting.clear()

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
