"""Answers requests with another server that speaks OpenAI's dialect, vLLM above all: by its URL, or started beside this one.

Pictures are opened here, within our bounds, and go on as PNG: upright, on white, as training saw them.
"""

import asyncio
import atexit
import base64
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

from qwenvl_ft.data.chat import Chat, open_chat
from qwenvl_ft.data.geometry import Limits, read_limits, resized
from qwenvl_ft.data.pictures import bounded, opened
from qwenvl_ft.data.records import CONTROL_TOKEN, Part, Picture, Turn, Video
from qwenvl_ft.data.template import Thinking
from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.folders.adapter import beyond_vllm, vllm_rank
from qwenvl_ft.folders.model import read_model_json
from qwenvl_ft.infer.decoding import Decoding, read_decoding
from qwenvl_ft.infer.engine import check_folders
from qwenvl_ft.serve.api import ApiError, ChatRequest, Pieces, Usage, model_failed, no_thoughts, unknown_model
from qwenvl_ft.serve.open_request import Opener, invalid_messages

log = logging.getLogger("qwenvl_ft.serve")
Process = subprocess.Popen[bytes]
START_SECONDS = 1800  # a large model is read from a slow disk
STOP_SECONDS = 15


class VllmBackend:
    """The models of the server at `url`, by their names there.

    `chats`, where they are known, say what each model's pictures are seen within and how it is asked, `own` are the limits of the
    base's processor, which is all that vLLM knows; `decoding` is the base's. Raises UserError where it does not answer.
    """

    def __init__(self, url: str, opener: Opener, process: Process | None = None, chats: Mapping[str, Chat] | None = None,
                 own: Limits | None = None, decoding: Decoding | None = None):  # fmt: skip
        self.url, self.opener, self.process, self.chats = url.rstrip("/"), opener, process, chats or {}
        self.own, self.decoding = own, decoding
        try:
            # Not by a proxy that the environment names for the internet, here as below.
            listed = httpx.get(f"{self.url}/v1/models", timeout=10, trust_env=False).raise_for_status().json()
            self.names = [model["id"] for model in listed["data"]]
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError) as error:
            fix = "start it first: vllm serve MODEL --port 8001"
            raise UserError(Problem(f"{url}/v1/models", "does not list models", fix)) from error
        timeout, unlimited = httpx.Timeout(opener.bounds.seconds, connect=5), httpx.Limits(max_connections=None)
        self.client = httpx.AsyncClient(timeout=timeout, limits=unlimited, trust_env=False)
        self.active = 0

    async def answer(self, chat: ChatRequest, request_id: str, until: float) -> Pieces:
        """Opens the pictures, asks the other server and hands on what it says; the last piece once the usage is known."""
        if chat.model not in self.names:
            raise unknown_model(self.names)
        if known := self.chats.get(chat.model):
            if chat.thinking and not known.thinks:
                raise no_thoughts()
            if chat.thinking is None and known.thinks:
                chat = replace(chat, thinking={"on": True, "off": False}.get(known.thinking))
        body = write_request(chat, await self.opener.open(chat, until, partial(self._write, chat.model)), self.decoding)
        usage, finish = Usage(), None
        self.active += 1
        try:
            async with self.client.stream("POST", f"{self.url}/v1/chat/completions", json=body) as response:  # left, vLLM stops
                del body
                if (status := response.status_code) != 200:  # why is for our own log only
                    log.warning("%s: the engine said %s: %.500r", request_id, status, await response.aread())
                    status = status if status in (400, 404, 413, 422, 429) else 503
                    what = f"the engine behind this server refused the request (status {status})"
                    raise ApiError(status, "engine_refused", what)
                async for event in read_events(response.aiter_bytes()):
                    if "error" in event:
                        raise ValueError(event["error"])
                    for choice in event.get("choices", []):
                        finish = choice.get("finish_reason") or finish
                        if text := choice.get("delta", {}).get("content"):
                            yield text, None, usage
                    if event.get("usage"):
                        usage = read_usage(event["usage"])
            if not finish:
                raise ValueError("the answer has no end")
            yield "", "length" if finish == "length" else "stop", usage
        except httpx.HTTPError:
            raise ApiError(503, "unavailable", "the engine behind this server does not answer") from None
        except (ValueError, AttributeError, TypeError, KeyError) as error:  # it failed, or speaks another dialect
            log.warning("%s: the engine's answer broke off: %.500r", request_id, error)
            raise model_failed() from None
        finally:
            self.active -= 1

    def _write(self, model: str, messages: Sequence[Turn]) -> list[dict[str, Any]]:
        limits = self.chats[model].limits if model in self.chats else None
        fitting = (replace(message, parts=tuple(sized(part, limits, self.own) for part in message.parts)) for message in messages)
        return [*map(write_message, fitting)]

    async def close(self) -> None:
        """Ends the connections, and the engine if it was started here."""
        await self.client.aclose()
        self.opener.close()
        if self.process:
            await asyncio.to_thread(end, self.process)
            atexit.unregister(end)

    def status(self) -> dict[str, float]:
        """Requests under way there, from here."""
        return {"active": self.active, "alive": self.process is None or self.process.poll() is None}


