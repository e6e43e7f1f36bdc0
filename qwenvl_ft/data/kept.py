"""Where prepared tables are kept, for whom one is made, and whether it is still true.

A table has the name of everything that it was made from; its media are looked at each time it is opened. One process makes it,
the others wait.
"""

import atexit
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import tokenizers
from filelock import FileLock

from qwenvl_ft.console import print_note
from qwenvl_ft.data.chat import Chat
from qwenvl_ft.data.files.containers import files_of
from qwenvl_ft.data.meta_file import Meta
from qwenvl_ft.data.mirror import Mirror
from qwenvl_ft.data.packed import GONE
from qwenvl_ft.data.reading import Reading
from qwenvl_ft.data.table import Scripts
from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.folders.cache import cache_folder, remove_old
from qwenvl_ft.folders.objects import Unreachable
from qwenvl_ft.folders.whole import MANIFEST, sha256, short_hash, write_whole

TABLES = 8  # that are kept: the ones opened last
HASHED_BYTES = 64 * 2**20  # of a meta-file that is known by its content: a larger one cannot be written twice within a tick


def table_name(
    meta: Meta,
    data_dir: Path | None,
    model: Path,
    chat: Chat,
    reading: Reading,
    seed: int,
    held_out: Meta | None = None,
    held_out_dir: Path | None = None,
) -> str:
    """Differs where anything does that a table is made from, but for the media themselves: files, those of evaluation that its
    records are compared with, settings, tokenizer, code."""
    weights = [1.0] if isinstance(meta, Path | str) else [of.weight for of in meta]
    made_from = {
        "parts": _files(meta),
        "held out": [_files(held_out), str(held_out_dir and held_out_dir.resolve())] if held_out else [],
        "data_dir": str(data_dir and data_dir.resolve()),
        "tokenizer": sha256(model / "tokenizer.json"),
        "chat": [repr(getattr(chat, part.name)) for part in fields(chat) if part.name != "tokenizer"],
        "reading": repr(reading),
        "seed": seed if any(weight % 1 for weight in weights) else 0,
        "code": [code_of(Path(__file__).parent), tokenizers.__version__],
    }
    return short_hash(made_from)


def _files(meta: Meta) -> list[Any]:
    """Each file of a meta-file, where its media lie, how often it counts."""
    if isinstance(meta, Path | str):
        return [_states(Path(meta))]
    return [(_states(of.file), str(of.data_dir and of.data_dir.resolve()), of.weight) for of in meta]


def _states(file: Path) -> list[Any]:
    try:
        files = files_of(file)
        return [(str(path.absolute()), str(path.resolve()), *_state(path)) for path in files]  # whose folder may be a link
    except Unreachable:
        raise
    except (UserError, OSError):  # whoever reads it will say so
        return [str(file)]


def _state(path: Path) -> tuple[int, int, str]:
    state = path.stat()
    return state.st_size, state.st_mtime_ns, sha256(path) if state.st_size <= HASHED_BYTES else ""


def code_of(room: Path) -> str:
    """The code that makes what is kept: another version of it makes another one, and nobody has to think of a number."""
    digest = hashlib.sha256()
    for path in sorted(room.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def kept_table(name: str, make: Callable[[Path], None]) -> Scripts:
    """The table of this name, made by `make` in a folder that it is given, unless it is there and its media are as they were.

    Where the cache cannot be written it is made in a temporary folder. Raises what `make` does; UserError for a full disk, and
    where a script that prepares as it is imported is imported by the processes that it started for that.
    """
    if sys.modules.get("__mp_main__", sys.modules["__main__"]) is not sys.modules["__main__"]:  # whoever started it has the lock
        fix = 'put what it does under `if __name__ == "__main__":`'
        raise UserError(Problem("the script", "is run again by each process that it starts to read records", fix))
    folder = cache_folder() / "prepared"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        taken = FileLock(folder / f"{name}.lock").acquire()
    except OSError as error:
        print_note(f"what is prepared is not kept: {folder} cannot be written ({error.strerror})")
        aside = Path(tempfile.mkdtemp(prefix="qwenvl_ft-"))
        atexit.register(shutil.rmtree, aside, ignore_errors=True)
        write_whole(aside / name, make)
        return Scripts(aside / name)
    with taken:
        made = [int(path.name.rpartition("-")[2]) for path in folder.glob(f"{name}-*")]
        newest = folder / f"{name}-{max(made, default=0)}"
        found = _opened(newest)
        if found is None:  # another folder: whoever reads the old one is not to read this
            newest = folder / f"{name}-{max(made, default=0) + 1}"
            write_whole(newest, make)
            found = Scripts(newest)
        os.utime(newest)
        remove_old(folder, MANIFEST, TABLES)  # a process that has one open keeps what it has mapped
    return found


def _opened(folder: Path) -> Scripts | None:
    """The table, where it is whole and its media are as they were."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if any((folder / name).stat().st_size != of["bytes"] for name, of in manifest.items()):
            return None
        found = Scripts(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return found if _as_they_were(found) else None


def _as_they_were(scripts: Scripts) -> bool:
    for mirror in map(Mirror, scripts.facts.get("mirrors", [])):  # first the copies are made what the server has now
        within = f"{mirror.folder}{os.sep}"
        mirror.bring(path.removeprefix(within) for path, *_ in scripts.files if path.startswith(within))
    for path, num_bytes, mtime_ns, _ in scripts.files:
        try:
            state = os.stat(path)
        except (OSError, ValueError):
            if num_bytes != GONE:
                return False
        else:
            if state.st_size != num_bytes or state.st_mtime_ns != mtime_ns:
                return False
    return True
