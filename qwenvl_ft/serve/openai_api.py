"""The OpenAI dialect, /v1/chat/completions, as functions from JSON to JSON. Source: what openai 3.54 and its kin send and read."""

import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

from qwenvl_ft.serve.api import ApiError, ChatRequest, Piece, Usage, read_more, read_number, read_sampling, read_thinking

MAX_TOKENS_KEYS = ("max_completion_tokens", "max_tokens")
TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


def read_chat(body: Any, most_tokens: int, passes: frozenset[str] = frozenset()) -> ChatRequest:
    """The request; raises ApiError. `passes` are the backend's; keys that nobody here knows are left alone: clients send many."""
    if not isinstance(body, dict):
        raise ApiError(400, "invalid_request", "the body must be a JSON object")
    model, stream = body.get("model"), body.get("stream")
    if model is not None and not isinstance(model, str):
        raise ApiError(400, "invalid_parameter", "model must be a string")
    if not isinstance(stream, bool | None):  # 1 equals True
        raise ApiError(400, "invalid_parameter", "stream must be true or false")
    options, messages = body.get("stream_options"), body.get("messages")
    return ChatRequest(
        model=model or "",
        messages=[_message(message, "tools" in passes) for message in messages] if isinstance(messages, list) else messages,
        sampling=read_sampling(body, MAX_TOKENS_KEYS, most_tokens),
        stream=stream is True,
        usage_in_stream=isinstance(options, dict) and options.get("include_usage") is True,
        min_pixels=read_number(body, "min_pixels", 1, 1 << 40, whole=True),
        max_pixels=read_number(body, "max_pixels", 1, 1 << 40, whole=True),
        thinking=read_thinking(body),
        more=read_more(body, passes),
    )


def write_whole(chat: ChatRequest, request_id: str, pieces: Sequence[Piece]) -> dict[str, Any]:
    """The body of an answer, or of several, that are not streamed; no more than one piece of each has a delta and logprobs."""
    choices: dict[int, dict[str, Any]] = {}
    for text, finish, _, index, delta, logprobs in pieces:
        message = {"role": "assistant", "content": ""}
        choice = choices.setdefault(index, {"index": index, "message": message, "finish_reason": None, "logprobs": None})
        choice["message"] |= delta | {"content": choice["message"]["content"] + text}
        choice |= {"finish_reason": finish or choice["finish_reason"], "logprobs": logprobs or choice["logprobs"]}
    for choice in choices.values():
        if choice["message"].get("tool_calls"):
            choice["message"]["content"] = choice["message"]["content"] or None
    whole = {"choices": [choices[index] for index in sorted(choices)], "usage": write_usage(pieces[-1].usage)}
    return _head(chat, request_id, "chat.completion") | whole


class EventWriter:
    """Server-sent events of each answer: the role, pieces, the end; then the usage if asked for, [DONE]."""

    def __init__(self, chat: ChatRequest, request_id: str):
        self.usage, self.request_id = chat.usage_in_stream, request_id
        self.begun: set[int] = set()  # answers
        self.left = chat.more.get("n", 1)  # answers that have not ended
        self.head = _head(chat, request_id, "chat.completion.chunk")

    def piece(self, text: str, finish: str | None, usage: Usage, index: int = 0, delta: dict[str, Any] | None = None,
              logprobs: Any = None) -> Iterator[str]:  # fmt: skip
        """A Piece, and all that comes before an answer's first and after the last one's last."""
        if index not in self.begun:
            self.begun.add(index)
            yield self._event({"role": "assistant", "content": ""}, None, index)
        if text or delta or logprobs:
            yield self._event(({"content": text} if text else {}) | (delta or {}), None, index, logprobs)
        if finish:
            yield self._event({}, finish, index)
            self.left -= 1
        if finish and not self.left:
            if self.usage:
                yield _sse(self.head | {"choices": [], "usage": write_usage(usage)})
            yield "data: [DONE]\n\n"

    def fail(self, error: ApiError) -> Iterator[str]:
        """An error after the answer has begun."""
        yield _sse(write_error(error, self.request_id))

    def _event(self, delta: dict[str, Any], finish: str | None, index: int, logprobs: Any = None) -> str:
        choice = {"index": index, "delta": delta, "finish_reason": finish, "logprobs": logprobs}
        return _sse(self.head | {"choices": [choice]} | ({"usage": None} if self.usage else {}))


def write_usage(usage: Usage) -> dict[str, Any]:
    """Token counts, pictures told apart."""
    return {
        "prompt_tokens": usage.input,
        "completion_tokens": usage.output,
        "total_tokens": usage.input + usage.output,
        "prompt_tokens_details": usage.input_details | {"cached_tokens": usage.cached},
    }


def write_models(names: Sequence[str]) -> dict[str, Any]:
    """The body of /v1/models."""
    return {"object": "list", "data": [*map(write_model, names)]}


def write_model(name: str) -> dict[str, Any]:
    """The body of /v1/models/NAME."""
    return {"id": name, "object": "model", "created": 0, "owned_by": "qwenvl_ft"}


def write_error(error: ApiError, request_id: str) -> dict[str, Any]:
    """The body of a refusal; the id is in the server's log, too."""
    kind = TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    return {"error": {"message": f"{error.message} (request {request_id})", "type": kind, "param": None, "code": error.code}}


def _message(message: Any, tools: bool) -> Any:
    """A message in the words of before: `developer` is OpenAI's newer name of the system, null an assistant's empty text."""
    if not isinstance(message, dict):
        return message
    if message.get("tool_calls") and not tools:
        raise ApiError(400, "unsupported_parameter", "tool_calls are not supported here: leave them out")
    if message.get("role") == "developer":
        return message | {"role": "system"}
    if message.get("role") == "assistant" and message.get("content") is None:
        return message | {"content": ""}
    return message


def _head(chat: ChatRequest, request_id: str, kind: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{request_id}", "object": kind, "created": int(time.time()), "model": chat.model}


def _sse(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
