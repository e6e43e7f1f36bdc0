"""Answers requests with another server that speaks OpenAI's dialect, vLLM above all: by its URL, or started beside this one.

Pictures are opened here, within our bounds; what vLLM does beyond our own engine is passed on.
"""

import asyncio
import atexit
import logging
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from jinja2 import Template

from qwenvl_ft.data.chat import Chat
from qwenvl_ft.data.geometry import Limits, read_limits, tokens_of
from qwenvl_ft.data.reading import AS_FOUND, Reading
from qwenvl_ft.data.records import Turn
from qwenvl_ft.data.template import knows_tools, render
from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.folders.adapter import beyond_vllm, vllm_rank
from qwenvl_ft.folders.model import read_model_json
from qwenvl_ft.infer.decoding import Decoding, read_decoding
from qwenvl_ft.infer.engine import AS_TRAINED, ChatSettings, check_folders
from qwenvl_ft.serve.api import (
    FORMS,
    WORDS,
    ApiError,
    ChatRequest,
    Piece,
    Pieces,
    Usage,
    invalid_adapter,
    model_failed,
    no_thoughts,
    unknown_model,
)
from qwenvl_ft.serve.open_request import Opener, check_length, invalid_messages
from qwenvl_ft.serve.vllm_request import read_events, read_pieces, read_usage, sized, with_calls, write_message, write_request

log = logging.getLogger("qwenvl_ft.serve")
Process = subprocess.Popen[bytes]
START_SECONDS = 1800  # a large model is read from a slow disk
STOP_SECONDS = 15
REST_SECONDS = 5  # that a replica which failed is asked only where no other is left


@dataclass(eq=False)
class Replica:
    """A server among several that serve the same."""

    url: str
    active: int = 0  # requests under way there
    rests_until: float = 0.0  # of the monotonic clock

    @property
    def rests(self) -> bool:
        return time.monotonic() < self.rests_until


class ReplicaError(Exception):
    """A replica failed, or is full; `refusal` is what is said where no other answers either."""

    def __init__(self, refusal: ApiError):
        super().__init__(refusal.message)
        self.refusal = refusal


