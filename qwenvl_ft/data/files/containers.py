"""Which files a path means, which container each is by its first bytes and its name, and the entries of it."""

import glob
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from qwenvl_ft.data.files.csv_table import csv_entries
from qwenvl_ft.data.files.entry import Entry
from qwenvl_ft.data.files.json_text import json_entries
from qwenvl_ft.data.files.tars import tar_entries
from qwenvl_ft.data.magic import HEAD_BYTES, what_it_is
from qwenvl_ft.data.mirror import local_files
from qwenvl_ft.data.sources import natural
from qwenvl_ft.errors import Problem, UserError

ENDINGS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".feather", ".tar")
PACKED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip")  # which are named, not passed over
NO_RECORDS = ("dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json")  # what `datasets` says of them
SPLIT = re.compile(r"(?:^|[^a-z])(train|test|val|valid|validation|dev|eval)(?=[^a-z]|$)")


def files_of(meta: Path) -> list[Path]:
    """The files of records that a file, a folder or a pattern means, a2 before a10; those at an address are brought.

    Raises UserError where it means none.
    """
    if (copies := local_files(meta, ENDINGS + PACKED)) is not None:
        return files_of(copies[0]) if copies[0].is_dir() else _sorted(copies)
    if meta.is_dir():
        if (meta / "state.json").is_file() or (meta / "dataset_dict.json").is_file():
            from qwenvl_ft.data.files.tables import split_files

            return split_files(meta)
        return _of_folder(meta)
    if any(mark in str(meta) for mark in "*?[") and not meta.exists():
        found = [path for name in glob.glob(str(meta), recursive=True) if (path := Path(name)).is_file()]
        if found:
            return _sorted([path for path in found if path.suffix.lower() in ENDINGS + PACKED] or found)
        raise UserError(Problem(str(meta), "matches no file", "mend the pattern, and quote it for the shell"))
    return [meta]


def names_of(files: Sequence[Path]) -> list[str]:
    """How each is called in the places of its entries: by its name, or all of its path where two have one name."""
    counts = Counter(file.name for file in files)
    return [file.name if counts[file.name] == 1 else file.as_posix() for file in files]


def entries_of(file: Path, name: str) -> Iterator[Entry]:
    """The entries of one file, called `name` in their places."""
    head = head_of(file)
    if head is None:
        fix = "give the JSON file of conversations (a config's train_meta_file)"
        yield Entry("", Problem(str(file), "cannot be read as a file" if file.exists() else "is not there", fix))
        return
    if (kind := what_it_is(head)) and kind.as_meta:
        yield Entry("", Problem(name, f"is {kind.what}", kind.as_meta))
        return
    match container_of(file):
        case "tar":
            yield from tar_entries(file, name)
        case "parquet" | "Arrow" as container:
            from qwenvl_ft.data.files.tables import table_entries  # and pyarrow, which JSON can do without

            yield from table_entries(file, name, container == "parquet")
        case "CSV":
            yield from csv_entries(file, name)
        case _:
            yield from json_entries(file, name)


def head_of(file: Path) -> bytes | None:
    """Its first bytes; None where it cannot be read."""
    try:
        with file.open("rb") as opened:
            return opened.read(HEAD_BYTES)
    except OSError:
        return None


def container_of(file: Path) -> str:
    """JSON, CSV, tar, parquet or Arrow: by what the file begins with, and a CSV by its name, since a text tells nothing."""
    found = {"a tar archive": "tar", "a parquet file": "parquet", "an Arrow file": "Arrow", "an Arrow stream": "Arrow"}
    by_name = {".csv": "CSV", ".tsv": "CSV", ".tar": "tar", ".parquet": "parquet", ".arrow": "Arrow", ".feather": "Arrow"}
    if kind := what_it_is(head_of(file) or b""):
        return found.get(kind.what, "JSON")
    return by_name.get(file.suffix.lower(), "JSON")


def _of_folder(folder: Path) -> list[Path]:
    files = [path for path in folder.iterdir() if path.is_file() and path.name not in NO_RECORDS and path.name[0] != "."]
    found = _sorted([path for path in files if path.suffix.lower() in ENDINGS + PACKED])
    if not found:
        below = sorted({path.parent for path in folder.glob("*/*") if path.suffix.lower() in ENDINGS})
        fix = f"give {below[0]}" if below else f"give a folder with files that end with {', '.join(ENDINGS)}"
        raise UserError(Problem(str(folder), "holds no files of records", fix))
    splits = {match[1] for path in found if (match := SPLIT.search(path.name.lower()))}
    if len(splits) > 1:
        what = f"holds files of several splits: {', '.join(sorted(splits))}"
        raise UserError(Problem(str(folder), what, f"give those of one: '{folder}/*{sorted(splits)[-1]}*'"))
    return found


def _sorted(files: Sequence[Path]) -> list[Path]:
    """a2 before a10."""
    return sorted(files, key=lambda path: natural(str(path)))
