"""Reads a meta-file and the headers of its pictures, and finds everything that is wrong with them in one run.

A record with a problem is left out of what is returned, never mended in silence; its problem says where it stands.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from qwenvl_ft.data.boxes import placed
from qwenvl_ft.data.formats.documented import turns_of
from qwenvl_ft.data.formats.json_entries import entries_of
from qwenvl_ft.data.media import FOLDER_KEYS, Media
from qwenvl_ft.data.reading import AS_FOUND, Reading
from qwenvl_ft.data.records import Record
from qwenvl_ft.errors import Problem

OnRecord = Callable[[int, int], None]


class MetaFile(NamedTuple):
    """The good records in file order, every problem of the others, and how many records the file holds in all."""

    records: list[Record]
    problems: list[Problem]
    num_records: int


def read_records(
    meta_file: Path | str, data_dir: Path | str, on_record: OnRecord = lambda done, total: None, most: int | None = None,
    reading: Reading = AS_FOUND,
) -> MetaFile:  # fmt: skip
    """Reads all records, or until `most` are good. `on_record(done, total)` is called after each.

    Pictures are resolved against `data_dir` and must lie inside it; only their headers are read.
    """
    meta_file, data_dir = Path(meta_file), Path(data_dir)
    entries, problems = entries_of(meta_file)
    if not data_dir.is_dir():
        problems = [*problems, *(entry for _, entry in entries if isinstance(entry, Problem))]
        problems.append(Problem(str(data_dir), "is not a folder", f"give the folder of the pictures {FOLDER_KEYS}"))
        return MetaFile([], problems, len(entries))
    media = Media(data_dir, reading)
    records: list[Record] = []
    for done, (where, entry) in enumerate(entries, start=1):
        if isinstance(entry, Problem):
            problems.append(entry)
        else:
            found: list[Problem] = []
            turns = placed(tuple(turns_of(entry, where, media.picture, found)), where, reading.boxes, found)
            problems.extend(found)
            if not found:
                records.append(Record(where, turns))
        on_record(done, len(entries))
        if len(records) == most:
            break
    return MetaFile(records, media.none_is_there(problems), len(entries))