class VllmBackend:
    """The models of the server at `url`, by their names there; `others` are URLs of servers that serve the same.

    A request goes to the least busy of them, and to another where that fails before the first piece of its answer. `opens` says how
    one more adapter is asked, and what is wrong with it.
    `chats`, where they are known, say what each model's pictures are seen within, how it is asked and how videos are drawn for it,
    `own` are the limits of the base's processor, which is all that vLLM knows; `decoding` is the base's. Raises UserError where it
    does not answer.
    """

    passes = WORDS | FORMS

    def __init__(self, url: str, opener: Opener, process: Process | None = None,
                 chats: Mapping[str, tuple[Chat, Reading]] | None = None, own: Limits | None = None,
                 decoding: Decoding | None = None, others: Sequence[str] = (),
                 opens: Callable[[Path], tuple[Chat, Reading]] | None = None):  # fmt: skip
        self.opener, self.process, self.chats, self.own, self.decoding = opener, process, dict(chats or {}), own, decoding
        self.opens = opens
        self.replicas = [Replica(one.rstrip("/")) for one in (url, *others)]
        self.changing = asyncio.Lock()  # one adapter comes or goes at a time: two of one name would both find it free
        self.names, *others_names = [names_at(replica.url) for replica in self.replicas]
        for replica, names in zip(self.replicas[1:], others_names, strict=True):
            if set(names) != set(self.names):
                what = f"serves {', '.join(names)}, and {url} serves {', '.join(self.names)}"
                raise UserError(
                    Problem(replica.url, what, "give replicas of one server, started with the same --served-model-name")
                )
        timeout, unlimited = httpx.Timeout(opener.bounds.seconds, connect=5), httpx.Limits(max_connections=None)
        self.client = httpx.AsyncClient(timeout=timeout, limits=unlimited, trust_env=False)

    async def answer(self, chat: ChatRequest, request_id: str, until: float) -> Pieces:
        """Opens the pictures, asks the other server and hands on what it says; the last piece once the usage is known."""
        if chat.model not in self.names:
            raise unknown_model(self.names)
        known, reading = self.chats.get(chat.model, (None, AS_FOUND))
        if known:
            if chat.thinking and not known.thinks:
                raise no_thoughts()
            if chat.thinking is None and known.thinks:
                chat = replace(chat, thinking={"on": True, "off": False}.get(known.thinking))
        messages = await self.opener.open(chat, until, partial(self._write, chat, known), reading, tools=True)
        body = write_request(chat, messages, self.decoding)
        del messages
        left, refused, begun = [*self.replicas], list[Replica](), False
        while True:
            replica = min(left, key=lambda one: (one.rests, one.active))
            left.remove(replica)
            try:
                async with aclosing(self._ask(replica, body, chat.more.get("n", 1), request_id)) as pieces:
                    async for piece in pieces:
                        begun = True
                        while refused:  # by what another answers: it was not the request
                            self._rest(refused.pop())
                        yield piece
                return
            except ReplicaError as failed:
                if begun or not left:
                    raise failed.refusal from None
                if failed.refusal.status != 429:  # a full one is well
                    refused.append(replica)
                log.warning("%s: %s failed and another is asked: %s", request_id, replica.url, failed)

    async def _ask(self, replica: Replica, body: Any, num_answers: int, request_id: str) -> Pieces:
        """What one replica says. Raises ReplicaError where another may do better, ApiError for the caller's mistake."""
        usage, ends = Usage(), list[Piece]()
        replica.active += 1
        try:
            async with self.client.stream("POST", f"{replica.url}/v1/chat/completions", json=body) as response:  # left, vLLM stops
                if (status := response.status_code) != 200:  # why is for our own log only
                    log.warning("%s: the engine said %s: %.500r", request_id, status, await response.aread())
                    status = status if status in (400, 404, 413, 422, 429) else 503
                    what = f"the engine behind this server refused the request (status {status})"
                    refusal = ApiError(status, "engine_refused", f"{what}{why_refused(response) if status in (400, 422) else ''}")
                    if status in (429, 503):
                        raise ReplicaError(refusal)
                    raise refusal
                async for event in read_events(response):
                    for piece in read_pieces(event, usage):
                        if piece.text or piece.delta or piece.logprobs:
                            yield piece._replace(finish=None)
                        if piece.finish:
                            ends.append(piece)
                    if event.get("usage"):
                        usage = read_usage(event["usage"])
            if len(ends) != num_answers:
                raise ValueError("the answer has no end")
            for end in ends:
                yield Piece("", end.finish, usage, end.number)
        except httpx.HTTPError:
            self._rest(replica)
            raise ReplicaError(ApiError(503, "unavailable", "the engine behind this server does not answer")) from None
        except (ValueError, AttributeError, TypeError, KeyError) as error:  # it failed, or speaks another dialect
            log.warning("%s: the engine's answer broke off: %.500r", request_id, error)
            self._rest(replica)
            raise ReplicaError(model_failed()) from None
        finally:
            replica.active -= 1

    def _rest(self, replica: Replica) -> None:
        replica.rests_until = time.monotonic() + REST_SECONDS

    def _write(self, chat: ChatRequest, known: Chat | None, messages: Sequence[Turn]) -> list[dict[str, Any]]:
        limits = known.limits if known else None
        if known:
            try:
                grids = [known.grid_of(medium) for message in messages for medium in message.media]
            except UserError as error:
                raise invalid_messages(error) from error
            of_media = sum(tokens_of(grid, known.limits.merge_size) for grid in grids)
            check_length(of_media, of_media, self.opener.bounds)
        fitting = (replace(message, parts=tuple(sized(part, limits, self.own) for part in message.parts)) for message in messages)
        written = [with_calls(write_message(message), sent) for message, sent in zip(fitting, chat.messages, strict=True)]
        told = "tools" in chat.more or any(message["role"] == "tool" or "tool_calls" in message for message in written)
        if told and known and not knows_tools(known.template):
            raise ApiError(
                400, "unsupported_parameter", "tools: this model's chat template writes none, so the model would not know them"
            )
        return written

    async def load_adapter(self, name: str, folder: str) -> None:
        """Has every replica serve one more adapter; those that did give it up again where one refuses. Raises ApiError."""
        async with self.changing:
            if name in self.names:
                raise ApiError(400, "exists", f"{name} is served already: take it away first")
            try:
                chat = await asyncio.to_thread(self.opens, Path(folder)) if self.opens else None
            except UserError as error:
                raise invalid_adapter(error) from error
            for number, replica in enumerate(self.replicas):
                try:
                    await self._change(replica, "load", {"lora_name": name, "lora_path": folder})
                except ApiError:
                    for earlier in self.replicas[:number]:
                        await self._change(earlier, "unload", {"lora_name": name})
                    raise
            self.names.append(name)
            self.chats |= {name: chat} if chat else {}

    async def unload_adapter(self, name: str) -> None:
        """Has every replica end serving an adapter. Raises ApiError."""
        async with self.changing:
            if name not in self.names:
                raise unknown_model(self.names)
            for replica in self.replicas:
                await self._change(replica, "unload", {"lora_name": name})
            self.names.remove(name)
            self.chats.pop(name, None)

    async def _change(self, replica: Replica, what: str, body: dict[str, str]) -> None:
        try:
            response = await self.client.post(f"{replica.url}/v1/{what}_lora_adapter", json=body)
        except httpx.HTTPError:
            raise ApiError(503, "unavailable", f"the engine at {replica.url} does not answer") from None
        if response.status_code == 404 and "lora" not in response.text.lower():
            what = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve ... --enable-lora"
            raise ApiError(400, "unsupported_parameter", f"the engine at {replica.url} changes no adapters: start it as {what}")
        if response.status_code != 200:
            raise ApiError(
                400 if response.status_code < 500 else 503, "engine_refused", f"the engine refused it{why_refused(response)}"
            )

    async def close(self) -> None:
        """Ends the connections, and the engine if it was started here."""
        await self.client.aclose()
        self.opener.close()
        if self.process:
            await asyncio.to_thread(end, self.process)
            atexit.unregister(end)

    def status(self) -> dict[str, float]:
        """Requests under way there, from here; how many replicas answer, as far as requests have shown."""
        awake = sum(not replica.rests for replica in self.replicas)
        alive = self.process is None or self.process.poll() is None
        return {
            "active": sum(replica.active for replica in self.replicas),
            "replicas": awake,
            "alive": alive and (awake > 0 or len(self.replicas) == 1),
        }


