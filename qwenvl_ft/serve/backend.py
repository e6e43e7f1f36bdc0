"""An answer on its way from a model to the one who asked, and what the server wants of whatever gives answers."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Protocol

from qwenvl_ft.serve.api import ApiError, ChatRequest, Usage


class AnswerStream:
    """Pieces that come in by `put`, from any thread, and go out by `pieces`. `cancel` stops whoever makes them."""

    def __init__(self, cancel: Callable[[], object]):
        self.cancel = cancel
        self.loop = asyncio.get_running_loop()
        self.queue: asyncio.Queue[tuple[str, str | None, Usage]] = asyncio.Queue()

    def put(self, text: str, finish: str | None, usage: Usage) -> None:
        """A piece; `finish` is None until the last: stop, length, or error."""
        self.loop.call_soon_threadsafe(self.queue.put_nowait, (text, finish, usage))

    async def pieces(self, until: float) -> AsyncIterator[tuple[str, str | None, Usage]]:
        """What came in, to the last piece. Raises ApiError when the model fails, or at `until`, of the monotonic clock."""
        finish = None
        while finish is None:
            try:
                async with asyncio.timeout(until - time.monotonic()):
                    text, finish, usage = await self.queue.get()
            except TimeoutError:
                raise out_of_time() from None
            if finish == "error":
                raise ApiError(500, "model_error", "the model failed on this request")
            yield text, finish, usage


def out_of_time() -> ApiError:
    """What is said where a request has used up its time."""
    return ApiError(504, "timeout", "the answer takes longer than a request may take here: ask for fewer tokens")


class Backend(Protocol):
    """Something that answers: the models of this process, or another server. `names` are those of its models."""

    @property
    def names(self) -> Sequence[str]: ...

    async def begin(self, chat: ChatRequest, request_id: str, until: float) -> AnswerStream:
        """Starts an answer. Raises ApiError for what is wrong with the question."""

    async def close(self) -> None:
        """Finishes what has begun."""

    def status(self) -> dict[str, float]:
        """What /metrics shows of it; alive is 1 or 0."""
