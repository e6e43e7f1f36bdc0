"""Media that a meta-file names by URL or holds as base64, brought once into the user's cache, each under its sha256.

What lies there is read again and compared with its name before it is used.
"""

import base64
import hashlib
import os
from pathlib import Path
from tempfile import NamedTemporaryFile

from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.folders.cache import cache_folder

BLANKS = str.maketrans("", "", " \t\r\n")  # not split and joined: a word of two letters takes 50 bytes of memory


def is_elsewhere(name: str) -> bool:
    """Whether it is a URL, or the bytes themselves."""
    return "://" in name[:32] or name.startswith("data:")


def decoded(url: str, where: str) -> bytes:
    """The bytes of a data: URL, whose base64 may be broken into lines, and may not be said to be base64. Raises UserError."""
    try:
        return base64.b64decode(url.partition(",")[2].translate(BLANKS), validate=True)
    except ValueError as error:
        fix = "write data:image/png;base64, and the file in base64"
        raise UserError(Problem(where, f"{url[:60]} is no base64", fix)) from error


def bring(name: str, where: str) -> Path:
    """The file of a URL or of a data: URL. Raises UserError where it cannot be brought."""
    folder = cache_folder() / "media"
    try:
        if name.startswith("data:"):
            return _kept(folder, decoded(name, where))
        known = folder / "urls" / hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()
        path = folder / known.read_text() if known.is_file() else None
        if path is None or not _is_whole(path):
            path = _kept(folder, _fetched(name, where))
            _write(known, path.name.encode())
        return path
    except OSError as error:
        what = f"cannot be kept in {folder} ({error.strerror})"
        raise UserError(Problem(where, f"{name[:60]} {what}", "free some space, or set XDG_CACHE_HOME")) from error


def _fetched(name: str, where: str) -> bytes:
    from qwenvl_ft.data.fetch import fetch  # and TLS, which files can do without

    try:
        return fetch(name)
    except UserError as error:
        said = error.problems[0].what
        fix = "mend the URL, run it again if the host was down, or leave the record out"
        raise UserError(Problem(where, f"{name[:120]} {said}", fix, kind=f"a URL that {said}")) from error


def _is_whole(path: Path) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == path.name


def _kept(folder: Path, content: bytes) -> Path:
    path = folder / hashlib.sha256(content).hexdigest()
    if not _is_whole(path):
        _write(path, content)
    return path


def _write(path: Path, content: bytes) -> None:
    """In one move, so that other processes see all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as file:
        pass
    try:
        Path(file.name).write_bytes(content)
        os.replace(file.name, path)
    except OSError:
        os.unlink(file.name)
        raise
