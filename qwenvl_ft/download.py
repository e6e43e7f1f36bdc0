"""Brings a model from a hub whole or says what is missing: pinned to one commit, every file checked by size and hash.

A file gets its name in the folder only after its hash was right; its part waits in `.download`, and a second run goes on
from there. `.download/manifest.json` records hub, repository, commit and every file's size and sha256: a second run looks at
every byte against it, brings what is missing or damaged, and stays at that commit unless another revision is asked for.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from qwenvl_ft.checkpoint import sha256, write_json
from qwenvl_ft.config import Config
from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.hubs import HUBS, LATER, Hub, Source, Unreachable, Wanted, read_source
from qwenvl_ft.modeldir import broken_weights, model_problems, pointers

ASIDE = ".download"
MODELS = Path("models")  # where a config's `model: hf:ORG/NAME` is brought to
Say = Callable[[str], None]


def with_local_model(config: Config, say: Say) -> Config:
    """The config with a folder for its model: brought into models/NAME on first use if it names a hub.

    Raises UserError if the folder is a git clone without its large files, or if weights are missing or cut.
    """
    source = read_source(str(config.model))
    if source is None:
        found = [*pointers(config.model), *broken_weights(config.model)] if config.model.is_dir() else []
        if found:
            raise UserError(*found)
        return config
    folder = MODELS / source.repo.split("/")[1]
    with alone(folder):  # of several processes the first downloads, the others wait and then find it whole
        if not is_complete(folder, source):
            download(source, folder, (), say)
    return config.model_copy(update={"model": folder})


def is_complete(folder: Path, source: Source) -> bool:
    """Whether an earlier download ended here and every file still has its size; hashes are for `qwenvl-ft download`."""
    manifest = read_manifest(folder)
    sizes = {folder / name: of["bytes"] for name, of in manifest["files"].items()}
    return (
        manifest["complete"]
        and (manifest["hub"], manifest["repo"]) == source[:2]
        and source.revision in (None, manifest["revision"], manifest["commit"])
        and all(path.is_file() and path.stat().st_size == size for path, size in sizes.items())
    )


def download(source: Source, folder: Path, names: Sequence[str], say: Say) -> dict[str, Any]:
    """Brings the whole model, or only the files that `names` (patterns) match. Returns the manifest.

    Raises UserError with everything that is still missing or wrong; what is right stays for the next run.
    """
    before = read_manifest(folder)
    if before["repo"] and (before["hub"], before["repo"]) != source[:2]:
        raise UserError(Problem(str(folder), f"holds {before['hub']}:{before['repo']}", "choose another --local-dir, or delete it"))
    hub: Hub = HUBS[source.hub]()
    try:
        commit, files = hub.listing(source.repo, source.revision or before["commit"])
    except Unreachable as error:
        return _without_the_hub(folder, source, before, names, error, say)
    say(f"{source.hub}:{source.repo} at {commit}: {len(files)} files, {sum(file.size for file in files.values()) / 1e9:.2f} GB")
    _check_names(files, source.repo)
    chosen = _choose(files, names, source.repo)
    if names and before["commit"] not in (None, commit):
        raise UserError(Problem(str(folder), f"holds {before['commit']}", f"leave --file out to bring it all to {commit}"))
    for name in before["files"].keys() - files.keys():  # of the commit that was here: a shard too many would be loaded
        (folder / name).unlink(missing_ok=True)

    have = {name: digest for name in chosen if (digest := _right(folder / name, files[name]))}
    missing = {name: files[name] for name in chosen if name not in have}
    for name in missing:
        if (folder / name).exists():
            say(f"{name} is here but not as the hub lists it: brought again")
    folder.mkdir(parents=True, exist_ok=True)
    need, free = sum(file.size for file in missing.values()), shutil.disk_usage(folder).free
    if need > free:
        raise UserError(Problem(str(folder), f"{need / 1e9:.1f} GB are to come, {free / 1e9:.1f} GB are free", "free some space"))
    manifest: dict[str, Any] = {
        "hub": source.hub, "repo": source.repo, "revision": source.revision or before["revision"], "commit": commit,
        "complete": False, "files": {name: of for name, of in before["files"].items() if name in files} if names else {},
    }  # fmt: skip
    manifest["files"] |= {name: {"bytes": files[name].size, "sha256": digest} for name, digest in have.items()}
    problems: list[Problem] = []
    for number, (name, wanted) in enumerate(missing.items(), 1):
        _write_manifest(folder, manifest)
        try:
            digest = _bring(hub, source.repo, commit, name, wanted, folder)
            manifest["files"][name] = {"bytes": wanted.size, "sha256": digest}
            say(f"[{number}/{len(missing)}] {name}, {wanted.size:,} bytes, hash as listed")
        except UserError as error:
            problems += error.problems
    if not problems and (not names or before["complete"]):
        problems += model_problems(folder)
        manifest["complete"] = not problems
    _write_manifest(folder, manifest)
    if problems:
        raise UserError(*problems)
    shutil.rmtree(folder / ASIDE / "parts", ignore_errors=True)
    return manifest


def _bring(hub: Hub, repo: str, commit: str, name: str, wanted: Wanted, folder: Path) -> str:
    """The sha256 of the file that now has its name in the folder. Raises UserError if a second try is wrong, too."""
    part = folder / ASIDE / "parts" / name
    for _ in range(2):
        hub.fetch(repo, commit, name, wanted, part)
        if digest := _right(part, wanted):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            part.replace(folder / name)
            return digest
        part.unlink(missing_ok=True)
    where = f"{repo}@{commit}, {name}"
    raise UserError(Problem(where, "came twice with another hash than the hub lists", f"{LATER}, or try the other hub"))


def _right(path: Path, wanted: Wanted) -> str | None:
    """The file's sha256 if its size is right and its hash what the hub says; else None."""
    if not path.is_file() or path.stat().st_size != wanted.size:
        return None
    digest = sha256(path)
    if wanted.sha256:
        return digest if digest == wanted.sha256 else None
    if wanted.blob:
        content = path.read_bytes()  # a small one: large files have a sha256 on every hub
        return digest if hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == wanted.blob else None
    return digest


