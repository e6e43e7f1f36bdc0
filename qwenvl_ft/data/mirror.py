"""Copies of what lies at addresses, in a bounded folder of the user's cache, so that every reader finds files.

~/.cache/qwenvl_ft/objects/s3/BUCKET/KEY is s3://BUCKET/KEY. A copy comes there in one move, and its time says which version it is:
who brings it again compares that and its size with the server's. Where it gets too much, what was used longest ago goes, but
nothing that a living process uses: each keeps a list of that, and a lock on it for as long as it lives.
"""

import os
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from functools import cache, cached_property
from pathlib import Path
from posixpath import normpath

from filelock import BaseFileLock, FileLock, Timeout

from qwenvl_ft.console import counting, print_note
from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.folders.cache import cache_folder, free_bytes
from qwenvl_ft.folders.objects import Objects, State, address_of

BOUND = "QWENVL_FT_CACHE_GIB"  # the variable that says how much may lie there
SHARE = 0.5  # of what is free and what lies there already, which is the bound where nobody says one
AT_ONCE = 32  # objects that are asked for or brought at a time
PATIENCE_S = 2.0  # before it is said that another process is waited for
LISTS = 32  # of what dead processes used: of earlier ones is no memory
MIB = 2**20


def objects_folder() -> Path:
    """Where the copies are, without links."""
    return _real(cache_folder()) / "objects"


@cache
def _real(folder: Path) -> Path:
    return Path(os.path.realpath(folder))


def path_of(address: str) -> Path:
    """Where a copy of it is, or would be."""
    scheme, _, below = address.partition("://")
    if {"", ".", ".."} & set(below.rstrip("/").split("/")):
        raise UserError(Problem(address, "has an empty part, or one of dots", "write the address without it"))
    return objects_folder() / scheme / below.rstrip("/")


def called(path: Path) -> str:
    """A path as a person knows it: of a copy, the address."""
    with suppress(ValueError):
        scheme, *below = path.relative_to(objects_folder()).parts
        return f"{scheme}://{'/'.join(below)}"
    return str(path)


def local_folder(path: Path) -> Path:
    """A folder as it is; of an address that of the copies, made."""
    if (address := address_of(path)) is None:
        return path
    folder = path_of(address)
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def local_files(path: Path, endings: tuple[str, ...]) -> list[Path] | None:
    """The copies of what an address means, brought: of an object or of those that match a pattern; or their folder, with those
    directly within it that have one of these endings. None for a path. Raises UserError where nothing is there.
    """
    if (address := address_of(path)) is None:
        return None
    top = address.partition("*")[0].rpartition("/")[0] if "*" in address else address
    mirror = Mirror(top)
    if top == address and mirror.bring([""]):
        return [mirror.folder]
    pattern = address.removeprefix(f"{top}/") if top != address else "*"
    found = [name for name in mirror.listing if _matches(name.split("/"), pattern.split("/"))]
    names = [name for name in found if name.lower().endswith(endings)] or (found if top != address else [])
    if not names:
        fix = "name one file: nobody lists what a web server has" if mirror.objects.is_web else "is it the right endpoint and name?"
        raise UserError(Problem(address, "is not there", fix))
    if top != address:
        mirror.bring(names)
        return [mirror.folder / name for name in names]
    here = [path.name for path in mirror.folder.iterdir() if path.is_file()] if mirror.folder.is_dir() else []
    mirror.bring([*names, *(name for name in here if name not in mirror.listing)])
    return [mirror.folder]


