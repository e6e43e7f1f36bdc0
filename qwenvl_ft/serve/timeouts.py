"""HTTP connections that must not dawdle: uvicorn's own protocol waits for the head of a request as long as it likes, and for a
client to read its answer.
"""

from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 10
WRITE_SECONDS = 10


class Impatient(H11Protocol):
    """Closes a connection that has been open, or has begun a request, for HEAD_SECONDS without the request's head, and one whose
    client has not taken what was written for WRITE_SECONDS. Applications find all connections in their scope's state.
    """

    timer: Any = None
    unread: Any = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        transport.set_write_buffer_limits(0)  # `pause_writing` is called once the system takes no more
        self.app_state = {**self.app_state, "connections": self.connections}
        self._wait()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.unread = self.loop.call_later(WRITE_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._read()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        answering = self.cycle is not None and not self.cycle.response_complete
        if answering:
            self._stop()
        else:
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        self._read()
        super().connection_lost(exc)

    def _wait(self) -> None:
        if self.timer is None:  # each byte would start it anew
            self.timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _read(self) -> None:
        if self.unread is not None:
            self.unread.cancel()
            self.unread = None

    def _stop(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
