"""The server: OpenAI's and DashScope's dialects, and a PAI EAS service's root, over one backend.

    uvicorn.run(make_app(backend, Bounds(), Uploads(), max_requests=80), http=TimeoutProtocol, port=8000)

A request is let in (429 if too many are here), read, answered and forgotten; a client that goes away ends it at once.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlencode

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from qwenvl_ft.serve import dashscope_api, openai_api
from qwenvl_ft.serve.api import ApiError, Bounds, ChatRequest, Usage, read_json, unknown_model
from qwenvl_ft.serve.backend import AnswerStream, Backend, out_of_time
from qwenvl_ft.serve.metrics import Metrics
from qwenvl_ft.serve.middleware import SPARE_CONNECTIONS, AccessMiddleware, error_response, host_of, json_response
from qwenvl_ft.serve.uploads import Uploads, read_form

CHAT = ("/", "/v1/chat/completions", "/compatible-mode/v1/chat/completions")
MODELS = ("/v1/models", "/compatible-mode/v1/models")
HEALTH = ("/", "/health")
PERMIT, UPLOAD = "/api/v1/uploads", "/api/v1/uploads/files"
GENERATION = "/api/v1/services/aigc/multimodal-generation/generation"
HELD_BODIES = 16  # bodies of the largest size, all together, that are in memory at a time
GRACE_SECONDS = 10  # for sending what is ready
EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
log = logging.getLogger("qwenvl_ft.serve")


@dataclass
class State:
    """What all requests share."""

    backend: Backend
    bounds: Bounds
    uploads: Uploads
    max_requests: int
    num_requests: int = 0  # that are here
    held_bytes: int = 0  # of bodies

    def __post_init__(self) -> None:
        self.metrics = Metrics(lambda: {**self.backend.status(), "requests_now": self.num_requests})


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
            with suppress(ClientDisconnect, TimeoutError):  # gone, or too slow at reading what it asked for
                await run_until_disconnect(receive, self._answer(chat, scope, receive, send, until))
        finally:
            state.num_requests -= 1
            state.held_bytes -= size

    def _read(self, body: bytes, request: Request) -> ChatRequest:
        value, most = read_json(body), self.state.bounds.answer_tokens
        if self.dialect is dashscope_api:
            chat = dashscope_api.read_generation(value, most, request.headers.get("x-dashscope-sse") == "enable")
        else:
            chat = openai_api.read_chat(value, most)
        return chat if chat.model else replace(chat, model=self.state.backend.names[0])

    async def _answer(self, chat: ChatRequest, scope: Any, receive: Any, send: Any, until: float) -> None:
        request_id, began = scope["request_id"], time.monotonic()
        try:
            async with asyncio.timeout(until - began):
                answer = await self.state.backend.begin(chat, request_id, until)
        except TimeoutError:
            raise out_of_time() from None
        try:
            if chat.stream:
                async with asyncio.timeout(until + GRACE_SECONDS - time.monotonic()):
                    usage = await self._stream(chat, request_id, answer, until, send)
            else:
                pieces = [piece async for piece in answer.pieces(until)]
                text, (_, finish, usage) = "".join(piece for piece, _, _ in pieces), pieces[-1]
                response = json_response(self.dialect.write_answer(chat, request_id, text, finish, usage))
                await response(scope, receive, send)
        finally:
            answer.cancel()
        if usage:
            self.state.metrics.count_answer(time.monotonic() - began, usage.input, usage.output)

    async def _stream(self, chat: ChatRequest, request_id: str, answer: AnswerStream, until: float, send: Any) -> Usage | None:
        """Sends the events; the usage, or None where the answer broke off. Until its first piece an error has a status."""
        writer, begun, usage = self.dialect.EventWriter(chat, request_id), False, None
        try:
            async for text, finish, usage in answer.pieces(until):
                if not begun:
                    await send({"type": "http.response.start", "status": 200, "headers": EVENTS})
                    begun = True
                await send_events(send, writer.piece(text, finish, usage))
        except ApiError as error:
            if not begun:
                raise
            log.warning("%s broke off: %s", request_id, error.code)
            await send_events(send, writer.fail(error))
            usage = None
        await send({"type": "http.response.body", "body": b""})
        return usage


async def send_events(send: Any, events: Any) -> None:
    """Server-sent events, as one write."""
    if body := "".join(events).encode():
        await send({"type": "http.response.body", "body": body, "more_body": True})


async def run_until_disconnect(receive: Any, work: Any) -> None:
    """Does the work; cancels it when the client goes away. The request's body must have been read."""
    task = asyncio.create_task(work)

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        await task
    except asyncio.CancelledError:
        if not watcher.done():  # it is this server that stops
            raise
    finally:
        watcher.cancel()


