"""Stands before every route: a number for each request, the key, a count of what was answered, an end to what is not read."""

import asyncio
import hmac
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Collection
from typing import Any

from qwenvl_ft import dashscope_api, openai_api
from qwenvl_ft.gauges import Gauges
from qwenvl_ft.wire import ApiError

DRAIN_BYTES, DRAIN_SECONDS = 256 << 20, 10
log = logging.getLogger("qwenvl_ft.server")
Handler = Callable[[Any, Any, Any], Awaitable[None]]


def speaks(path: str) -> str:
    """The dialect of a path."""
    return "dashscope" if "/api/v1/" in path else "openai"


def write_error(error: ApiError, scope: dict[str, Any]) -> dict[str, Any]:
    """The body of a refusal, in the dialect of the path that was asked."""
    dialect = dashscope_api if speaks(scope["path"]) == "dashscope" else openai_api
    return dialect.write_error(error, scope.get("request_id", ""))


def is_allowed(header: str | None, key: str) -> bool:
    """Whether an Authorization header, `Bearer KEY` or the bare key, has the key; takes as long for every wrong one."""
    given = (header or "").strip()
    given = given[7:].strip() if given[:7].lower() == "bearer " else given
    return hmac.compare_digest(given.encode("utf-8", "replace"), key.encode())


class Gate:
    """ASGI middleware. `free`: (method, path) of what needs no key. `refuse` writes an error."""

    def __init__(
        self,
        app: Handler,
        key: str | None,
        free: Collection[tuple[str, str]],
        gauges: Gauges,
        refuse: Callable[[ApiError, Any], Handler],
    ):
        self.app, self.key, self.free, self.gauges, self.refuse = app, key, free, gauges, refuse

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        scope["request_id"] = uuid.uuid4().hex
        began, read = time.monotonic(), False

        async def watched_receive() -> Any:
            nonlocal read
            message = await receive()
            read = read or not message.get("more_body", False)
            return message

        async def watched_send(message: Any) -> None:
            if message["type"] == "http.response.start":
                status = message["status"]
                self.gauges.requests[speaks(scope["path"]), status] += 1
                seconds = time.monotonic() - began
                log.info("%s %s %s %d %.3f s", scope["request_id"], scope["method"], scope["path"], status, seconds)
                message["headers"] = [*message.get("headers", []), (b"x-request-id", scope["request_id"].encode())]
                if status >= 400 and not read:
                    message["headers"].append((b"connection", b"close"))
                    if status != 408:
                        await drain(scope, watched_receive)
            await send(message)

        header = dict(scope["headers"]).get(b"authorization", b"").decode("latin-1")
        app = self.app
        if self.key is not None and (scope["method"], scope["path"]) not in self.free and not is_allowed(header, self.key):
            app = self.refuse(ApiError(401, "invalid_api_key", "the key is wrong or missing: send it as Authorization"), scope)
        try:
            await app(scope, watched_receive, watched_send)
        except Exception:
            self.gauges.requests[speaks(scope["path"]), 500] += 1
            raise


async def drain(scope: Any, receive: Any) -> None:
    """Reads on and forgets, for a while: a client that is still sending would lose the answer with the connection."""
    if b"expect" in dict(scope["headers"]):
        return  # it waits for leave to send
    left = DRAIN_BYTES
    try:
        async with asyncio.timeout(DRAIN_SECONDS):
            while left > 0:
                message = await receive()
                left -= len(message.get("body", b""))
                if not message.get("more_body", False):
                    return
    except TimeoutError:
        return
