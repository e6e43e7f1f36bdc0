"""Stands before every route: a number for each request, the key, a count of what was answered, an end to what is not read.

Without a key only pages of this server may ask: a browser names the site of the page that asks as Origin; a page of another site,
whose name is turned to 127.0.0.1 once it is loaded, still says its own name as Host. Clients that are no browsers send no Origin.
Pages of the allowed origins may ask, too, and their browsers are told so before they ask (CORS); a key is asked of them as of all.
"""

import asyncio
import hmac
import json
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import Counter
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from qwenvl_ft.data.fetch import host_of, is_loopback, is_own_page
from qwenvl_ft.serve import dashscope_api, openai_api
from qwenvl_ft.serve.api import ApiError

DRAIN_BYTES, DRAIN_SECONDS = 256 << 20, 10
REFUSALS = 50  # a second: who is refused more often than that waits for it, or those who are answered would wait for them
REFUSAL_SECONDS = 5  # that a refusal waits at most
SPARE_CONNECTIONS = 400  # more than there are requests: with twice as many, all of them fit into the usual limit of 1024 files
HEALTH, UPLOAD = ("/", "/health"), "/api/v1/uploads/files"
ADMIN = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")  # vLLM's names; with the admin key, and only where there is one
FREE = {*((method, path) for method in ("GET", "HEAD") for path in HEALTH), ("POST", UPLOAD)}  # an upload shows its permit
CAPPED = "x-max-tokens-capped"  # on an answer whose request asked for more tokens than an answer may have: how many it may
PATH_CHARS = 200  # of a path in the log
log = logging.getLogger("qwenvl_ft.serve")


def dialect_of(path: str) -> str:
    """The dialect that is spoken at a path."""
    return "dashscope" if "/api/v1/" in path else "openai"


