"""From the entries of meta-files to what they come to, a batch of them at a time, in as many processes as there are cores.

Nothing here grows with the records: a batch is a few arrays, and whoever takes it says what becomes of them.
"""

import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from qwenvl_ft.data.chat import Chat, Script
from qwenvl_ft.data.checks import Against, Checks
from qwenvl_ft.data.media import MOST_LETTERS, Media
from qwenvl_ft.data.meta_file import EntryToRead, Meta, OnRecord, Tally, read_one, stream_entries
from qwenvl_ft.data.notes import Noted
from qwenvl_ft.data.packed import FileState, Packed, PackedMedium, pack_medium, pack_scripts
from qwenvl_ft.data.reading import AS_FOUND, Reading
from qwenvl_ft.data.records import Medium, Picture, Record, Source, Video
from qwenvl_ft.data.sources import holder
from qwenvl_ft.data.spawned import end_with_parent
from qwenvl_ft.errors import Problem, UserError

RECORDS = 1000  # of a batch
FEW_RECORDS = 4000  # which one process has read before others have started


class Watched(Media):
    """Remembers the names that were no media, too: a file that comes there, or is mended, makes another table."""

    def __init__(self, folder: Path, reading: Reading):
        super().__init__(folder, reading)
        self.failed: list[str] = []
        self.num_sent = 0  # of the new sizes

    def picture(self, name: str | Source, where: str) -> Picture:
        """See `Media.picture`."""
        try:
            return super().picture(name, where)
        except UserError:
            self._note(name)
            raise

    def video(self, name: str | Source | Sequence[str | Source], where: str, options: Mapping[str, Any]) -> Video:
        """See `Media.video`."""
        try:
            return super().video(name, where, options)
        except UserError:
            for one in [name] if isinstance(name, str) or not isinstance(name, Sequence) else name:
                self._note(one)
            raise

    def _note(self, name: str | Source) -> None:
        if not (isinstance(name, str) and len(name) > MOST_LETTERS):  # which holds the file itself
            self.failed.append(os.path.join(self.root, name) if isinstance(name, str) else str(holder(name)))


@dataclass
class Missed:
    """What the media of a folder had to say for themselves: see `Media.none_is_there`; `failed` are files, `sizes` new ones."""

    one_is_there: bool
    missing: dict[Problem, str]
    misspelt: set[str]
    failed: list[FileState]
    sizes: dict[int, int]


@dataclass
class Batch:
    """What some records came to, in their order: `used` are those without a problem, `scripts` their examples, `media` each
    different medium of theirs. The `records` themselves are there only where they were asked for."""

    num_records: int = 0
    num_used: int = 0
    problems: list[Problem] = field(default_factory=list)
    whole: bool = True  # false: a file broke, and the records before it are not to be trusted to be all
    scripts: Packed = field(default_factory=Packed)
    media: list[PackedMedium] = field(default_factory=list)
    num_shown: int = 0  # pictures, each as often as it is shown
    noted: Noted = field(default_factory=Noted)
    checks: Checks = field(default_factory=Checks)
    tally: Tally = field(default_factory=Tally)
    missed: dict[Path, Missed] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)


class Reader:
    """Reads entries, in this process or another: the files that it has seen it knows again."""

    def __init__(self, reading: Reading, chat: Chat | None, against: Against | None, keep_records: bool):
        self.reading, self.chat, self.against, self.keep_records = reading, chat, against, keep_records
        self.media: dict[Path, Watched] = {}

    def read(self, entries: Sequence[EntryToRead]) -> Batch:
        """The batch that these entries come to."""
        batch, media = Batch(checks=Checks(self.chat.limits if self.chat else None, self.against)), dict[Medium, int]()
        scripts: list[tuple[int, Script]] = []
        for one in entries:
            if one.folder and one.folder not in self.media:
                self.media[one.folder] = Watched(one.folder, self.reading)
            found = read_one(one, self.media, batch.tally)
            batch.problems += found.problems
            batch.whole &= bool(found.where)
            if found.record and found.times:
                batch.noted.add_found(found.where, found.is_blank, found.has_unread)
                written = self._written(found.record, batch)
                scripts += [(batch.num_records, script) for script in written] * found.times
                for medium in found.record.media:
                    media.setdefault(medium, len(media))
            batch.num_records += bool(found.where)
        batch.scripts = pack_scripts(scripts, media)
        batch.media = [pack_medium(medium, self.chat) for medium in media]
        batch.missed = {folder: _missed(of) for folder, of in self.media.items()}
        batch.checks.against = None  # which whoever asked has himself
        return batch

    def _written(self, record: Record, batch: Batch) -> list[Script]:
        batch.num_shown += len(record.pictures)
        batch.noted.add(record, self.chat is None or self.chat.thinks)
        if self.keep_records:
            batch.records.append(record)
        try:
            scripts = self.chat.write_scripts(record) if self.chat else []
        except UserError as error:
            batch.problems += [replace(problem, where=record.where) for problem in error.problems]
            return []
        batch.checks.add(record, scripts)
        batch.num_used += 1
        return scripts