def write_request(chat: ChatRequest, messages: Sequence[dict[str, Any]], decoding: Decoding | None) -> dict[str, Any]:
    """The request in OpenAI's dialect, with vLLM's additions.

    It names every setting for which vLLM would look into the model's generation_config.json; the ends and the penalty, where the
    folder is not known here, are left to that.
    """
    how = chat.sampling
    penalty = decoding.repetition_penalty if decoding and how.repetition_penalty is None else how.repetition_penalty
    body = {
        "model": chat.model, "messages": messages,
        "stream": True, "stream_options": {"include_usage": True},
        "max_tokens": how.max_new_tokens, "temperature": how.temperature, "top_p": how.top_p, "min_p": 0,
        "top_k": how.top_k if how.top_k > 0 else -1, "seed": how.seed, "stop": list(how.stop) or None,
        "repetition_penalty": penalty, "stop_token_ids": list(decoding.ends) if decoding else None,
        "chat_template_kwargs": None if chat.thinking is None else {"enable_thinking": chat.thinking},
    }  # fmt: skip
    return {key: value for key, value in body.items() if value is not None}


def write_message(message: Turn) -> dict[str, Any]:
    """A message in OpenAI's form, its control tokens plain text, its pictures PNG, a video vLLM's frames in one URL."""
    parts: list[dict[str, Any]] = []
    for part in message.parts:
        if isinstance(part, str):
            parts.append({"type": "text", "text": as_letters(part)})
        elif isinstance(part, Picture):
            parts.append({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{_png(opened(part))}"}})
        elif isinstance(part, Video):
            frames = ",".join(map(_png, part.images))
            rate = part.fps * len(part.images) / part.num_frames
            # jpeg is vLLM's only word for a list of frames; it reads what a frame is from its bytes, and PNG loses nothing.
            parts.append({"type": "video_url", "video_url": {"url": f"data:video/jpeg;base64,{frames}"}, "fps": rate})
    if message.role != "user":  # some templates want these turns as one text
        return {"role": message.role, "content": "".join(part["text"] for part in parts)}
    return {"role": message.role, "content": parts}


def as_letters(text: str) -> str:
    """The text with a space of no width in its control tokens: vLLM reads a text's tokens itself, and they would act there."""
    return CONTROL_TOKEN.sub(lambda token: f"<\u200b{token[0][1:]}", text)


def sized(part: Part, limits: Limits | None, base: Limits | None) -> Part:
    """A picture at the size that its own bounds or its adapter's training give it: vLLM knows those of its base only.

    Raises ApiError for bounds where `limits` are not known, for a video's, and for a size that vLLM would change again.
    """
    if not isinstance(part, Picture | Video):
        return part
    bounds = bool(part.min_pixels or part.max_pixels)
    if bounds and (limits is None or isinstance(part, Video)):
        raise ApiError(
            400, "invalid_messages", f"this engine takes no min_pixels and max_pixels for {part.kind}s: send them smaller"
        )
    if isinstance(part, Video) or not limits or not (bounds or limits != base):
        return part
    own = replace(part, min_pixels=part.min_pixels or limits.min_pixels, max_pixels=part.max_pixels or limits.max_pixels)
    try:
        fitting = bounded(own, limits)
    except UserError as error:
        raise invalid_messages(error) from error
    if isinstance(fitting, Picture) and base and resized(fitting.height, fitting.width, base) != (fitting.height, fitting.width):
        what = f"is seen at {fitting.width} x {fitting.height} px, and the engine's own limits would change that"
        fix = "the adapter was trained with others than its base has: export it, and serve the merged folder"
        raise ApiError(400, "invalid_messages", f"a picture {what}: {fix}")
    return fitting


def _png(image: Image.Image) -> str:
    file = BytesIO()
    image.save(file, "PNG", compress_level=1)
    return base64.b64encode(file.getvalue()).decode()


async def read_events(chunks: AsyncIterator[bytes]) -> AsyncIterator[dict[str, Any]]:
    """The JSON of each `data:` line but [DONE]. Raises ValueError for what is none."""
    rest = b""
    async for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"data:") and (data := line[5:].strip()) != b"[DONE]":
                yield json.loads(data)


def read_usage(usage: Mapping[str, Any]) -> Usage:
    """Token counts; vLLM tells pictures apart only in some versions."""
    details = usage.get("prompt_tokens_details") or {}
    image, video = details.get("image_tokens") or 0, details.get("video_tokens") or 0
    return Usage(usage["prompt_tokens"], usage["completion_tokens"], image, video, details.get("cached_tokens") or 0)


def start_vllm(
    model: Path, names: Sequence[str], adapters: Mapping[str, Path], arguments: Sequence[str], opener: Opener,
    min_pixels: int | None = None, max_pixels: int | None = None, thinking: Thinking | None = None,
    video_max_pixels: int | None = None,
) -> VllmBackend:  # fmt: skip
    """Starts `vllm serve` on loopback and waits until it is up. It ends with this process, however that ends but by SIGKILL.

    Raises UserError for what is wrong with the folders, and where it is not installed or ends.
    """
    check_folders(model, adapters.values())
    if problems := [
        Problem(str(folder), f"vLLM does not take its {', '.join(more)}",
                "merge it with `qwenvl-ft export`, and serve what comes of it")
        for folder in adapters.values() if (more := beyond_vllm(folder))
    ]:  # fmt: skip
        raise UserError(*problems)
    settings = min_pixels, max_pixels, thinking, video_max_pixels
    base = open_chat(model, *settings)
    chats = dict.fromkeys(names, base)
    chats |= {name: open_chat(model, *settings, folder) for name, folder in adapters.items()}
    if not (program := shutil.which("vllm")):
        raise UserError(
            Problem("--engine vllm", "vllm is not installed", "install it in an environment of its own: pip install vllm")
        )
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [program, "serve", str(model), "--host", "127.0.0.1", "--port", str(port), "--served-model-name", *names]
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
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:  # nohup ignores one; the server has its own SIGTERM once it runs
            signal.signal(number, _stop)
    # In a session of its own Ctrl-C does not end it before the answers that have begun.
    process = subprocess.Popen([*command, *arguments], start_new_session=True)
    atexit.register(end, process)
    until = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < until:
        with suppress(httpx.HTTPError):
            if httpx.get(f"{url}/health", timeout=5, trust_env=False).status_code == 200:
                return VllmBackend(url, opener, process, chats, read_limits(model), read_decoding(model, base.tokenizer))
        time.sleep(0.5)
    raise UserError(Problem(" ".join(command), "did not start", "read what it printed above"))


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
