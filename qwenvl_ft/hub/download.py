"""Brings a model from a hub whole or says what is missing: pinned to one commit, every file checked by size and hash.

The hubs' clients bring the files into `.download/parts` and check them; a file gets its name in the folder only after that.
`.download/manifest.json` records hub, repository, commit and every file's size and sha256, and whether the hub listed a hash
to check it by (`checked`): a second run looks at every byte, brings what is missing or damaged, and stays at that commit unless
another revision is asked for.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock, Timeout

from qwenvl_ft.config import Config
from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.folders.problems import broken_weights, pointers, whole_problems
from qwenvl_ft.folders.whole import sha256, write_json
from qwenvl_ft.hub.clients import HUBS, LATER, MODEL, NO_ROOM, HubPlace, Unreachable, Wanted, pieces, read_source

ASIDE = ".download"
MANIFEST, PARTS = f"{ASIDE}/manifest.json", f"{ASIDE}/parts"
MODELS = Path("models")  # where a config's `model: hf:ORG/NAME` is brought to, as hf/ORG/NAME
Say = Callable[[str], None]


def with_local_model(config: Config, say: Say) -> Config:
    """The config with a folder for its model: brought into models/HUB/ORG/NAME on first use if it names a hub.

    Raises UserError if there is no such folder, if it is a git clone without its large files, or if weights are missing or cut.
    """
    source = read_source(str(config.model))
    if source is None:
        if not config.model.is_dir():
            hint = ", or modelscope:ORG/NAME or hf:ORG/NAME to bring it from a hub"
            raise UserError(Problem(f"model: {config.model}", "is no folder", f"give the folder of a downloaded model{hint}"))
        if found := [*pointers(config.model), *broken_weights(config.model)]:
            raise UserError(*found)
        return config
    own = MODELS / source.hub / source.repo
    named = MODELS / own.name  # where a user of `qwenvl-ft download` may have brought the same one
    folder = next((folder for folder in (own, named) if is_complete(folder, source)), None)
    if folder is None:
        folder = own
        with alone(folder, say):  # of several processes the first downloads, the others wait and then find it whole
            if not is_complete(folder, source):
                download(source, folder, (), say)
    return config.model_copy(update={"model": folder})


def is_complete(folder: Path, source: HubPlace) -> bool:
    """Whether an earlier download ended here and every file still has its size; hashes are for `qwenvl-ft download`."""
    manifest = read_manifest(folder)
    sizes = {folder / name: of["bytes"] for name, of in manifest["files"].items()}
    return (
        manifest["complete"]
        and (manifest["hub"], manifest["repo"]) == source[:2]
        and source.revision in (None, manifest["revision"], manifest["commit"])
        and all(path.is_file() and path.stat().st_size == size for path, size in sizes.items())
    )


def download(source: HubPlace, folder: Path, names: Sequence[str], say: Say, kind: str = MODEL) -> dict[str, Any]:
    """Brings the whole model, or only the files of a model or a data set that `names` (patterns) match. Returns the manifest.

    Raises UserError with everything that is still missing or wrong; what is right stays for the next run.
    """
    before = read_manifest(folder)
    if before["repo"] and (before["hub"], before["repo"]) != source[:2]:
        raise UserError(Problem(str(folder), f"holds {before['hub']}:{before['repo']}", "choose another --local-dir, or delete it"))
    hub = HUBS[source.hub](kind)
    try:
        commit, files = hub.listing(source.repo, source.revision or before["commit"])
    except Unreachable as error:
        return _without_the_hub(folder, source, before, names, error, say)
    say(f"{source.hub}:{source.repo} at {commit}: {len(files)} files, {sum(file.size for file in files.values()) / 1e9:.2f} GB")
    if strange := [name for name in files if _leaves(folder, name)]:
        raise UserError(*(Problem(f"{source.repo}: {name}", "is a path that a model has no use for", "do not use this repository")
                          for name in strange))  # fmt: skip
    chosen = {name: files[name] for name in _choose(files, names, source.repo)}
    if names and before["commit"] not in (None, commit):
        raise UserError(Problem(str(folder), f"holds {before['commit']}", f"leave --file out to bring it all to {commit}"))

    recorded = before["files"] if before["commit"] == commit else {}
    known = {  # where no hash is listed, that of the last time is one, too
        name: wanted._replace(sha256=recorded.get(name, {}).get("sha256", "none"))
        if before["commit"] and not wanted.hashed else wanted for name, wanted in chosen.items()
    }  # fmt: skip
    lacking = hub.lacking(source.repo, commit, known, folder)
    missing = {name: wanted for name, wanted in chosen.items() if name in lacking}
    for name in missing:
        if (folder / name).exists():
            say(f"{name} is here but not as the hub lists it: brought again")
    parts = folder / PARTS
    folder.mkdir(parents=True, exist_ok=True)
    if _to_come(folder, missing) > shutil.disk_usage(folder).free:
        raise UserError(_no_room(folder, missing, "the disk is too full"))
    parts.mkdir(parents=True, exist_ok=True)
    manifest: dict[str, Any] = {  # what only the commit that was here has stays listed until all of this one is there
        "hub": source.hub, "repo": source.repo, "revision": source.revision or before["revision"], "commit": commit,
        "complete": False, "files": {name: of for name, of in before["files"].items() if names or name not in files},
    }  # fmt: skip
    manifest["files"] |= {name: _record(wanted, folder / name) for name, wanted in chosen.items() if name not in lacking}
    write_json(folder / MANIFEST, manifest)
    try:
        problems = hub.fetch(source.repo, commit, missing, parts) if missing else []
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise UserError(_no_room(folder, missing, f"the disk takes no more ({error.strerror})")) from error
    for name, wanted in missing.items():
        if (parts / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (parts / name).replace(folder / name)
            manifest["files"][name] = _record(wanted, folder / name)
            say(f"{name}, {wanted.size:,} bytes, {'hash as listed' if wanted.hashed else 'size as listed, no hash listed'}")
    if not problems and not names:
        for name in manifest["files"].keys() - files.keys():  # a shard too many would be loaded
            (folder / name).unlink(missing_ok=True)
            del manifest["files"][name]
    if not problems and (not names or before["complete"]):
        problems = whole_problems(folder)
        manifest["complete"] = not problems
    write_json(folder / MANIFEST, manifest)
    if problems:
        raise UserError(*problems)
    shutil.rmtree(parts, ignore_errors=True)
    return manifest


def _to_come(folder: Path, missing: dict[str, Wanted]) -> int:
    """Bytes that the disk must still take."""
    here = {name: sum(piece.stat().st_size for piece in pieces(folder / PARTS / name)) for name in missing}
    return sum(max(0, wanted.size - here[name]) for name, wanted in missing.items())


def _no_room(folder: Path, missing: dict[str, Wanted], what: str) -> Problem:
    need, free = _to_come(folder, missing) / 1e9, shutil.disk_usage(folder).free / 1e9
    return Problem(str(folder), f"{what}: {need:.2f} GB are to come, {free:.2f} GB are free", f"free some space, then {LATER}")


def _record(wanted: Wanted, path: Path) -> dict[str, Any]:
    """A file's line in the manifest."""
    return {"bytes": wanted.size, "sha256": wanted.sha256 or sha256(path), "checked": "hash" if wanted.hashed else "size"}


