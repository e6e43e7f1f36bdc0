"""Reads meta-files and the headers of their pictures, and finds everything that is wrong with them in one run.

A record with a problem is left out of what is returned, never mended in silence; its problem says where it stands.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from qwenvl_ft.data.files.containers import container_of, entries_of, files_of, names_of
from qwenvl_ft.data.files.entry import Entry
from qwenvl_ft.data.formats import form_of, names_no_medium, read_entry, unpacked
from qwenvl_ft.data.media import FOLDER_KEYS, Media
from qwenvl_ft.data.media_position import placed, position_of
from qwenvl_ft.data.mirror import local_folder
from qwenvl_ft.data.named import brought
from qwenvl_ft.data.reading import AS_FOUND, Reading
from qwenvl_ft.data.records import Record
from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.folders.objects import address_of, as_written
from qwenvl_ft.values import MixedFile

OnRecord = Callable[[int, int | None], None]  # (done, of how many; None where nobody knows that yet)


Meta = Path | str | Sequence[MixedFile]


def called(meta: Meta) -> str:
    """A name of all of them, for a message."""
    return Path(meta).name if isinstance(meta, Path | str) else ", ".join(of.file.name for of in meta)


class MetaFile(NamedTuple):
    """The good records in file order, every problem of the others, and how many records the file holds in all."""

    records: list[Record]
    problems: list[Problem]
    num_records: int


class Found(NamedTuple):
    """What one entry came to: a record and how often it counts, by its file's weight, or its problems.

    A record `is_blank` that is text alone while its entry has a key or column for media; it `has_unread` as its entry has.

    `where` is "" of a problem of a whole file, after which what was read of that file may not be all there is.
    """

    where: str
    record: Record | None
    problems: list[Problem]
    times: int = 1
    is_blank: bool = False
    has_unread: bool = False


@dataclass
class Counts:
    """Of one meta-file: its containers, each with how many files, and its records."""

    meta: str
    weight: float = 1
    containers: Counter[str] = field(default_factory=Counter)
    records: int = 0


@dataclass
class Tally:
    """What was read so far, of each of the `mixed` files; `forms` counts the records by the name of their form, `used` those of
    each file, weighed; `positions` the good ones by where their media stand, and those whose media were moved there."""

    num_records: int = 0
    mixed: list[Counts] = field(default_factory=list)
    forms: Counter[str] = field(default_factory=Counter)
    used: Counter[int] = field(default_factory=Counter)
    positions: Counter[str] = field(default_factory=Counter)
    media: dict[Path, Media] = field(default_factory=dict)

    @property
    def facts(self) -> dict[str, Any]:
        """For a program."""
        files = [vars(of) | {"containers": dict(of.containers), "used": self.used[number]} for number, of in enumerate(self.mixed)]
        positions = {name: self.positions[name] for name in ("first", "last", "mixed", "moved")}
        return {"files": files, "forms": dict(self.forms), "media_position": positions}

    def said_once(self, problems: list[Problem]) -> list[Problem]:
        """The problems, with one in place of all pictures that are missing where the folder is the wrong one."""
        for media in self.media.values():
            problems = media.none_is_there(problems)
        return problems


class EntryToRead(NamedTuple):
    """An entry with the folder of its media, None where there is none; the number of its meta-file; how often it counts."""

    entry: Entry
    folder: Path | None = None
    number: int = 0
    times: int = 1


def stream_entries(meta: Meta, data_dir: Path | str | None, reading: Reading, tally: Tally, seed: int = 0) -> Iterator[EntryToRead]:
    """Every entry, as `read_one` reads it, here or in another process. `tally` counts them."""
    mixed = [MixedFile(file=Path(meta))] if isinstance(meta, Path | str) else meta
    files: list[list[Path]] = []
    for of in mixed:
        try:
            files.append(files_of(of.file))
        except UserError as error:
            files.append([])
            yield from (EntryToRead(Entry("", problem)) for problem in error.problems)
    names = iter(names_of(list(chain.from_iterable(files))))
    try:
        for number, (of, its_files) in enumerate(zip(mixed, files, strict=True)):
            counts, draw = Counts(as_written(of.file), of.weight), Random(f"{seed} {number}")
            tally.mixed.append(counts)
            folder = local_folder(Path(of.data_dir or data_dir or _beside(of.file, its_files)))
            if folder not in tally.media and folder.is_dir():
                tally.media[folder] = Media(folder, reading)
            for file, name in zip(its_files, names, strict=False):
                counts.containers[container_of(file)] += 1
                entries = _each(entries_of(file, name))
                for entry in brought(entries, tally.media[folder]) if folder in tally.media else entries:
                    times = int(of.weight) + (draw.random() < of.weight % 1)
                    counts.records += bool(entry.where)
                    tally.num_records += bool(entry.where)
                    yield EntryToRead(entry, folder if folder in tally.media else None, number, times)
            if folder not in tally.media:
                what, fix = "is not a folder", f"give the folder of the pictures {FOLDER_KEYS}"
                yield EntryToRead(Entry("", Problem(str(folder), what, fix)))
    finally:
        for media in tally.media.values():
            media.sizes.save()


def read_one(one: EntryToRead, media: Mapping[Path, Media], tally: Tally) -> Found:
    """What an entry comes to; `tally` counts its form, and how often it is used."""
    entry = one.entry
    if isinstance(entry.value, Problem) or one.folder is None:
        return Found(entry.where, None, [entry.value] if isinstance(entry.value, Problem) else [], 0)
    own = media[one.folder]
    own.beside = entry.beside
    problems: list[Problem] = []
    tally.forms[form_of(entry.value, own.reading) or "none that is known"] += 1
    record = read_entry(entry.value, entry.where, own, problems, own.reading)
    if record and entry.beside and not entry.shared and (lost := _not_shown(record, entry)):
        fix = "show it in the talk, or pack the sample without it"
        what = "which its json does not show"
        problems.append(Problem(entry.where, f"holds {lost}, {what}", fix, kind=f"a medium {what}"))
        record = None
    if record:
        written, record = record, placed(record, own.reading.media_position)
        tally.positions.update([side] if (side := position_of(record)) else [])
        tally.positions["moved"] += record is not written
    times = one.times if record else 0
    tally.used[one.number] += times
    is_blank = bool(record and not record.media) and names_no_medium(entry.value, entry.empty, own.reading)
    return Found(entry.where, record, problems, times, is_blank, entry.has_unread)


def _not_shown(record: Record, entry: Entry) -> str:
    """The name of a medium that lies with an entry and is not in its record; nothing where all are."""
    shown = {of for medium in record.media for of in (medium.source if isinstance(medium.source, tuple) else [medium.source])}
    return next((of.name for of in entry.beside.values() if of not in shown), "")


def stream_records(
    meta: Meta, data_dir: Path | str | None = None, reading: Reading = AS_FOUND, tally: Tally | None = None, seed: int = 0
) -> Iterator[Found]:
    """What each entry comes to, one after another and none of them kept. `tally` counts them.

    Pictures are resolved against `data_dir`, else the folder of the meta-file, and must lie inside it; only their headers are
    read. A record of a file of weight 2.3 counts twice, and three times in 0.3 of the cases: the same ones for the same `seed`.
    """
    tally = tally or Tally()
    for one in stream_entries(meta, data_dir, reading, tally, seed):
        yield read_one(one, tally.media, tally)


def _beside(meta: Path, files: Sequence[Path]) -> Path:
    """The folder of a meta-file, or the one that it is."""
    if address_of(meta):
        return files[0].parent if files else meta.parent
    return meta if meta.is_dir() else meta.parent


def _each(entries: Iterator[Entry]) -> Iterator[Entry]:
    """The entries, with those of a list of records as entries of their own."""
    for entry in entries:
        for where, value in unpacked(entry.where, entry.value):
            yield entry._replace(where=where, value=value, shared=where != entry.where)


def read_records(
    meta: Meta, data_dir: Path | str | None = None, on_record: OnRecord = lambda done, total: None, most: int | None = None,
    reading: Reading = AS_FOUND, tally: Tally | None = None, seed: int = 0,
) -> MetaFile:  # fmt: skip
    """Reads all records, each as often as it counts, or until `most` are good. `on_record(done, total)` is called after each.

    Of a file that breaks there are none.
    """
    tally = tally or Tally()
    records, problems, whole = list[Record](), list[Problem](), True
    for found in stream_records(meta, data_dir, reading, tally, seed):
        problems += found.problems
        whole &= bool(found.where)
        if found.record:
            records += [found.record] * found.times
        on_record(tally.num_records, None)
        if most is not None and len(records) >= most:
            break
    return MetaFile(records if whole else [], tally.said_once(problems), tally.num_records)
