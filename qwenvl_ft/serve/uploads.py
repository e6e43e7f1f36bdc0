"""Files that DashScope's client uploads before it asks: a signed permit for one folder, the file, then oss://folder/name.

They are held in memory, the oldest given up for the newest. A folder's name cannot be guessed, and holds no other's files.
"""

import hmac
import secrets
import time
from collections.abc import Callable
from io import BytesIO
from typing import cast

from python_multipart import create_form_parser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import Field, File

from qwenvl_ft.serve.api import ApiError

KEY_BYTES = 512
FILE_BYTES = 4096  # what a file counts beside its key and content: our own books of it, and so that their number has an end
FIELDS = 64


class Uploads:
    """At most `max_bytes` of files, each for `seconds`."""

    def __init__(self, max_bytes: int = 256 << 20, seconds: float = 3600, clock: Callable[[], float] = time.time):
        self.max_bytes, self.seconds, self.clock = max_bytes, seconds, clock
        self.secret = secrets.token_bytes(32)
        self.files: dict[str, tuple[float, bytes]] = {}  # by key, oldest first
        self.held_bytes = 0

    def permit(self) -> tuple[str, str]:
        """(folder, signature) for a client that may upload. The folder's name says until when; nothing else is kept of it."""
        folder = f"uploads/{self.clock() + self.seconds:.0f}-{secrets.token_hex(16)}"
        return folder, self._sign(folder)

    def check(self, folder: str, signature: str) -> None:
        """Raises ApiError unless the permit is ours and has not run out."""
        if not hmac.compare_digest(signature.encode("utf-8", "replace"), self._sign(folder).encode()):
            raise ApiError(403, "no_permit", "the upload carries no permit of this server")
        if self.clock() > int(folder.removeprefix("uploads/").split("-")[0]):
            raise ApiError(403, "no_permit", "the permit has run out: ask for another")

    def put(self, folder: str, form: dict[str, bytes]) -> None:
        """Keeps the file of a form. Raises ApiError where its key lies outside of the folder, is too long or taken."""
        key = form.get("key", b"")[: KEY_BYTES + 1].decode("utf-8", "replace")
        if not key.startswith(f"{folder}/") or "file" not in form:
            raise ApiError(400, "invalid_request", "send a file, its key in the folder of the permit")
        if len(form["key"]) > KEY_BYTES:
            raise ApiError(400, "invalid_request", f"the key has more than {KEY_BYTES} bytes: give the file a shorter name")
        if _size(key, form["file"]) > self.max_bytes:
            raise ApiError(413, "file_too_large", f"files of more than {self.max_bytes} bytes are not kept here")
        if key in self.files:
            raise ApiError(409, "exists", "a file of this name was uploaded with this permit already")
        self.files[key] = self.clock(), form["file"]
        self.held_bytes += _size(key, form["file"])
        for oldest, (since, content) in list(self.files.items()):
            if self.held_bytes <= self.max_bytes and self.clock() - since <= self.seconds:
                break
            del self.files[oldest]
            self.held_bytes -= _size(oldest, content)

    def get(self, url: str) -> bytes | None:
        """The file of an oss:// URL; None if it is not here, or no longer."""
        kept = self.files.get(url.removeprefix("oss://"))
        return kept[1] if kept and self.clock() - kept[0] <= self.seconds else None

    def _sign(self, folder: str) -> str:
        return hmac.digest(self.secret, folder.encode("utf-8", "replace"), "sha256").hex()


def _size(key: str, content: bytes) -> int:
    return len(key) + len(content) + FILE_BYTES


def read_form(body: bytes, content_type: str) -> dict[str, bytes]:
    """The fields of multipart/form-data, held in memory. Raises ApiError for anything else."""
    fields: list[tuple[str, bytes]] = []

    def keep(part: Field | File) -> None:
        content = part.value if isinstance(part, Field) else cast(BytesIO, part.file_object).getvalue()
        fields.append(((part.field_name or b"").decode("utf-8", "replace"), content or b""))
        if len(fields) >= FIELDS:
            raise ApiError(400, "invalid_request", f"the form has {FIELDS} fields or more")

    try:
        if not content_type.lower().startswith("multipart/form-data"):  # the parser knows other forms, too
            raise FormParserError
        headers = {"Content-Type": content_type.encode("latin-1", "replace")}
        parser = create_form_parser(headers, keep, keep, {"MAX_MEMORY_FILE_SIZE": len(body)})  # nothing goes to the disk
        parser.write(body)
        parser.finalize()
    except FormParserError:
        raise ApiError(400, "invalid_request", "send multipart/form-data") from None
    return dict(fields)
