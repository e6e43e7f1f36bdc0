"""Opens what a request brings: the one place where bytes of a stranger become pictures."""

import asyncio
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

from qwenvl_ft.data.fetch import fetch
from qwenvl_ft.data.reading import AS_FOUND, Reading
from qwenvl_ft.data.records import Part, Picture, Turn
from qwenvl_ft.data.videos import Allowance
from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.infer.messages import read_messages
from qwenvl_ft.serve.api import ApiError, Bounds, ChatRequest
from qwenvl_ft.serve.uploads import Uploads

URL_BYTES = 20 << 20
URL_SECONDS = 20
THREADS = 4
T = TypeVar("T")


class Opener:
    """Opens requests in a few threads, within the bounds.

    Pictures come from the request itself (data:), from what was uploaded (oss://), from URLs of `hosts`. Never from a path.
    """

    def __init__(self, bounds: Bounds, hosts: Iterable[str] = ()):
        self.bounds, self.uploads, self.hosts = bounds, Uploads(), frozenset(hosts)
        self.threads = ThreadPoolExecutor(THREADS, "opener")

    async def open(self, chat: ChatRequest, until: float, then: Callable[[list[Turn]], T], reading: Reading = AS_FOUND,
                   tools: bool = False) -> T:  # fmt: skip
        """What `then` makes of the messages once their pictures are open, in the same thread; `reading` says how videos are drawn,
        `tools` whether there may be calls of them and answers. Raises ApiError."""
        queued = [chat]
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self.threads, lambda: then(self._messages(queued.pop(), until, reading, tools)))
        except BaseException:
            queued.clear()  # the threads' queue keeps what it was given, also where nobody waits any more
            raise

    def _messages(self, chat: ChatRequest, until: float, reading: Reading, tools: bool) -> list[Turn]:
        bounds, goes_on = self.bounds, "continue_final_message" in chat.more
        try:
            allowance = Allowance(bounds.pictures, bounds.picture_pixels, 2 * bounds.picture_pixels, until)
            messages = read_messages(chat.messages, self._read, allowance, reading, tools, goes_on)
        except UserError as error:
            raise invalid_messages(error) from error
        letters = sum(len(message.text) for message in messages)
        if letters > 16 * bounds.prompt_tokens:  # no text that a model reads has so many to a token: it is not even counted
            what = f"the text has {letters} letters, more than {bounds.prompt_tokens} tokens can hold"
            raise ApiError(400, "prompt_too_long", what)
        return [replace(message, parts=tuple(_bounded(part, chat) for part in message.parts)) for message in messages]

    def _read(self, source: str) -> bytes:
        """The bytes of a picture. Raises UserError."""
        if source.startswith("oss://"):
            if (content := self.uploads.get(source)) is None:
                raise UserError(Problem("a picture", "was not uploaded here, or is not kept any more", "upload it again"))
            return content
        if not source.startswith(("http://", "https://")):
            raise UserError(Problem("a picture", "is named by a path, which means nothing here", "send it as a data: URL"))
        if not self.hosts:
            raise UserError(Problem("a picture", "is named by a URL, and this server fetches none", "send it as a data: URL"))
        return fetch(source, self.hosts, URL_BYTES, URL_SECONDS)

    def close(self) -> None:
        """Ends the threads once they are done."""
        self.threads.shutdown(wait=False, cancel_futures=True)


def _bounded(part: Part, chat: ChatRequest) -> Part:
    """A picture without bounds of its own has the request's."""
    if not isinstance(part, Picture) or part.min_pixels or part.max_pixels:
        return part
    return replace(part, min_pixels=chat.min_pixels, max_pixels=chat.max_pixels)


def invalid_messages(error: UserError) -> ApiError:
    """What is wrong with the messages, as the caller gets it."""
    text = "; ".join(f"{problem.where} {problem.what}: {problem.fix}" for problem in error.problems)
    return ApiError(400, "invalid_messages", text)


def check_length(tokens: int, of_media: int, bounds: Bounds) -> None:
    """Raises ApiError for a prompt with more tokens than one may have, `of_media` of them of pictures and videos."""
    if tokens > bounds.prompt_tokens:
        what = f"the prompt has {tokens} tokens, {of_media} of them of pictures and videos"
        raise ApiError(400, "prompt_too_long", f"{what}; at most {bounds.prompt_tokens} are taken")
