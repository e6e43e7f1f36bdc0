"""Which container a path is, and its entries."""

from collections.abc import Iterator
from pathlib import Path

from qwenvl_ft.data.files.entry import Entry
from qwenvl_ft.data.files.json_text import json_entries
from qwenvl_ft.data.magic import HEAD_BYTES, what_it_is
from qwenvl_ft.errors import Problem


def entries_of(file: Path, name: str) -> Iterator[Entry]:
    """The entries of a file, which `name` is called in their places."""
    try:
        with file.open("rb") as opened:
            kind = what_it_is(opened.read(HEAD_BYTES))
    except OSError:
        fix = "give the JSON file of conversations (a config's train_meta_file)"
        yield Entry("", Problem(str(file), "cannot be read as a file", fix))
        return
    if kind and kind.as_meta:
        yield Entry("", Problem(name, f"is {kind.what}", kind.as_meta))
        return
    yield from json_entries(file, name)