def names_at(url: str) -> list[str]:
    """The models that a server lists. Raises UserError where it does not."""
    try:
        # Not by a proxy that the environment names for the internet, here as below.
        listed = httpx.get(f"{url}/v1/models", timeout=10, trust_env=False).raise_for_status().json()
        return [model["id"] for model in listed["data"]]
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError) as error:
        fix = "start it first: vllm serve MODEL --port 8001"
        raise UserError(Problem(f"{url}/v1/models", "does not list models", fix)) from error


def start_vllm(
    model: Path, names: Sequence[str], adapters: Mapping[str, Path], arguments: Sequence[str], opener: Opener,
    settings: ChatSettings = AS_TRAINED, changes: bool = False,
) -> VllmBackend:  # fmt: skip
    """Starts `vllm serve` on loopback and waits until it is up. It ends with this process, however that ends but by SIGKILL.

    With `changes` adapters can be added and taken away while it runs. Raises UserError for what is wrong with the folders, and
    where it is not installed or ends.
    """
    check_vllm(model, adapters.values())
    base, reading = settings.open(model)
    chats = dict.fromkeys(names, (base, reading))
    chats |= {name: settings.open(model, folder) for name, folder in adapters.items()}
    if not (program := shutil.which("vllm")):
        raise UserError(
            Problem("--engine vllm", "vllm is not installed", "install it in an environment of its own: pip install vllm")
        )
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [program, "serve", str(model), "--host", "127.0.0.1", "--port", str(port), "--served-model-name", *names]
    if changes and not adapters:
        command += ["--enable-lora"]
    if adapters:
        rank = max(int(read_model_json(folder / "adapter_config.json")["r"]) for folder in adapters.values())
        command += ["--enable-lora", "--max-lora-rank", str(vllm_rank(rank) or rank)]
        command += ["--lora-modules", *(f"{name}={folder}" for name, folder in adapters.items())]
    if base.thinks:
        handle, template = tempfile.mkstemp(suffix=".jinja")
        atexit.register(os.unlink, template)
        with open(handle, "w", encoding="utf-8") as file:
            file.write(base.source)
        command += ["--chat-template", template]
    if knows_tools(base.template):
        command += ["--enable-auto-tool-choice", "--tool-call-parser", tool_parser(base.template)]
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:  # nohup ignores one; the server has its own SIGTERM once it runs
            signal.signal(number, _stop)
    # In a session of its own Ctrl-C does not end it before the answers that have begun.
    environment = os.environ | ({"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"} if changes else {})
    process = subprocess.Popen([*command, *arguments], start_new_session=True, env=environment)
    atexit.register(end, process)
    until = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < until:
        with suppress(httpx.HTTPError):
            if httpx.get(f"{url}/health", timeout=5, trust_env=False).status_code == 200:
                limits, decoding = read_limits(model), read_decoding(model, base.tokenizer)

                def opens(folder: Path) -> tuple[Chat, Reading]:
                    check_vllm(model, [folder])
                    return settings.open(model, folder)

                return VllmBackend(url, opener, process, chats, limits, decoding, opens=opens)
        time.sleep(0.5)
    raise UserError(Problem(" ".join(command), "did not start", "read what it printed above"))


def check_vllm(model: Path, adapters: Iterable[Path]) -> None:
    """Raises UserError for what is wrong with the folders, and for what vLLM does not take of an adapter."""
    adapters = [*adapters]
    check_folders(model, adapters)
    if problems := [
        Problem(str(folder), f"vLLM does not take its {', '.join(more)}",
                "merge it with `qwenvl-ft export`, and serve what comes of it")
        for folder in adapters if (more := beyond_vllm(folder))
    ]:  # fmt: skip
        raise UserError(*problems)


def tool_parser(template: Template) -> str:
    """vLLM's name of the way in which a template writes calls of tools: as JSON, or as tags for each argument."""
    call = {"type": "function", "function": {"name": "probed_call", "arguments": {"a": "b"}}}
    talk: list[dict[str, Any]] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    return "qwen3_coder" if "<function=probed_call>" in render(template, talk, answer_next=False) else "hermes"


def why_refused(response: httpx.Response) -> str:
    """What the engine says of the caller's own mistake, such as a schema that it does not take."""
    try:
        told = response.json()
        return f": {(told.get('error') or told)['message']}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return ""


def end(process: Process) -> None:
    """Ends the engine with all that it started: it is asked to, then killed, at once where a second signal comes meanwhile."""
    try:
        process.terminate()
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        log.warning("the engine did not end within %d s and is killed", STOP_SECONDS)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _stop(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)
