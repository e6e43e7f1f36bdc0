"""Requests as vLLM takes them, and what it says: OpenAI's dialect with vLLM's additions.

Pictures are opened, upright, on white, as training saw them, and go on as PNG.
"""

import base64
import json
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import replace
from io import BytesIO
from typing import Any

import httpx
from PIL import Image

from qwenvl_ft.data.geometry import Limits, resized
from qwenvl_ft.data.pictures import bounded, opened
from qwenvl_ft.data.records import CONTROL_TOKEN, Part, Picture, Turn, Video
from qwenvl_ft.errors import UserError
from qwenvl_ft.infer.decoding import Decoding
from qwenvl_ft.serve.api import ApiError, ChatRequest, Piece, Usage
from qwenvl_ft.serve.open_request import invalid_messages

DELTA = ("tool_calls", "reasoning", "reasoning_content", "refusal")  # what goes on of a message beside its text
CALLS = ("tool_calls", "tool_call_id")  # what goes on of a message that was sent


def write_request(chat: ChatRequest, messages: Sequence[dict[str, Any]], decoding: Decoding | None) -> dict[str, Any]:
    """The request in OpenAI's dialect, with vLLM's additions.

    It names every setting for which vLLM would look into the model's generation_config.json; the ends and the penalty, where the
    folder is not known here, are left to that. An answer that is not streamed is asked for whole, so that another server can be
    asked where one fails.
    """
    how, more = chat.sampling, dict(chat.more)
    if "continue_final_message" in more:
        more["add_generation_prompt"] = False
    if tools := more.get("tools"):
        more["tools"] = in_letters(tools)
    if ends := [*(decoding.ends if decoding else ()), *more.get("stop_token_ids", [])]:
        more["stop_token_ids"] = ends
    penalty = decoding.repetition_penalty if decoding and how.repetition_penalty is None else how.repetition_penalty
    body = {
        "model": chat.model, "messages": messages,
        "stream": chat.stream, "stream_options": {"include_usage": True} if chat.stream else None,
        "max_tokens": how.max_new_tokens, "temperature": how.temperature, "top_p": how.top_p, "min_p": 0,
        "top_k": how.top_k if how.top_k > 0 else -1, "seed": how.seed, "stop": list(how.stop) or None,
        "repetition_penalty": penalty,
        "chat_template_kwargs": None if chat.thinking is None else {"enable_thinking": chat.thinking},
    } | more  # fmt: skip
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


def with_calls(message: dict[str, Any], sent: Mapping[str, Any]) -> dict[str, Any]:
    """A written message with the calls of tools that it was sent with."""
    return message | {key: in_letters(sent[key]) for key in CALLS if sent.get(key)}


def in_letters(value: Any) -> Any:
    """JSON whose texts are `as_letters`."""
    if isinstance(value, dict):
        return {as_letters(key): in_letters(held) for key, held in value.items()}
    return [*map(in_letters, value)] if isinstance(value, list) else as_letters(value) if isinstance(value, str) else value


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


async def read_events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The JSON of a whole answer, or of each `data:` line but [DONE]. Raises ValueError for what is none."""
    if response.headers.get("content-type", "").startswith("application/json"):
        yield json.loads(await response.aread())
        return
    rest = b""
    async for chunk in response.aiter_bytes():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"data:") and (data := line[5:].strip()) != b"[DONE]":
                yield json.loads(data)


def read_pieces(event: Mapping[str, Any], usage: Usage) -> Iterator[Piece]:
    """The pieces in a part of an answer, or in a whole one. Raises ValueError where the engine failed."""
    if "error" in event:
        raise ValueError(event["error"])
    for choice in event.get("choices") or []:
        said, finish = choice.get("message") or choice.get("delta") or {}, choice.get("finish_reason")
        if finish in ("abort", "error"):  # vLLM's words for an answer that it was stopped in
            raise ValueError(f"the engine ended it: {finish}")
        delta = {key: said[key] for key in DELTA if said.get(key)}
        finish = finish if finish in (None, "length", "tool_calls") else "stop"
        yield Piece(said.get("content") or "", finish, usage, choice.get("index") or 0, delta, choice.get("logprobs"))


def read_usage(usage: Mapping[str, Any]) -> Usage:
    """Token counts; vLLM tells pictures apart only in some versions."""
    details = usage.get("prompt_tokens_details") or {}
    image, video = details.get("image_tokens") or 0, details.get("video_tokens") or 0
    return Usage(usage["prompt_tokens"], usage["completion_tokens"], image, video, details.get("cached_tokens") or 0)
