"""A meta-file of any kind and form, written anew in the documented form: JSON, or JSON lines, by the new file's name."""

import json
from collections.abc import Callable
from pathlib import Path

from qwenvl_ft.data.formats.write import documented
from qwenvl_ft.data.meta_file import OnRecord, Tally, stream_records
from qwenvl_ft.data.reading import AS_FOUND, Reading
from qwenvl_ft.errors import Problem, UserError

SUFFIXES = (".json", ".jsonl")


def convert(
    meta: Path, out: Path, data_dir: Path | None = None, reading: Reading = AS_FOUND,
    on_record: OnRecord = lambda done, total: None,
) -> Tally:  # fmt: skip
    """Writes `out`; its file names are relative to `data_dir`, else to the folder of `meta`. Keeps one record in memory.

    Raises UserError with every problem of the records, and with what cannot be carried; then nothing is written.
    """
    if out.suffix not in SUFFIXES:
        raise UserError(Problem(str(out), "is named as no meta-file", "name it OUT.json for an array, OUT.jsonl for lines"))
    if out.exists():
        raise UserError(Problem(str(out), "is there already", "name another file, or delete that one"))
    if not out.parent.is_dir():
        raise UserError(Problem(str(out.parent), "is not a folder", "make it, or name another"))
    tally = Tally()
    part = out.with_name(f"{out.name}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            problems = _write(file.write, out.suffix == ".jsonl", meta, data_dir, reading, tally, on_record)
        if problems:
            raise UserError(*tally.said_once(problems))
        part.rename(out)
    except OSError as error:
        raise UserError(Problem(str(out), f"cannot be written: {error.strerror}", "name a file that can be")) from error
    finally:
        part.unlink(missing_ok=True)
    return tally


def _write(
    write: Callable[[str], int], lines: bool, meta: Path, data_dir: Path | None, reading: Reading, tally: Tally, on_record: OnRecord
) -> list[Problem]:
    problems: list[Problem] = []
    number = 0
    for found in stream_records(meta, data_dir, reading, tally):
        problems += found.problems
        on_record(tally.num_records, None)
        if found.record is None:
            continue
        (media,) = tally.media.values()
        try:
            entry = documented(found.record, media.root, media)
        except UserError as error:
            problems += error.problems
            continue
        write("" if lines else "[\n" if number == 0 else ",\n")
        write(json.dumps(entry, ensure_ascii=False) + "\n" * lines)
        number += 1
    if not number and not problems:
        problems.append(Problem(str(meta), "holds no records", "give a meta-file with records"))
    write("" if lines else "\n]\n")
    return problems