def _without_the_hub(
    folder: Path, source: HubPlace, before: dict[str, Any], names: Sequence[str], error: Unreachable, say: Say
) -> dict[str, Any]:
    """What is known of a folder that is whole while the hub does not answer: by the recorded hashes, or without a record by
    what a model must have. Else raises the hub's error and what is wrong here."""
    why = error.problems[0].what
    by_hand = folder.is_dir() and any(path.name != ASIDE for path in folder.iterdir())
    if not before["files"] and not names and not source.revision and by_hand:
        if problems := whole_problems(folder):
            raise UserError(*error.problems, *problems)
        say(f"{folder} looks whole, but nothing says which revision it is ({why})")
        return before | {"complete": True}
    of_record = names and all(any(fnmatchcase(file, name) for file in before["files"]) for name in names)
    if source.revision not in (None, before["revision"], before["commit"]) or not (before["complete"] or of_record):
        raise error  # what is not recorded here only the hub knows
    chosen = _choose(before["files"], names, source.repo)
    if wrong := [name for name in damaged(folder) if name in chosen]:
        raise UserError(*error.problems, *(Problem(str(folder / name), "is missing or damaged", LATER) for name in wrong))
    say(f"every hash is as recorded ({why})")
    return before


def _choose(files: Iterable[str], names: Sequence[str], repo: str) -> list[str]:
    """The files that match one of the patterns, all of them without patterns. Raises UserError for a pattern without a match."""
    problems = []
    for name in names:
        if not any(fnmatchcase(file, name) for file in files):
            close = get_close_matches(name, files, 1)
            fix = f"did you mean {close[0]}?" if close else f"choose of {', '.join(sorted(files))}"
            problems.append(Problem(f"--file {name}", f"{repo} has no such file", fix))
    if problems:
        raise UserError(*problems)
    return [file for file in files if not names or any(fnmatchcase(file, name) for name in names)]


