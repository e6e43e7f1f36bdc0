"""Reads a meta-file and the headers of its pictures, and finds everything that is wrong with them in one run.

A record with a problem is left out of what is returned, never mended in silence; its problem says where it stands.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

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
    media: list[Media] = field(default_factory=list)

    def said_once(self, problems: list[Problem]) -> list[Problem]:
        """The problems, with one in place of all pictures that are missing where the folder is the wrong one."""
        for media in self.media:
            problems = media.none_is_there(problems)
        return problems


def stream_records(
    meta_file: Path | str, data_dir: Path | str, reading: Reading = AS_FOUND, tally: Tally | None = None
) -> Iterator[Found]:
    """What each entry comes to, one after another and none of them kept. `tally` counts them.

    Pictures are resolved against `data_dir` and must lie inside it; only their headers are read.
    """
    meta_file, data_dir, tally = Path(meta_file), Path(data_dir), tally or Tally()
    media = Media(data_dir, reading) if data_dir.is_dir() else None
    tally.media += [media] if media else []
    entries = (of for entry, value, _ in entries_of(meta_file, meta_file.name) for of in unpacked(entry, value))
    for where, value in entries:
        tally.num_records += bool(where)
        if isinstance(value, Problem):
            yield Found(where, None, [value])
        elif media:
            problems: list[Problem] = []
            tally.forms[form_of(value, reading)] += 1
            yield Found(where, read_entry(value, where, media, problems, reading), problems)
    if media is None:
        yield Found("", None, [Problem(str(data_dir), "is not a folder", f"give the folder of the pictures {FOLDER_KEYS}")])


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
