"""From the entries of meta-files to what they come to, a part of them at a time, in as many processes as there are cores.

Nothing here grows with the records: a part is a few arrays, and whoever takes it says what becomes of them.
"""

import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from multiprocessing import get_context
from pathlib import Path

from qwenvl_ft.data.chat import Chat, Script
from qwenvl_ft.data.media import Media
from qwenvl_ft.data.meta_file import Job, OnRecord, Tally, read_job, stream_entries
from qwenvl_ft.data.notes import Noted
from qwenvl_ft.data.packed import Packed, PackedMedium, pack_medium, pack_scripts
from qwenvl_ft.data.reading import AS_FOUND, Reading
from qwenvl_ft.data.records import Medium, Record
from qwenvl_ft.errors import Problem, UserError

RECORDS = 1000  # of a part
FEW_RECORDS = 4000  # which one process has read before others have started


@dataclass
class Part:
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
    forms: Counter[str] = field(default_factory=Counter)
    missed: dict[Path, tuple[bool, dict[Problem, str], set[str]]] = field(default_factory=dict)  # see `Media.none_is_there`
    records: list[Record] = field(default_factory=list)


class Reader:
    """Reads entries, in this process or another: the files that it has seen it knows again."""

    def __init__(self, reading: Reading, chat: Chat | None, keep_records: bool):
        self.reading, self.chat, self.keep_records = reading, chat, keep_records
        self.media: dict[Path, Media] = {}

    def read(self, jobs: Sequence[Job]) -> Part:
        """The part that these entries come to."""
        part, media = Part(), dict[Medium, int]()
        scripts: list[tuple[int, Script]] = []
        for job in jobs:
            if job.folder and job.folder not in self.media:
                self.media[job.folder] = Media(job.folder, self.reading)
            number = part.num_records
            part.num_records += bool(job.where)
            found = read_job(job, self.media, self.reading, part.forms)
            part.problems += found.problems
            part.whole &= bool(found.where)
            if found.record:
                scripts += self._written(found.record, number, part)
                for medium in found.record.media:
                    media.setdefault(medium, len(media))
        part.scripts = pack_scripts(scripts, media)
        part.media = [pack_medium(medium, self.chat) for medium in media]
        for folder, of in self.media.items():
            part.missed[folder] = (of.one_is_there, of.missing, of.misspelt)
            of.missing, of.misspelt = {}, set()
        return part

    def _written(self, record: Record, number: int, part: Part) -> list[tuple[int, Script]]:
        part.num_shown += len(record.pictures)
        part.noted.add(record)
        if self.keep_records:
            part.records.append(record)
        try:
            scripts = self.chat.write_scripts(record) if self.chat else []
        except UserError as error:
            part.problems += [replace(problem, where=record.where) for problem in error.problems]
            return []
        part.num_used += 1
        return [(number, script) for script in scripts]


def parts_of(
    meta_file: Path | str, data_dir: Path | str, tally: Tally, chat: Chat | None = None, reading: Reading = AS_FOUND,
    on_record: OnRecord = lambda done, total: None, keep_records: bool = False,
) -> Iterator[Part]:  # fmt: skip
    """Reads all entries, and with a chat writes their scripts, `on_record` told after each part. `tally` knows afterwards what
    `said_once` asks for."""
    entries = stream_entries(meta_file, data_dir, reading, tally)
    first, cores = list(islice(entries, FEW_RECORDS)), num_cores()
    jobs = _some(chain(first, entries))
    reader = Reader(reading, chat, keep_records)
    done = 0
    for part in map(reader.read, jobs) if len(first) < FEW_RECORDS or cores < 2 else _in_parallel(reader, jobs, cores):
        tally.forms.update(part.forms)
        for folder, (one_is_there, missing, misspelt) in part.missed.items():
            media = tally.media[folder]
            media.one_is_there |= one_is_there
            media.missing |= missing
            media.misspelt |= misspelt
        done += part.num_records
        on_record(done, None)
        yield part


def num_cores() -> int:
    """Those that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _some(jobs: Iterable[Job]) -> Iterator[list[Job]]:
    jobs = iter(jobs)
    while some := list(islice(jobs, RECORDS)):
        yield some


READERS: list[Reader] = []  # of a process of the pool: its own


def _start(reader: Reader) -> None:
    READERS.append(reader)


def _read(jobs: Sequence[Job]) -> Part:
    return READERS[0].read(jobs)


def _in_parallel(reader: Reader, jobs: Iterator[list[Job]], cores: int) -> Iterator[Part]:
    """The parts in their order, few of them ahead of whoever takes them. New processes: a fork copies what threads hold."""
    waiting: deque[Future[Part]] = deque()
    pool = ProcessPoolExecutor(cores, get_context("spawn"), _start, (reader,))
    try:
        for some in jobs:
            waiting.append(pool.submit(_read, some))
            if len(waiting) > 2 * cores:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        what, fix = "one of the processes that read records was killed, perhaps for its memory", "run it again, on fewer cores"
        raise UserError(Problem(str(reader.media and next(iter(reader.media)) or "reading"), what, fix)) from error
    finally:
        pool.shutdown(cancel_futures=True)