def _matches(name: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether glob would find a name by a pattern, both in parts: ** is any number of folders."""
    if pattern[:1] == ["**"]:
        return _matches(name, pattern[1:]) or (bool(name) and _matches(name[1:], pattern))
    if not name or not pattern:
        return not name and not pattern
    return fnmatchcase(name[0], pattern[0]) and _matches(name[1:], pattern[1:])


def mirror_of(folder: Path) -> "Mirror | None":
    """The mirror of a folder of copies; None for another folder."""
    return Mirror(address) if (address := address_of(called(folder))) else None


class Mirror:
    """What lies below an address, and its copies. What is there is asked once: a mirror knows nothing of what comes later."""

    def __init__(self, address: str):
        self.objects, self.folder = Objects(address), path_of(address)
        self.known: dict[str, State | None] = {}

    @cached_property
    def listing(self) -> dict[str, State]:
        """Of all objects, by name in order; empty for a web server, which nobody can ask that."""
        return {} if self.objects.is_web else dict(sorted(self.objects.states().items()))

    @property
    def was_asked(self) -> bool:
        """Whether anything was looked for."""
        return bool(self.known) or "listing" in vars(self)

    def bring(self, names: Iterable[str]) -> int:
        """Makes the copies of these what they are on the server, gone ones among them; of a folder those within it.

        Returns how many there are. Raises UserError where the cache may not hold them.
        """
        inside = {normpath(name) if name else "": None for name in names if "\0" not in name}
        with _alone():
            wanted = self._states({name: None for name in inside if name != "." and not name.startswith(("/", "../"))})
            paths = {name: self.folder / name if name else self.folder for name in wanted}
            _use(paths.values())
            lacking: dict[str, State] = {}
            for name, state in wanted.items():
                if state is None:
                    with suppress(OSError):  # a folder, too
                        paths[name].unlink(missing_ok=True)
                elif not _is(paths[name], state):
                    lacking[name] = state
            if lacking:
                with _writing(self.folder):
                    self._get(lacking, paths)
        return sum(state is not None for state in wanted.values())

    def _states(self, names: Mapping[str, None]) -> dict[str, State | None]:
        if self.objects.is_web or "" in names:
            new = [name for name in names if name not in self.known]
            with ThreadPoolExecutor(AT_ONCE) as pool:
                self.known.update(zip(new, pool.map(self.objects.state, new), strict=True))
            return {name: self.known[name] for name in names}
        found: dict[str, State | None] = {}
        for name in names:
            found[name] = self.listing.get(name)
            if found[name] is None and self._is_folder(name):
                del found[name]
                found |= {below: state for below, state in self.listing.items() if below.startswith(f"{name}/")}
        return found

    @cached_property
    def _folders(self) -> set[str]:
        return {str(parent) for name in self.listing for parent in Path(name).parents}

    def _is_folder(self, name: str) -> bool:
        return name in self._folders

    def _get(self, lacking: dict[str, State], paths: dict[str, Path]) -> None:
        _make_room(sum(state.num_bytes or 0 for state in lacking.values()), self.objects.address)
        aside = objects_folder() / ".incoming" / uuid.uuid4().hex
        aside.mkdir(parents=True)

        def get(number: int, name: str) -> int:
            part = aside / str(number)
            self.objects.get(name, lacking[name], part)
            paths[name].parent.mkdir(parents=True, exist_ok=True)
            part.replace(paths[name])
            return lacking[name].num_bytes or 0

        total, done = sum(state.num_bytes or 0 for state in lacking.values()), 0
        pool = ThreadPoolExecutor(AT_ONCE)
        try:
            with counting(f"bringing MiB of {self.objects.address}") as tell:
                for num_bytes in pool.map(get, range(len(lacking)), lacking):
                    done += num_bytes
                    tell(done // MIB, total // MIB)
        finally:
            pool.shutdown(cancel_futures=True)
            for part in aside.iterdir():
                part.unlink()
            aside.rmdir()


def _is(path: Path, state: State) -> bool:
    try:
        found = path.stat()
    except OSError:
        return False
    return found.st_size == (found.st_size if state.num_bytes is None else state.num_bytes) and int(found.st_mtime) == state.mtime


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        what = f"cannot be kept in {folder} ({error.strerror})"
        raise UserError(
            Problem(called(folder), what, "free some space, or set XDG_CACHE_HOME to a folder on another disk")
        ) from error


@contextmanager
def _alone() -> Iterator[None]:
    """One process at a time brings or deletes."""
    folder = objects_folder()
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        try:
            lock.acquire(timeout=PATIENCE_S)
        except Timeout:
            print_note(f"waiting for another process that brings files into {folder}")
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _make_room(needed: int, address: str) -> None:
    """Deletes what was used longest ago until so many bytes more may lie here. Raises UserError where they may not."""
    folder = objects_folder()
    counted = folder / ".bytes"  # at most: to look at a million files takes seconds
    before = counted.read_text() if counted.is_file() else ""  # empty where whoever wrote it was killed
    total = int(before) if before.isdigit() else 0
    if not before.isdigit() or total + needed > _bound(total):
        files = {
            path: path.stat().st_size for top, _, names in os.walk(folder) for name in names if not _own(path := Path(top, name))
        }
        total = sum(files.values())
        bound = _bound(total)
        live, used = _lists(folder)
        for path in sorted(files, key=lambda path: used.get(str(path), 0.0)):
            if total + needed <= bound:
                break
            if str(path) not in live:
                path.unlink(missing_ok=True)
                total -= files[path]
        if total + needed > bound:
            what = f"{folder} may hold {bound / MIB:,.1f} MiB, and with what is in use it takes {(total + needed) / MIB:,.1f}"
            fix = f"raise {BOUND}, the variable that says how many GiB, or set XDG_CACHE_HOME to a folder on a larger disk"
            raise UserError(Problem(address, what, fix))
    counted.write_text(str(total + needed))


def _bound(total: int) -> int:
    given = os.environ.get(BOUND)
    if given is None:
        return int(SHARE * (total + free_bytes(objects_folder())))
    with suppress(ValueError):
        if float(given) > 0:
            return int(float(given) * 2**30)
    raise UserError(Problem(f"{BOUND}={given}", "is no size", "give a number of GiB, such as 200"))


def _own(path: Path) -> bool:
    """Whether it is a file of this module."""
    return path.relative_to(objects_folder()).parts[0].startswith(".")


MINE: dict[Path, tuple[Path, BaseFileLock]] = {}  # of this process, by folder: what it uses, and the lock that says that it lives


def _use(paths: Iterable[Path]) -> None:
    """Says that this process uses them, to its end."""
    folder = objects_folder() / ".used"
    if folder not in MINE:
        folder.mkdir(parents=True, exist_ok=True)
        name = folder / uuid.uuid4().hex
        lock = FileLock(name.with_suffix(".lock")).acquire().lock
        MINE[folder] = name, lock
    with MINE[folder][0].open("a", encoding="utf-8", errors="surrogateescape") as listed:
        listed.writelines(f"{path}\n" for path in paths)


def _lists(folder: Path) -> tuple[set[str], dict[str, float]]:
    """What living processes use; and when each file was used last."""
    live: set[str] = set()
    used: dict[str, float] = {}
    dead: list[Path] = []
    for lock in sorted((folder / ".used").glob("*.lock"), key=lambda path: path.stat().st_mtime):
        listed = lock.with_suffix("")
        names = listed.read_text(encoding="utf-8", errors="surrogateescape").splitlines() if listed.is_file() else []
        used |= dict.fromkeys(names, listed.stat().st_mtime if names else 0.0)
        try:
            with FileLock(lock, blocking=False):
                dead.append(listed)
        except Timeout:
            live |= set(names)
    for listed in dead[:-LISTS]:
        listed.unlink(missing_ok=True)
        listed.with_suffix(".lock").unlink(missing_ok=True)
    return live, used