def _without_the_hub(
    folder: Path, source: Source, before: dict[str, Any], names: Sequence[str], error: Unreachable, say: Say
) -> dict[str, Any]:
    """What is known of a folder that is whole while the hub does not answer: by the recorded hashes, or without a record by
    what a model must have. Else raises the hub's error and what is wrong here."""
    why = error.problems[0].what
    if not before["files"] and not names and folder.is_dir() and any(folder.iterdir()):
        if problems := model_problems(folder):
            raise UserError(*error.problems, *problems)
        say(f"{folder} looks whole, but nothing says which revision it is ({why})")
        return before | {"complete": True}
    if source.revision not in (None, before["revision"], before["commit"]) or not (before["complete"] or names):
        raise error
    recorded = {name: Wanted(of["bytes"], of["sha256"], None) for name, of in before["files"].items()}
    damaged = [name for name, wanted in _choose(recorded, names, source.repo).items() if not _right(folder / name, wanted)]
    if damaged:
        raise UserError(*error.problems, *(Problem(str(folder / name), "is missing or damaged", LATER) for name in damaged))
    say(f"every hash is as recorded ({why})")
    return before


def _choose(files: dict[str, Wanted], names: Sequence[str], repo: str) -> dict[str, Wanted]:
    """The files that match one of the patterns, all of them without patterns. Raises UserError for a pattern without a match."""
    problems = []
    for name in names:
        if not any(fnmatchcase(file, name) for file in files):
            close = get_close_matches(name, files, 1)
            fix = f"did you mean {close[0]}?" if close else f"choose of {', '.join(sorted(files))}"
            problems.append(Problem(f"--file {name}", f"{repo} has no such file", fix))
    if problems:
        raise UserError(*problems)
    return {file: wanted for file, wanted in files.items() if not names or any(fnmatchcase(file, name) for name in names)}


def _check_names(files: dict[str, Wanted], repo: str) -> None:
    """Raises UserError if the hub lists a path that would lie outside the folder, or inside what is ours there."""
    for name in files:
        parts = PurePosixPath(name).parts
        if not parts or parts[0] in ("/", ASIDE) or ".." in parts or "\\" in name:
            raise UserError(Problem(f"{repo}: {name}", "is a path that a model has no use for", "do not use this repository"))


def read_manifest(folder: Path) -> dict[str, Any]:
    """What an earlier download recorded; every key empty where there was none, or where it cannot be read."""
    empty: dict[str, Any] = {"hub": None, "repo": None, "revision": None, "commit": None, "complete": False, "files": {}}
    try:
        found = empty | json.loads((folder / ASIDE / "manifest.json").read_text(encoding="utf-8"))
        return found if all({"bytes", "sha256"} <= of.keys() for of in found["files"].values()) else empty
    except (OSError, ValueError, TypeError, AttributeError):
        return empty


def damaged(folder: Path) -> list[str]:
    """The files that an earlier download recorded and that are missing or other now; reads every byte."""
    files = read_manifest(folder)["files"].items()
    return [name for name, of in files if not _right(folder / name, Wanted(of["bytes"], of["sha256"], None))]


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    (folder / ASIDE).mkdir(parents=True, exist_ok=True)
    write_json(folder / ASIDE / "manifest.json", manifest)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One process of this machine at a time. The folder is made, and taken away again if it stays empty.

    Raises UserError if it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)
            with suppress(OSError):  # which says that it is not empty
                folder.rmdir()
    except OSError as error:
        fix = "free some space, or choose a folder that you may write to"
        raise UserError(Problem(str(error.filename or folder), f"cannot be written ({error.strerror})", fix)) from error