def _missed(media: Watched) -> Missed:
    """What is new since the last time."""
    new = media.sizes.new
    media.num_sent = min(media.num_sent, len(new)) if len(new) >= media.num_sent else 0
    found = Missed(media.one_is_there, media.missing, media.misspelt, [FileState.of(path) for path in dict.fromkeys(media.failed)],
                   dict(islice(new.items(), media.num_sent, None)))  # fmt: skip
    media.num_sent = len(new)
    media.missing, media.misspelt, media.failed = {}, set(), []
    return found


def batches_of(
    meta: Meta, data_dir: Path | str | None, tally: Tally, chat: Chat | None = None, reading: Reading = AS_FOUND, seed: int = 0,
    on_record: OnRecord = lambda done, total: None, keep_records: bool = False, against: Against | None = None,
) -> Iterator[Batch]:  # fmt: skip
    """Reads all entries, and with a chat writes their scripts, `on_record` told after each batch. `tally` counts them, and knows
    afterwards what `said_once` asks for. `against` are the records of evaluation, which the checks compare with."""
    entries = stream_entries(meta, data_dir, reading, tally, seed)
    first, cores = list(islice(entries, FEW_RECORDS)), num_cores()
    lists = _some(chain(first, entries))
    reader = Reader(reading, chat, against, keep_records)
    done = 0
    try:
        for batch in map(reader.read, lists) if len(first) < FEW_RECORDS or cores < 2 else _in_parallel(reader, lists, cores):
            tally.forms.update(batch.tally.forms)
            tally.used.update(batch.tally.used)
            tally.positions.update(batch.tally.positions)
            for folder, missed in batch.missed.items():
                media = tally.media[folder]
                media.one_is_there |= missed.one_is_there
                media.missing |= missed.missing
                media.misspelt |= missed.misspelt
                media.sizes.join(missed.sizes)
            done += batch.num_records
            on_record(done, None)
            yield batch
    finally:
        for media in tally.media.values():
            media.sizes.save()


def num_cores() -> int:
    """Those that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _some(entries: Iterable[EntryToRead]) -> Iterator[list[EntryToRead]]:
    entries = iter(entries)
    while some := list(islice(entries, RECORDS)):
        yield some


READERS: list[Reader] = []  # of a process of the pool: its own


def _start(reader: Reader) -> None:
    end_with_parent()
    READERS.append(reader)


def _read(entries: Sequence[EntryToRead]) -> Batch:
    return READERS[0].read(entries)


def _in_parallel(reader: Reader, lists: Iterator[list[EntryToRead]], cores: int) -> Iterator[Batch]:
    """The batches in their order, few of them ahead of whoever takes them. New processes: a fork copies what threads hold."""
    waiting: deque[Future[Batch]] = deque()
    pool = ProcessPoolExecutor(cores, get_context("spawn"), _start, (reader,))
    try:
        for some in lists:
            waiting.append(pool.submit(_read, some))
            if len(waiting) > 2 * cores:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        what = "one of the processes that read them was killed, perhaps for its memory"
        fix = 'run it again with more memory; in a script, under `if __name__ == "__main__":`'
        raise UserError(Problem("the records", what, fix)) from error
    finally:
        pool.shutdown(cancel_futures=True)