def json_response(value: Any, status: int = 200) -> Response:
    """JSON as an answer."""
    return Response(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"), status, media_type="application/json")


def error_response(error: ApiError, scope: Any) -> Response:
    """A refusal, in the dialect of the path that was asked."""
    dialect = dashscope_api if dialect_of(scope["path"]) == "dashscope" else openai_api
    response = json_response(dialect.write_error(error, scope["request_id"]), error.status)
    if error.status == 429:
        response.headers["retry-after"] = "1"
    return response


def is_allowed(header: str | None, key: str) -> bool:
    """Whether an Authorization header, `Bearer KEY` or the bare key, has the key; takes as long for every wrong one."""
    given = (header or "").strip()
    given = given[7:].strip() if given[:7].lower() == "bearer " else given
    return hmac.compare_digest(given.encode("utf-8", "replace"), key.encode())


class Pace:
    """Lets `REFUSALS` by in a second, the first of them at once. A client that is refused asks again at once, and a refusal with
    its connection takes a millisecond of the one thread that answers.
    """

    def __init__(self) -> None:
        self.next = 0.0  # time of the next one, of the monotonic clock

    async def turn(self) -> None:
        now = time.monotonic()
        self.next = min(max(self.next, now - 1) + 1 / REFUSALS, now + REFUSAL_SECONDS)
        if self.next > now:
            await asyncio.sleep(self.next - now)


@dataclass
class AccessMiddleware:
    """ASGI middleware. A path loses its `prefix`; `host` is what others may call a server without a key, beside localhost;
    `connections` as many as may be open; `requests` counts by dialect and status; `origins` are those of the pages that may ask.
    """

    app: Callable[[Any, Any, Any], Awaitable[None]]
    key: str | None
    prefix: str
    host: str
    connections: int
    requests: Counter
    origins: Sequence[str] = ()
    admin_key: str | None = None
    pace: Pace = field(default_factory=Pace)

    def __post_init__(self) -> None:
        self.door: Callable[[Any, Any, Any], Awaitable[None]] = self.let_in
        if self.origins:  # before the key is asked for: a browser asks for leave without it
            self.door = CORSMiddleware(
                self.let_in, allow_origins=self.origins, allow_methods=("GET", "POST"), allow_headers=("*",),
                expose_headers=("x-request-id", CAPPED, "retry-after"), allow_private_network=True,
            )  # fmt: skip

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        prefix = self.prefix if f"{scope['path']}/".startswith(f"{self.prefix}/") else ""
        # No root_path: Starlette would strip it once more, and lead to a route whose key was not asked for.
        scope |= {"root_path": "", "prefix": prefix, "path": scope["path"][len(prefix) :] or "/"}
        with scope["state"]["connection"].request():
            await self.answer(scope, receive, send)

    async def answer(self, scope: Any, receive: Any, send: Any) -> None:
        """Numbers a request, lets it in or refuses it, counts and logs what is answered."""
        scope["request_id"] = uuid.uuid4().hex
        began, read, unread = time.monotonic(), False, False

        async def watched_receive() -> Any:
            nonlocal read
            message = await receive()
            read = read or not message.get("more_body", False)
            return message

        async def watched_send(message: Any) -> None:
            nonlocal unread
            if message["type"] == "http.response.start":
                if (status := message["status"]) == 429:
                    await self.pace.turn()
                self.requests.labels(dialect_of(scope["path"]), status).inc()
                path = scope["raw_path"][:PATH_CHARS].decode("latin-1")  # as it was sent: %0a in it begins no line of the log
                log.info("%s %s %s %d %.3f s", scope["request_id"], scope["method"], path, status, time.monotonic() - began)
                message["headers"] = [*message.get("headers", []), (b"x-request-id", scope["request_id"].encode())]
                if status >= 400 and not read:
                    message["headers"].append((b"connection", b"close"))
                    unread = status != 408
            elif unread and not message.get("more_body", False):
                await send({**message, "more_body": True})
                await drain(scope, watched_receive)
                message = {"type": "http.response.body", "body": b""}
            await send(message)

        await self.door(scope, watched_receive, watched_send)

    async def let_in(self, scope: Any, receive: Any, send: Any) -> None:
        """Hands a request on, or refuses it."""
        if error := self.refusal(scope):
            await self.pace.turn()
        await (error_response(error, scope) if error else self.app)(scope, receive, send)

    def refusal(self, scope: Any) -> ApiError | None:
        """Why a request does not get in."""
        if (scope["method"], scope["path"]) in FREE:
            return None
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        if len(scope["state"]["connections"]) > self.connections:
            return ApiError(503, "too_many_connections", "too many clients are connected: try again later")
        key = self.admin_key if scope["path"] in ADMIN and self.admin_key else self.key
        if key is not None:
            if is_allowed(headers.get("authorization"), key):
                return None
            return ApiError(401, "invalid_api_key", "the key is wrong or missing: send it as Authorization")
        called = headers.get("host", "")
        host, origin = host_of(f"//{called}"), headers.get("origin")
        if not is_loopback(host) and not (host and host == self.host):
            what = "this server asks for no key and is called localhost only"
            return ApiError(403, "wrong_host", f"{what}: start it with --public-url for another name, or with --api-key-env")
        if origin is None or is_own_page(origin, called) or origin.lower() in self.origins:
            return None
        if self.host and host_of(origin) == self.host:  # behind a gateway Host may be another name
            return None
        what = "this server asks for no key and answers no page of another site"
        return ApiError(403, "wrong_origin", f"{what}: start it with --allowed-origin, or with --api-key-env and ask with the key")


async def drain(scope: Any, receive: Any) -> None:
    """Reads on and forgets, for a while: a client that is still sending would lose its answer if the connection were closed."""
    if b"expect" in dict(scope["headers"]):
        return  # it waits for leave to send
    left, more = DRAIN_BYTES, True
    with suppress(TimeoutError):
        async with asyncio.timeout(DRAIN_SECONDS):
            while more and left > 0:
                message = await receive()
                left, more = left - len(message.get("body", b"")), message.get("more_body", False)
