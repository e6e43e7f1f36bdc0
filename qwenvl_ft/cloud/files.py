"""Files to OSS and back: what is there already is not sent again, and what comes is whole or not there.

A folder goes to a place that its names, sizes and times give, and an object beside it says that all of it has arrived: a second
job on the same pictures sends none of them.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenvl_ft.cloud.account import Account, in_words
from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.folders.whole import MANIFEST, damage, short_hash, write_whole

PREFIX = "qwenvl-ft"  # of everything in the bucket that is written here
OnFile = Callable[[int, int | None], None]


@dataclass(frozen=True)
class Upload:
    """Files that go to one place. `uri` names it: of a folder it ends with a slash, of a file with the file's name."""

    what: str
    uri: str
    files: Mapping[str, Path]

    @classmethod
    def of(cls, account: Account, what: str, path: Path) -> "Upload":
        """A file, or all that is below a folder."""
        files = {path.name: path} if path.is_file() else files_below(path)
        place = placed(account, what, files)
        return cls(what, place + path.name if path.is_file() else place, files)

    @property
    def num_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files.values())

    @property
    def facts(self) -> dict[str, Any]:
        """For a program."""
        return {"what": self.what, "to": self.uri, "files": len(self.files), "bytes": self.num_bytes}


def files_below(folder: Path) -> dict[str, Path]:
    """The files of a folder by their names from there, but for hidden ones and Python's caches."""
    found = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {
        name.as_posix(): path
        for name, path in found.items()
        if not any(part.startswith(".") or part == "__pycache__" for part in name.parts)
    }


def placed(account: Account, what: str, files: Mapping[str, Path]) -> str:
    """The URI of the folder that these files belong into; another one once any of them has changed."""
    facts = {name: (path.stat().st_size, path.stat().st_mtime_ns) for name, path in files.items()}
    return account.uri(f"{PREFIX}/{what}-{short_hash(facts)}/")


def send(session: Any, uploads: Iterable[Upload], on_file: OnFile) -> None:
    """Sends what is not there yet. Raises UserError for what OSS refuses."""
    import oss2

    uploads, done = list(uploads), 0
    total = sum(len(upload.files) for upload in uploads)
    for upload in uploads:
        with in_words(upload.uri):
            bucket, folder = session.oss_bucket, key_of(upload.uri).rpartition("/")[0]
            arrived = f"{folder}.arrived"
            there = bucket.object_exists(arrived)
            for name, path in upload.files.items():
                if not there:
                    oss2.resumable_upload(bucket, f"{folder}/{name}", str(path))
                done += 1
                on_file(done, total)
            if not there:
                bucket.put_object(arrived, b"")


def bring(session: Any, uri: str, folder: Path, on_file: OnFile) -> int:
    """Brings all that is below a URI to a new folder; how many files. Raises UserError, and then there is no folder.

    Where a manifest came, every file is as it says.
    """
    import oss2

    with in_words(uri):
        bucket = session.get_oss_bucket(uri.removeprefix("oss://").split("/")[0].split(".")[0])
        below = key_of(uri).rstrip("/") + "/"
        keys = [found.key for found in oss2.ObjectIteratorV2(bucket, prefix=below) if not found.key.endswith("/")]
    if not keys:
        raise UserError(Problem(uri, "holds nothing", "see `qwenvl-ft pai logs JOB`: has the job come so far?"))

    def write(aside: Path) -> None:
        for number, key in enumerate(keys):
            path = aside / key.removeprefix(below)
            if not path.resolve().is_relative_to(aside.resolve()):
                raise UserError(Problem(key, "names a place outside its folder", "do not use this bucket"))
            path.parent.mkdir(parents=True, exist_ok=True)
            with in_words(f"oss://{bucket.bucket_name}/{key}"):
                oss2.resumable_download(bucket, key, str(path))
            on_file(number + 1, len(keys))
        if (aside / MANIFEST).is_file() and (reason := damage(aside)):
            raise UserError(Problem(uri, f"is not whole: {reason}", "fetch it again; if that says the same, train again"))

    write_whole(folder, write, replace=False)
    return len(keys)


def key_of(uri: str) -> str:
    """An object's key: what follows the bucket."""
    return uri.removeprefix("oss://").partition("/")[2]
