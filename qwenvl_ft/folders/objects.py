"""Files at an address, s3://BUCKET/KEY, oss://BUCKET/KEY or https://HOST/PATH, by fsspec: looked for, brought, put, deleted.

Credentials and endpoint are those of the environment: what s3fs takes (AWS_ACCESS_KEY_ID ..., ~/.aws, AWS_ENDPOINT_URL), and
OSS_ACCESS_KEY_ID, OSS_ACCESS_KEY_SECRET, OSS_SESSION_TOKEN, OSS_ENDPOINT. No message repeats what a library says: it may hold one.
"""

import errno
import hashlib
import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote

from qwenvl_ft.console import print_note
from qwenvl_ft.errors import Problem, UserError

ADDRESS = re.compile(r"(s3|oss|https?):/+(?=[^/])", re.IGNORECASE)  # pathlib makes one / of two
SECRET = re.compile(r"[?@#]")  # in an https address: a signature, or a password
EXTRAS = {"s3": "s3fs", "oss": "ossfs"}
KEYS = {"s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY", "oss": "OSS_ACCESS_KEY_ID and OSS_ACCESS_KEY_SECRET"}
OF_OSS = {"key": "OSS_ACCESS_KEY_ID", "secret": "OSS_ACCESS_KEY_SECRET", "token": "OSS_SESSION_TOKEN"}
PAUSES = (0.5, 1, 2, 4, 8, 16, 32)  # seconds before each further try; the libraries try again by themselves, too
PATIENCE_S = 2.0  # before it is said what is waited for
LIBRARIES = ("aiobotocore", "aiohttp", "aiooss2", "botocore", "oss2", "requests", "urllib3")  # whose errors are the network's
LASTING = (errno.EINVAL, errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # what no further try mends: of a request, of the disk here
SILENCE_S = 60  # of a web server, before the connection counts as cut
# Of what is wrong with a setting: botocore's own errors have no class in common that says so.
OF_SETTINGS = re.compile(r"Invalid|Validation|ProfileNotFound")
NETWORK, ACCESS, SETTINGS = "network", "access", "settings"  # what is to be mended; only of the first may another try help
Result = TypeVar("Result")


class Unreachable(UserError):
    """The server does not answer, after all tries: whoever asks it again waits as long again."""


def address_of(path: Path | str) -> str | None:
    """The address that a setting is, a text or a Path of it; None for a path."""
    text = str(path)
    return f"{match[1].lower()}://{text[match.end() :]}" if (match := ADDRESS.match(text)) else None


def as_written(path: Path | str) -> str:
    """A setting as its user wrote it: pathlib makes one / of the two of an address."""
    return address_of(path) or str(path)


class State(NamedTuple):
    """What tells an object from what it was before."""

    num_bytes: int | None  # None: the server does not say
    version: str

    @property
    def mtime(self) -> int:
        """Seconds that stand for the version: the time of its copy, so that the copy says for itself which one it is."""
        return int.from_bytes(hashlib.sha256(self.version.encode()).digest()[:8]) % 10**9


class Objects:
    """What lies below an address; a name is relative to it, and "" is the address itself. Each method raises UserError where the
    server cannot be reached, after several tries, or refuses."""

    def __init__(self, address: str):
        self.address = address.rstrip("/")
        self.scheme, _, self.path = self.address.partition("://")
        if self.is_web and SECRET.search(address):
            fix = "write it without ? and @, or name it as s3:// or oss://, whose keys the environment has"
            raise UserError(
                Problem(SECRET.split(address)[0], "is an address with a query or a password, which files would keep", fix)
            )
        if (extra := EXTRAS.get(self.scheme)) and not find_spec(extra):
            raise UserError(Problem(self.address, f"{extra} is not installed", f"pip install '.[{self.scheme}]' in the checkout"))
        if self.scheme == "oss" and not os.environ.get("OSS_ENDPOINT"):
            fix = "set OSS_ENDPOINT to that of the bucket's region, such as https://oss-cn-hangzhou.aliyuncs.com"
            raise UserError(Problem(self.address, "nothing says which server has it", fix))
        self.untold = Lock()  # held once it was said that it is waited for

    @property
    def is_web(self) -> bool:
        """Whether nobody lists what lies there."""
        return self.scheme not in EXTRAS

    @property
    def fs(self) -> Any:
        """fsspec's file system."""
        return _file_system(self.scheme, tuple(os.environ.items()), os.getpid())

    def at(self, name: str) -> str:
        """What fsspec calls it."""
        if not name:
            return self.address if self.is_web else self.path
        return f"{self.address}/{quote(name)}" if self.is_web else f"{self.path}/{name}"

    def called(self, name: str) -> str:
        """What a person calls it."""
        return f"{self.address}/{name}" if name else self.address

    def state(self, name: str) -> State | None:
        """Of one object; None where there is none."""
        try:
            self.fs.invalidate_cache()
            info = self._tried(name, lambda: self.fs.info(self.at(name)))
        except FileNotFoundError:
            return None
        return _state(info) if info["type"] == "file" else None

    def states(self) -> dict[str, State]:
        """Of all objects below it, by name, but for those that could be no files here."""
        try:
            self.fs.invalidate_cache()
            found = self._tried("", lambda: self.fs.find(self.path, detail=True))
        except FileNotFoundError as error:
            raise UserError(Problem(self.address, "is not there", "mend the address; is it the right endpoint?")) from error
        named = {path.lstrip("/").removeprefix(self.path).removeprefix("/"): info for path, info in found.items()}
        return {name: _state(info) for name, info in named.items() if name and {"", ".", ".."}.isdisjoint(name.split("/"))}

    def get(self, name: str, state: State, path: Path) -> None:
        """Writes the object to a path, whole, with the time that says which version it is. Raises UserError if it is gone."""

        def once() -> None:
            self.fs.get_file(self.at(name), str(path))
            if state.num_bytes is not None and path.stat().st_size != state.num_bytes:
                raise ConnectionError

        try:
            self._tried(name, once)
        except FileNotFoundError as error:
            raise UserError(Problem(self.called(name), "was there and is gone", "run it again")) from error
        os.utime(path, (state.mtime, state.mtime))

    def put(self, path: Path, name: str) -> None:
        """Makes the object of a file in one go: others see the old one, or all of the new one."""

        def once() -> None:
            self.fs.put_file(str(path), self.at(name))
            if self.fs.info(self.at(name))["size"] != path.stat().st_size:
                raise ConnectionError

        try:
            self._tried(name, once)
        except FileNotFoundError as error:
            raise UserError(Problem(self.called(name), "cannot be written: there is no such bucket", "make it first")) from error

    def read(self, name: str) -> bytes | None:
        """All of a small object; None where there is none."""
        try:
            return bytes(self._tried(name, lambda: self.fs.cat_file(self.at(name))))
        except FileNotFoundError:
            return None

    def delete(self, name: str) -> None:
        """Does nothing where there is none."""
        with suppress(FileNotFoundError):
            self._tried(name, lambda: self.fs.rm_file(self.at(name)))

    def _fix(self, of: str) -> str:
        if of == NETWORK:
            return "see that its server and the network are up"
        if of == SETTINGS:
            return "mend the address" + ", or its endpoint, region or profile in the environment" * (not self.is_web)
        keys = KEYS.get(self.scheme)
        return f"set {keys} in the environment to keys that may do this" if keys else "give an address that anybody may read"

    def _tried(self, name: str, act: Callable[[], Result]) -> Result:
        """What `act` returns, at last. Raises FileNotFoundError for what is not there."""
        began = time.monotonic()
        for pause in (*PAUSES, None):
            try:
                return act()
            except Exception as error:
                what, of = _said(error)
                if not what:
                    raise
                if pause is None or of != NETWORK:
                    kind = Unreachable if of == NETWORK else UserError
                    raise kind(Problem(self.called(name), what, f"{self._fix(of)}, then run it again")) from error
            if time.monotonic() - began >= PATIENCE_S and self.untold.acquire(blocking=False):
                print_note(f"{self.called(name)} {what}; it is tried again for about a minute")
            time.sleep(pause)
        raise AssertionError


@cache
def _file_system(scheme: str, environment: tuple[tuple[str, str], ...], process: int) -> Any:
    """One for all that ask in the same environment: to make it takes a third of a second. A fork makes its own."""
    import fsspec

    given: dict[str, Any] = {"use_listings_cache": False}
    if scheme == "oss":  # which lists a folder for every look at a file in it, and breaks without a cache
        given = {key: os.environ.get(name) for key, name in OF_OSS.items()}
    elif scheme not in EXTRAS:
        from aiohttp import ClientTimeout

        given = {
            "client_kwargs": {"trust_env": True, "timeout": ClientTimeout(total=None, sock_connect=SILENCE_S, sock_read=SILENCE_S)}
        }
    return fsspec.filesystem(scheme, skip_instance_cache=True, **given)


def _state(info: dict[str, Any]) -> State:
    version = next(
        (str(info[key]) for key in ("ETag", "etag", "Last-Modified", "LastModified") if info.get(key)), str(time.time_ns())
    )
    return State(info.get("size"), version)


def _said(error: Exception) -> tuple[str, str]:
    """(what to say of it, what is to be mended); nothing to say of what is not there, or is not the network's doing."""
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:  # fsspec's, of whatever befell https
        known = _said(error.__cause__) if isinstance(error.__cause__, Exception) else ("", "")
        return known if getattr(error.__cause__, "status", 0) != 404 else ("", "")
    status = getattr(error, "status", 0)
    if isinstance(error, PermissionError) or status in (401, 403) or "Credential" in type(error).__name__:
        return "access is refused, or no keys are given", ACCESS
    if isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError) or status == 404:
        return "", ""
    if isinstance(error, OSError) and error.errno in LASTING:
        return f"is refused: {os.strerror(error.errno)}", ACCESS
    if isinstance(error, ValueError) or OF_SETTINGS.search(type(error).__name__):
        return f"cannot be asked for ({type(error).__name__})", SETTINGS
    if isinstance(error, OSError) or type(error).__module__.split(".")[0] in LIBRARIES:
        return f"cannot be reached, or its connection is cut ({type(error).__name__})", NETWORK
    return "", ""
