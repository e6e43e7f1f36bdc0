"""Reads a meta-file and the headers of its pictures, and finds everything that is wrong with them in one run.

A record with a problem is left out of what is returned, never mended in silence; its problem says where it stands.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from qwenvl_ft.data.files.containers import entries_of
from qwenvl_ft.data.formats import form_of, read_entry, unpacked
from qwenvl_ft.data.media import FOLDER_KEYS, Media
from qwenvl_ft.data.reading import AS_FOUND, Reading
from qwenvl_ft.data.records import Record
from qwenvl_ft.errors import Problem

OnRecord = Callable[[int, int | None], None]  # (done, of how many; None where nobody knows that yet)


class MetaFile(NamedTuple):
    """The good records in file order, every problem of the others, and how many records the file holds in all."""

    records: list[Record]
    problems: list[Problem]
    num_records: int


class Found(NamedTuple):
    """What one entry came to: a record, or its problems. `where` is "" of a problem of a whole file, after which no record of that
    file can be trusted to be all there is."""

    where: str
    record: Record | None
    problems: list[Problem]


@dataclass
class Tally:
    """What was read so far; `forms` counts the records by the name of their form."""

    num_records: int = 0
    forms: Counter[str] = field(default_factory=Counter)
    media: dict[Path, Media] = field(default_factory=dict)

    def said_once(self, problems: list[Problem]) -> list[Problem]:
        """The problems, with one in place of all pictures that are missing where the folder is the wrong one."""
        for media in self.media.values():
            problems = media.none_is_there(problems)
        return problems


class Job(NamedTuple):
    """An entry that is to be read: where, its value, and the folder of its media, None where that is no folder."""

    where: str
    value: Any
    folder: Path | None


def stream_entries(meta_file: Path | str, data_dir: Path | str, reading: Reading, tally: Tally) -> Iterator[Job]:
    """Every entry, as `read_job` reads it, here or in another process. `tally` counts them."""
    meta_file, data_dir = Path(meta_file), Path(data_dir)
    folder = data_dir if data_dir.is_dir() else None
    if folder:
        tally.media[folder] = Media(folder, reading)
    for entry, value, _ in entries_of(meta_file, meta_file.name):
        for where, one in unpacked(entry, value):
            tally.num_records += bool(where)
            yield Job(where, one, folder)
    if folder is None:
        yield Job("", Problem(str(data_dir), "is not a folder", f"give the folder of the pictures {FOLDER_KEYS}"), None)


def read_job(job: Job, media: Mapping[Path, Media], reading: Reading, forms: Counter[str]) -> Found:
    """What an entry comes to; `forms` counts its form."""
    if isinstance(job.value, Problem):
        return Found(job.where, None, [job.value])
    if job.folder is None:
        return Found(job.where, None, [])
    problems: list[Problem] = []
    forms[form_of(job.value, reading)] += 1
    return Found(job.where, read_entry(job.value, job.where, media[job.folder], problems, reading), problems)


def stream_records(
    meta_file: Path | str, data_dir: Path | str, reading: Reading = AS_FOUND, tally: Tally | None = None
) -> Iterator[Found]:
    """What each entry comes to, one after another and none of them kept. `tally` counts them.

    Pictures are resolved against `data_dir` and must lie inside it; only their headers are read.
    """
    tally = tally or Tally()
    for job in stream_entries(meta_file, data_dir, reading, tally):
        yield read_job(job, tally.media, reading, tally.forms)


def read_records(
    meta_file: Path | str, data_dir: Path | str, on_record: OnRecord = lambda done, total: None, most: int | None = None,
    reading: Reading = AS_FOUND, tally: Tally | None = None,
) -> MetaFile:  # fmt: skip
    """Reads all records, or until `most` are good. `on_record(done, total)` is called after each; `tally` counts them.

    Of a file that breaks there are none.
    """
    tally, records, problems, whole = tally or Tally(), list[Record](), list[Problem](), True
    for found in stream_records(meta_file, data_dir, reading, tally):
        problems += found.problems
        whole &= bool(found.where)
        if found.record:
            records.append(found.record)
        on_record(tally.num_records, None)
        if len(records) == most:
            break
    return MetaFile(records if whole else [], tally.said_once(problems), tally.num_records)
