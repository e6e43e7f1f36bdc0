"""The sha256 of files that are large or many, read once and then remembered by what the file system says of them.

A digest is kept under the file's path, with size, inode and both times: whoever copies can set mtime back, but not ctime. That of
a file that changed just now is not kept, since one more change within a tick of the clock would leave no trace.
"""

import json
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from qwenvl_ft.console import counting
from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.folders.cache import cache_folder
from qwenvl_ft.folders.whole import sha256

THREADS = 8  # reading and hashing both let go of Python's lock
AT_ONCE = 64  # small files, each of which would cost more to hand over than to hash
TICK_NS = 2_000_000_000  # the coarsest clock of a file system, FAT's
Digests = dict[str, list[object]]  # by whole path: what the file system says, and the digest
SEEN: Digests = {}  # by this process, which looks again at each adapter of a base, and may have no cache that it can write


def user_cache() -> Path:
    """Where digests are kept of what belongs to no run: the bases."""
    return cache_folder() / "hashes.json"


def digests(paths: Iterable[Path], cache: Path, what: str) -> dict[Path, str]:
    """The sha256 of each file by its path, in parallel, with a bar named `what` where it takes longer than seconds.

    Raises UserError for each file that cannot be read.
    """
    known = _read(cache) | SEEN
    wanted = {path: os.path.abspath(path) for path in paths}
    try:
        marks = {name: _mark(name) for name in wanted.values()}
        lacking = [name for name, mark in marks.items() if known.get(name, [None])[0] != mark]
        pool, step = ThreadPoolExecutor(THREADS), max(1, min(AT_ONCE, len(lacking) // (4 * THREADS)))
        parts = [lacking[start : start + step] for start in range(0, len(lacking), step)]
        try:
            with counting(what) as tell:
                for number, (some, hashed) in enumerate(zip(parts, pool.map(_sha256, parts), strict=True), 1):
                    known |= {name: [marks[name], digest] for name, digest in zip(some, hashed, strict=True)}
                    tell(min(number * step, len(lacking)), len(lacking))
        finally:
            pool.shutdown(cancel_futures=True)  # or Ctrl-C would wait for every file
        found = {path: str(known[name][1]) for path, name in wanted.items()}
        for name in lacking:
            if _mark(name) != marks[name] or not _settled(name):
                del known[name]
        SEEN.update({name: known[name] for name in lacking if name in known})
    except OSError as error:
        raise UserError(Problem(str(error.filename), f"cannot be read ({error.strerror})", "copy it again")) from error
    if lacking:
        _write(cache, {name: kept for name, kept in known.items() if name in marks or os.path.exists(name)})
    return found


def _sha256(names: Sequence[str]) -> list[str]:
    return [sha256(Path(name)) for name in names]


def _mark(name: str) -> list[int]:
    """What changes when a file does."""
    stat = os.stat(name)
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _settled(name: str) -> bool:
    stat = os.stat(name)
    return time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) > TICK_NS


def _read(cache: Path) -> Digests:
    """What the file holds, as far as it is what `_write` writes."""
    try:
        found = json.loads(cache.read_text(encoding="utf-8"))
        return {name: kept for name, kept in found.items() if isinstance(kept, list) and len(kept) == 2}
    except (OSError, ValueError, AttributeError):
        return {}


def _write(cache: Path, known: Digests) -> None:
    """Replaces the file in one move. Where it cannot be written, files are hashed again the next time."""
    aside = cache.with_name(f".{cache.name}.{os.getpid()}")  # several processes write it; a hidden name makes no run of a folder
    with suppress(OSError):
        cache.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps(known), encoding="utf-8")
        os.replace(aside, cache)
