"""Opens what a request brings: the one place where bytes of a stranger become pictures."""

import time
from dataclasses import dataclass, replace

from qwenvl_ft.data.fetch import fetch
from qwenvl_ft.data.videos import Allowance, Picture
from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.infer.messages import Message, read_messages
from qwenvl_ft.serve.api import ApiError, Ask, Bounds
from qwenvl_ft.serve.uploads import Uploads

URL_BYTES = 20 << 20
URL_SECONDS = 20


@dataclass(frozen=True)
class Sources:
    """Where pictures may come from: the request itself (data:), what was uploaded (oss://), URLs of `hosts`. Never a path."""

    uploads: Uploads
    hosts: frozenset[str] = frozenset()

    def open(self, source: str) -> bytes:
        """The bytes of a source. Raises UserError."""
        if source.startswith("oss://"):
            if (content := self.uploads.get(source)) is None:
                raise UserError(Problem("a picture", "was not uploaded here, or is not kept any more", "upload it again"))
            return content
        if not source.startswith(("http://", "https://")):
            raise UserError(Problem("a picture", "is named by a path, which means nothing here", "send it as a data: URL"))
        if not self.hosts:
            raise UserError(Problem("a picture", "is named by a URL, and this server fetches none", "send it as a data: URL"))
        return fetch(source, self.hosts, URL_BYTES, URL_SECONDS)


def open_ask(ask: Ask, sources: Sources, bounds: Bounds, seconds: float) -> list[Message]:
    """The messages of a request with their pictures open, within the bounds. Raises ApiError with all their problems."""
    until = time.monotonic() + seconds
    allowance = Allowance(bounds.pictures, bounds.picture_pixels, bounds.pixels, until)
    try:
        messages = read_messages(ask.messages, sources.open, allowance)
    except UserError as error:
        raise refusal(error) from error
    letters = sum(len(part) for message in messages for part in message.parts if isinstance(part, str))
    if letters > 16 * bounds.prompt_tokens:  # no text that a model reads has so many to a token: it is not even counted
        raise ApiError(400, "prompt_too_long", f"the text has {letters} letters, more than {bounds.prompt_tokens} tokens can hold")
    return [replace(message, parts=tuple(_bounded(part, ask) for part in message.parts)) for message in messages]


def refusal(error: UserError) -> ApiError:
    """What is wrong with the messages, as the caller gets it."""
    text = "; ".join(f"{problem.where} {problem.what}: {problem.fix}" for problem in error.problems)
    return ApiError(400, "invalid_messages", text)


def _bounded(part: object, ask: Ask) -> object:
    """A picture without bounds of its own has the request's."""
    if not isinstance(part, Picture) or part.min_pixels or part.max_pixels:
        return part
    return Picture(part.image, ask.min_pixels, ask.max_pixels)