async def read_body(request: Request, state: State) -> bytes:
    """The body, counted in `held_bytes`. Raises ApiError where it is too large or too slow."""
    bounds, chunks, size = state.bounds, [], 0
    try:
        async with asyncio.timeout(bounds.body_seconds):
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
            raise ApiError(408, "body_too_slow", f"the body did not come within {bounds.body_seconds} s") from None
        raise


def make_app(
    backend: Backend,
    bounds: Bounds,
    uploads: Uploads,
    max_requests: int,
    key: str | None = None,
    prefix: str = "",
    public_url: str = "",
) -> Starlette:
    """The application; it holds `max_requests` at a time.

    Its routes answer below `prefix`, too, as behind a gateway that does not strip it. `public_url` is where clients reach it,
    if not where they say they do.
    """
    state = State(backend, bounds, uploads, max_requests)

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
        return Response(generate_latest(state.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def permit(request: Request) -> Response:
        if request.query_params.get("action") != "getPolicy":
            raise ApiError(400, "invalid_parameter", "action must be getPolicy")
        folder, policy, signature = uploads.permit()
        url = request.url
        host = public_url.rstrip("/") or f"{url.scheme}://{url.netloc}{url.path.removesuffix(PERMIT)}"
        host += f"{UPLOAD}?{urlencode({'policy': policy, 'signature': signature})}"  # so that it is checked before a byte is read
        return json_response(dashscope_api.write_policy(host, folder, policy, signature, request.scope["request_id"]))

    async def upload(request: Request) -> Response:
        folder = uploads.check(request.query_params.get("policy", ""), request.query_params.get("signature", ""))
        body = await read_body(request, state)
        try:
            form = await asyncio.to_thread(read_form, body, request.headers.get("content-type", ""))
            uploads.put(folder, form)
        finally:
            state.held_bytes -= len(body)
        return Response(status_code=200)

    openai, dashscope = ChatEndpoint(state, openai_api), ChatEndpoint(state, dashscope_api)
    routes = []
    for start in {"", prefix}:
        routes += [Route(start + path, openai, methods=["POST"]) for path in CHAT]
        routes += [Route(start + path, health) for path in HEALTH] + [Route(start + path, models) for path in MODELS]
        routes += [Route(f"{start}{path}/{{name:path}}", model) for path in MODELS]
        routes += [Route(start + "/metrics", metrics), Route(start + GENERATION, dashscope, methods=["POST"])]
        routes += [Route(start + PERMIT, permit), Route(start + UPLOAD, upload, methods=["POST"])]
    if prefix:
        routes += [Route(prefix, openai, methods=["POST"]), Route(prefix, health)]
    starts = ("", prefix)
    free = {(method, start + path) for method in ("GET", "HEAD") for start in starts for path in (*HEALTH, "")}
    free |= {("POST", start + UPLOAD) for start in starts}  # which asks for its permit

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await backend.close()

    most, host = max_requests + SPARE_CONNECTIONS, host_of(public_url)
    access = Middleware(AccessMiddleware, key=key, free=free, requests=state.metrics.requests, host=host, connections=most)
    handlers = {ApiError: _refuse, HTTPException: _refuse, ClientDisconnect: _disconnected}
    app = Starlette(routes=routes, lifespan=lifespan, middleware=[access], exception_handlers=handlers)
    app.router.redirect_slashes = False  # it would lead to whatever the client calls its Host
    return app


async def _refuse(request: Request, error: Any) -> Response:
    if isinstance(error, HTTPException):
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "refused")
        error = ApiError(error.status_code, code, "there is nothing at this path for this method")
    return error_response(error, request.scope)


async def _disconnected(request: Request, error: Any) -> Response:
    """Nobody is there to read this."""
    return Response(status_code=499)