def _leaves(folder: Path, name: str) -> bool:
    """Whether a listed path would lie outside the folder, or inside what is ours there."""
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or path.parts[0] == ASIDE or {"..", "\0"} & {*path.parts, *name} or "\\" in name:
        return True
    return not (folder / path).parent.resolve().is_relative_to(folder.resolve())  # through a link that lies there


def read_manifest(folder: Path) -> dict[str, Any]:
    """What an earlier download recorded; every key empty where there was none, or where it cannot be what we wrote."""
    empty: dict[str, Any] = {"hub": None, "repo": None, "revision": None, "commit": None, "complete": False, "files": {}}
    try:
        found = empty | json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        whole = all({"bytes", "sha256"} <= of.keys() and not _leaves(folder, name) for name, of in found["files"].items())
        return found if whole else empty
    except (OSError, ValueError, TypeError, AttributeError):
        return empty


def damaged(folder: Path) -> list[str]:
    """The files that an earlier download recorded and that are missing or other now; reads every byte."""
    files = read_manifest(folder)["files"].items()
    return [name for name, of in files if not Wanted(of["bytes"], of["sha256"], True).is_at(folder / name)]


@contextmanager
def alone(folder: Path, say: Say) -> Iterator[None]:
    """One process of this machine at a time. The folder is made, and taken away again if it stays empty.

    Raises UserError if it cannot be written.
    """
    aside = folder / ASIDE
    lock = FileLock(aside / "lock")
    try:
        _wait_for(lock, aside, say)
        try:
            yield
        finally:
            with suppress(OSError):  # which says that it is not empty, or on Windows that the lock is open
                (aside / "lock").unlink()  # while it is held: whoever waits for it sees that it is no longer the lock
                aside.rmdir()
                folder.rmdir()
            lock.release()
    except OSError as error:
        fix = "free some space, or choose a folder that you may write to"
        raise UserError(Problem(str(error.filename or folder), f"cannot be written ({error.strerror})", fix)) from error


def _wait_for(lock: FileLock, aside: Path, say: Say) -> None:
    for tries_left in reversed(range(100)):
        try:
            aside.mkdir(parents=True, exist_ok=True)
            with suppress(Timeout):
                lock.acquire(blocking=False)
                return
            say(f"{aside.parent}: another process is downloading to it; waiting for it to end")
            lock.acquire()
            return
        except (FileNotFoundError, FileExistsError):  # whoever held it is taking the empty folders away
            if not tries_left:
                raise
