"""The server: OpenAI's and DashScope's dialects, and a PAI EAS service's root, over one backend.

    uvicorn.run(make_app(backend, opener, max_requests=80), http=TimeoutProtocol, port=8000)

A request is let in (429 if too many are here), read, answered and forgotten; a client that goes away ends it at once.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Coroutine, Iterable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from urllib.parse import urlencode

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from qwenvl_ft.data.fetch import host_of
from qwenvl_ft.serve import dashscope_api, openai_api, responses_api
from qwenvl_ft.serve.api import ApiError, Backend, Bounds, ChatRequest, Piece, Usage, read_json, unknown_model
from qwenvl_ft.serve.middleware import (
    ADMIN,
    CAPPED,
    HEALTH,
    SPARE_CONNECTIONS,
    UPLOAD,
    AccessMiddleware,
    error_response,
    json_response,
)
from qwenvl_ft.serve.open_request import Opener
from qwenvl_ft.serve.uploads import read_form

CHAT = ("/", "/v1/chat/completions", "/compatible-mode/v1/chat/completions")
RESPONSES = ("/v1/responses", "/compatible-mode/v1/responses")
MODELS = ("/v1/models", "/compatible-mode/v1/models")
PERMIT = "/api/v1/uploads"
GENERATION = "/api/v1/services/aigc/multimodal-generation/generation"
HELD_BODIES = 16  # bodies of the largest size, all together, that are in memory at a time
BODY_SECONDS = 30
SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)  # of answers, as /metrics sorts them
EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
log = logging.getLogger("qwenvl_ft.serve")


class State:
    """What all requests share: who answers, what may be here and what is, and the counts that /metrics shows."""

    def __init__(self, backend: Backend, bounds: Bounds, max_requests: int):
        self.backend, self.bounds, self.max_requests = backend, bounds, max_requests
        self.num_requests = self.held_bytes = 0  # requests that are here, and their bodies
        self.registry = CollectorRegistry()
        self.requests = Counter("qwenvl_requests", "Answered requests.", ["dialect", "status"], registry=self.registry)
        self.tokens = Counter("qwenvl_tokens", "Tokens of whole answers.", ["kind"], registry=self.registry)
        self.seconds = Histogram("qwenvl_answer_seconds", "Seconds of whole answers.", buckets=SECONDS, registry=self.registry)
        for name in (*backend.status(), "requests_now"):
            Gauge(f"qwenvl_{name}", "At this moment.", registry=self.registry).set_function(partial(self._now, name))

    def count_answer(self, seconds: float, usage: Usage) -> None:
        """An answer that was given in full."""
        self.seconds.observe(seconds)
        self.tokens.labels("input").inc(usage.input)
        self.tokens.labels("output").inc(usage.output)

    def _now(self, name: str) -> float:
        return self.num_requests if name == "requests_now" else self.backend.status()[name]


class ChatEndpoint:
    """A route that answers, in one dialect: an ASGI application."""

    def __init__(self, state: State, dialect: Any):
        self.state, self.dialect = state, dialect

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        state, request = self.state, Request(scope, receive)
        if state.num_requests >= state.max_requests:
            raise ApiError(429, "queue_full", "too many requests wait already: try again in a moment")
        until = time.monotonic() + state.bounds.seconds
        state.num_requests += 1
        size = 0
        try:
            body = await read_body(request, state)
            size = len(body)
            chat = await asyncio.to_thread(self._read, body, request)
            del body
            await run_until_disconnect(receive, self._answer(chat, scope, receive, send, until))
        finally:
            state.num_requests -= 1
            state.held_bytes -= size

    def _read(self, body: bytes, request: Request) -> ChatRequest:
        value, most, passes = read_json(body), self.state.bounds.answer_tokens, self.state.backend.passes
        if self.dialect is dashscope_api:
            chat = dashscope_api.read_generation(value, most, request.headers.get("x-dashscope-sse") == "enable", passes)
        else:
            chat = self.dialect.read_chat(value, most, passes)
        return chat if chat.model else replace(chat, model=self.state.backend.names[0])

    async def _answer(self, chat: ChatRequest, scope: Any, receive: Any, send: Any, until: float) -> None:
        """Sends what the backend says; until the first piece of a stream an error has a status, later it is an event."""
        state, request_id, began, begun = self.state, scope["request_id"], time.monotonic(), False
        told = {CAPPED: str(chat.sampling.max_new_tokens)} if chat.sampling.capped else {}
        writer, said, usage = self.dialect.EventWriter(chat, request_id), list[Piece](), Usage()
        try:
            async with asyncio.timeout(until - began), aclosing(state.backend.answer(chat, request_id, until)) as pieces:
                async for piece in pieces:
                    usage = piece.usage
                    if not chat.stream:
                        said.append(piece)
                        continue
                    if not begun:
                        await send({"type": "http.response.start", "status": 200, "headers": [*EVENTS, *raw(told)]})
                        begun = True
                    await send_events(send, writer.piece(*piece))
        except (ApiError, TimeoutError) as broken:
            late = "the answer takes longer than a request may take here: ask for fewer tokens"
            error = broken if isinstance(broken, ApiError) else ApiError(504, "timeout", late)
            if not begun:
                raise error from None
            log.warning("%s broke off: %s", request_id, error.code)
            await send_events(send, writer.fail(error), last=True)
            return
        if chat.stream:
            await send_events(send, (), last=True)
        else:
            response = json_response(self.dialect.write_whole(chat, request_id, said))
            response.headers.update(told)
            await response(scope, receive, send)
        state.count_answer(time.monotonic() - began, usage)


def raw(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    """Headers as ASGI has them."""
    return [(name.encode(), value.encode()) for name, value in headers.items()]


async def send_events(send: Any, events: Iterable[str], last: bool = False) -> None:
    """Server-sent events, as one write; none are none."""
    await send({"type": "http.response.body", "body": "".join(events).encode(), "more_body": not last})


async def run_until_disconnect(receive: Any, work: Coroutine[Any, Any, None]) -> None:
    """Does the work; cancels it when the client goes away. The request's body must have been read."""

    async def disconnect() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, gone = asyncio.create_task(work), asyncio.create_task(disconnect())
    try:
        await asyncio.wait([task, gone], return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            await task  # for its error
    finally:
        task.cancel()
        gone.cancel()


async def read_body(request: Request, state: State) -> bytes:
    """The body, counted in `held_bytes`. Raises ApiError where it is too large or too slow."""
    bounds, chunks, size = state.bounds, [], 0
    seconds = min(BODY_SECONDS, bounds.seconds)
    try:
        async with asyncio.timeout(seconds):
            if int(request.headers.get("content-length") or 0) > bounds.body_bytes:
                raise ApiError(413, "body_too_large", f"the body has more than {bounds.body_bytes} bytes")
            async for chunk in request.stream():
                size += len(chunk)
                state.held_bytes += len(chunk)
                if size > bounds.body_bytes:
                    raise ApiError(413, "body_too_large", f"the body has more than {bounds.body_bytes} bytes")
                if state.held_bytes > HELD_BODIES * bounds.body_bytes:
                    raise ApiError(429, "queue_full", "too much is being sent at the moment: try again later")
                chunks.append(chunk)
        return b"".join(chunks)
    except BaseException as error:
        state.held_bytes -= size
        if isinstance(error, TimeoutError):
            raise ApiError(408, "body_too_slow", f"the body did not come within {seconds:g} s") from None
        raise


def make_app(
    backend: Backend, opener: Opener, max_requests: int, key: str | None = None, prefix: str = "", public_url: str = "",
    origins: Sequence[str] = (), admin_key: str | None = None,
) -> AccessMiddleware:  # fmt: skip
    """The application; it holds `max_requests` at a time, each within the opener's bounds, as the backend does.

    Its routes answer below `prefix`, too, as behind a gateway that does not strip it. `public_url` is where clients reach it,
    if not where they say they do; pages of `origins` may ask. Adapters can be added and taken away with the
    `admin_key` where there is one. It needs uvicorn with the TimeoutProtocol.
    """
    state, uploads = State(backend, opener.bounds, max_requests), opener.uploads

    async def health(request: Request) -> Response:
        alive = backend.status()["alive"]
        return json_response({"status": "ok" if alive else "the model has stopped"}, 200 if alive else 503)

    async def models(request: Request) -> Response:
        return json_response(openai_api.write_models(backend.names))

    async def model(request: Request) -> Response:
        if (name := request.path_params["name"]) not in backend.names:
            raise unknown_model(backend.names)
        return json_response(openai_api.write_model(name))

    async def metrics(request: Request) -> Response:
        return Response(generate_latest(state.registry), media_type=CONTENT_TYPE_LATEST)

    async def permit(request: Request) -> Response:
        if request.query_params.get("action") != "getPolicy":
            raise ApiError(400, "invalid_parameter", "action must be getPolicy")
        folder, signature = uploads.permit()
        host = public_url.rstrip("/") or str(request.base_url).rstrip("/") + request.scope["prefix"]
        host += f"{UPLOAD}?{urlencode({'policy': folder, 'signature': signature})}"  # so that it is checked before a byte is read
        return json_response(dashscope_api.write_policy(host, folder, signature, request.scope["request_id"]))

    async def upload(request: Request) -> Response:
        folder = request.query_params.get("policy", "")
        uploads.check(folder, request.query_params.get("signature", ""))
        body = await read_body(request, state)
        try:
            form = await asyncio.to_thread(read_form, body, request.headers.get("content-type", ""))
            uploads.put(folder, form)
        finally:
            state.held_bytes -= len(body)
        return Response(status_code=200)

    async def change_adapters(request: Request) -> Response:
        body = await read_body(request, state)
        state.held_bytes -= len(body)
        asked, loads = read_json(body), request.scope["path"] == ADMIN[0]
        wanted = ("lora_name", "lora_path")[: 1 + loads]
        given: list[Any] = [asked.get(key) if isinstance(asked, dict) else None for key in wanted]
        if not all(isinstance(value, str) and value for value in given):
            raise ApiError(400, "invalid_request", f"the body must have {' and '.join(wanted)}")
        await (backend.load_adapter if loads else backend.unload_adapter)(*given)
        log.info("%s %s %s", request.scope["request_id"], "added" if loads else "took away", given[0])
        return json_response({"status": "ok", "models": backend.names})

    openai, dashscope = ChatEndpoint(state, openai_api), ChatEndpoint(state, dashscope_api)
    routes = [Route(path, openai, methods=["POST"]) for path in CHAT]
    responses = ChatEndpoint(state, responses_api)
    routes += [Route(path, responses, methods=["POST"]) for path in RESPONSES]
    routes += [Route(path, health) for path in HEALTH] + [Route(path, models) for path in MODELS]
    routes += [Route(f"{path}/{{name:path}}", model) for path in MODELS] + [Route("/metrics", metrics)]
    routes += [Route(GENERATION, dashscope, methods=["POST"]), Route(PERMIT, permit), Route(UPLOAD, upload, methods=["POST"])]

    if admin_key:
        routes += [Route(path, change_adapters, methods=["POST"]) for path in ADMIN]

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await backend.close()

    handlers = dict.fromkeys((ApiError, HTTPException, ClientDisconnect, Exception), _refuse)
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)
    app.router.redirect_slashes = False  # it would lead to whatever the client calls its Host
    most, host = max_requests + SPARE_CONNECTIONS, host_of(public_url)
    return AccessMiddleware(app, key, prefix, host, most, state.requests, origins, admin_key)


async def _refuse(request: Request, error: Any) -> Response:
    if isinstance(error, HTTPException):
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "refused")
        error = ApiError(error.status_code, code, "there is nothing at this path for this method")
    elif isinstance(error, ClientDisconnect):
        error = ApiError(499, "disconnected", "nobody is there to read this")
    elif not isinstance(error, ApiError):  # nobody foresaw it: an id, never its own text
        log.error("%s failed: %s", request.scope["request_id"], type(error).__name__)
        error = ApiError(500, "internal_error", "the server failed on this request")
    return error_response(error, request.scope)
