"""What uvicorn lacks: its protocol waits for the head of a request as long as it likes, and for a client to read its answer."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from uvicorn import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

HEAD_SECONDS = 10
WRITE_SECONDS = 10


class TimeoutProtocol(asyncio.Protocol):
    """One connection, for uvicorn's setting `http`: hands what happens to it on to uvicorn's own protocol.

    It is closed after HEAD_SECONDS without a request under way, and when its client has not taken what was written for
    WRITE_SECONDS. A request's scope has it in its state as `connection`, beside all that are open as `connections`.
    """

    transport: asyncio.Transport

    def __init__(self, config: Config, server_state: ServerState, app_state: dict[str, Any], _loop: Any = None):
        self.loop = asyncio.get_running_loop()
        self.timers: dict[str, asyncio.TimerHandle] = {}
        self.num_requests = 0  # under way; the next of a pipeline may begin before the last one's task has ended
        state = {**app_state, "connection": self, "connections": server_state.connections}
        self.inner = H11Protocol(config, server_state, state, _loop)

    @contextmanager
    def request(self) -> Iterator[None]:
        """A request is under way, as whoever answers it says."""
        self.num_requests += 1
        self.timers["head"].cancel()
        try:
            yield
        finally:
            self.num_requests -= 1
            if not self.num_requests:
                self._wait_for_head()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        transport.set_write_buffer_limits(0)  # `pause_writing` is called once the system takes no more
        self._wait_for_head()
        self.inner.connection_made(transport)

    def data_received(self, data: bytes) -> None:
        self.inner.data_received(data)

    def eof_received(self) -> None:
        self.inner.eof_received()

    def pause_writing(self) -> None:
        self.timers["write"] = self.loop.call_later(WRITE_SECONDS, self.transport.abort)
        self.inner.pause_writing()

    def resume_writing(self) -> None:
        self.timers["write"].cancel()
        self.inner.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in self.timers.values():
            timer.cancel()
        self.inner.connection_lost(exc)

    def _wait_for_head(self) -> None:
        if not self.transport.is_closing():
            self.timers["head"] = self.loop.call_later(HEAD_SECONDS, self.transport.close)
