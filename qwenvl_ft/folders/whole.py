"""Folders that are whole or not there: written aside, flushed, listed in a manifest with sizes and hashes, then renamed.

A kill, a full disk or a power cut at any moment leaves the older checkpoints as they were and nothing that looks finished.
No pickle is written or read: tensors are safetensors, the rest is JSON.
"""

import hashlib
import json
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout

from qwenvl_ft.errors import Problem, UserError

MANIFEST = "MANIFEST.json"
INCOMING = ".incoming"
LOCK = ".lock"  # left in place: who waits for it must find the same file


def write_whole(folder: Path, write: Callable[[Path], dict[str, str] | None], replace: bool = True) -> None:
    """Calls `write` with a folder beside `folder`, then gives it that name. An older `folder` is replaced at the end, or refused.

    `write` may return the sha256 of files by name, where it knows them: gigabytes need not be read again. What a killed
    process left aside here is taken away first. Raises UserError if another process writes the same folder, or if the disk
    refuses.
    """
    incoming = folder.parent / INCOMING / folder.name
    lock = incoming.with_name(f"{folder.name}.lock")
    with writing(folder):
        incoming.parent.mkdir(parents=True, exist_ok=True)
        _clear(incoming.parent)
        try:
            taken = FileLock(lock, blocking=False).acquire()  # the system lets go of it when this process ends, however it does
        except Timeout:
            raise UserError(Problem(str(folder), "is being written by another process", "wait for it")) from None
        with taken:
            try:
                shutil.rmtree(incoming, ignore_errors=True)
                incoming.mkdir()
                seal(incoming, write(incoming) or {})
                if replace:
                    shutil.rmtree(folder, ignore_errors=True)
                elif folder.exists():
                    raise UserError(Problem(str(folder), "exists already", "choose another folder, or delete it"))
                incoming.rename(folder)
                _flush(folder.parent)
            finally:
                with suppress(OSError):  # Windows deletes no file that is open
                    lock.unlink(missing_ok=True)
                discard(incoming)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Says in words what the disk refuses, being full or read-only or gone, whichever library was writing. Raises UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # safetensors and tokenizers put the number into a text, torch's writer of files leaves it out.
        number = re.search(r"\(os error (\d+)\)", str(error))
        said = os.strerror(int(number[1])) if number else error.strerror if isinstance(error, OSError) else None
        if said is None and "PytorchStreamWriter" not in str(error):
            raise
        free = shutil.disk_usage(next(parent for parent in folder.absolute().parents if parent.is_dir())).free
        place = getattr(error, "filename", None) or folder
        raise UserError(Problem(str(place), f"{said or 'cannot be written'} ({free / 2**30:.1f} GiB free)",
                                "mend that and run it again, a training with resume=true")) from error  # fmt: skip


def _clear(aside: Path) -> None:
    """Deletes what was written aside by processes that ended in the middle: no lock of theirs is held any more."""
    for name in sorted({path.name.removesuffix(".lock") for path in aside.iterdir()}):
        lock = aside / f"{name}.lock"
        with suppress(Timeout), FileLock(lock, blocking=False):
            shutil.rmtree(aside / name, ignore_errors=True)
            with suppress(OSError):
                lock.unlink(missing_ok=True)


def held(output_dir: Path) -> BaseFileLock:
    """The lock of a run's folder, until it is released or this process ends, however it does. Raises UserError if another has it.

    It is the folder's and not the launcher's: processes that go on after a launcher was killed hold it still.
    """
    path = output_dir / LOCK
    with writing(path):
        try:
            lock = FileLock(path, blocking=False).acquire().lock
        except Timeout:
            who = "another run"
            with suppress(OSError):  # Windows lets nobody read it meanwhile
                who = path.read_text().strip() or who
            raise UserError(Problem(f"output_dir: {output_dir}", f"{who} is training into it",
                                    "wait for it or end it, or choose another output_dir")) from None  # fmt: skip
        path.write_text(f"process {os.getpid()} on {platform.node()}\n")
    return lock


def holder(output_dir: Path) -> tuple[int, str] | None:
    """(process, machine) of the run that holds the lock of `held`; None where none does. Not told from a lock's being there alone:
    who ends leaves the file. A process that has ended here is not asked for the lock, which a run that begins may be taking.
    """
    path = output_dir / LOCK
    try:
        said = re.fullmatch(r"process (\d+) on (.+)\n", path.read_text())
        if said is None or (said[2] == platform.node() and not os.path.exists(f"/proc/{said[1]}") and os.path.exists("/proc")):
            return None
        with FileLock(path, blocking=False):
            return None
    except Timeout:
        return (int(said[1]), said[2]) if said else None
    except (OSError, UnicodeDecodeError):
        return None


def seal(folder: Path, known: dict[str, str]) -> None:
    """Flushes every file of the folder to the disk and writes the manifest of their sizes and hashes.

    Some libraries write files that only their owner may read: here they get the folder's rights.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    manifest = {}
    for path in files:
        name = str(path.relative_to(folder))
        path.chmod(folder.stat().st_mode & 0o666)
        manifest[name] = {"bytes": path.stat().st_size, "sha256": known.get(name) or sha256(path)}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    for path in [*files, folder / MANIFEST, *(path for path in folder.rglob("*") if path.is_dir()), folder]:
        _flush(path)


def damage(folder: Path, but: re.Pattern[str] | None = None) -> str | None:
    """What is wrong with a folder against its manifest, in words; None if it is whole. Names that match `but` are not looked at."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        for name, wanted in manifest.items():
            path = folder / name
            if but and but.match(name):
                continue
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != wanted["bytes"] or sha256(path) != wanted["sha256"]:
                return f"{name} is damaged"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"its {MANIFEST} is missing or damaged"
    return None


def write_json(path: Path, value: Any) -> None:
    """Replaces the file in one move."""
    write_lines(path, [json.dumps(value, indent=1, ensure_ascii=False)])


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Replaces the file in one move; of the lines only one is held."""
    aside = path.with_name(path.name + ".incoming")
    with aside.open("w", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)
    _flush(aside)
    os.replace(aside, path)


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def short_hash(value: Any) -> str:
    """Sixteen hex digits that name a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def discard(incoming: Path) -> None:
    """Takes a folder away that was written aside, and the one that holds such folders once it is empty."""
    shutil.rmtree(incoming, ignore_errors=True)
    with suppress(OSError):  # another save may be under way there
        incoming.parent.rmdir()


def _flush(path: Path) -> None:
    """Puts a file, or what a folder says of its files, on the disk. Windows opens no folder, and flushes their files with them."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
