"""The DashScope dialect, multimodal-generation, as functions from JSON to JSON. Source: what dashscope 1.20 to 2.0 send and read.

Whether to stream is a header. Pieces hold the text so far unless `incremental_output` is true.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from qwenvl_ft.serve.api import WORDS, ApiError, ChatRequest, Piece, Usage, read_more, read_sampling, read_thinking

CODES: dict[int | str, str] = {  # by status, and where that says too little by our own code
    400: "InvalidParameter", 401: "InvalidApiKey", 403: "AccessDenied", 404: "ModelNotFound", 408: "RequestTimeOut",
    429: "Throttling", 503: "ServiceUnavailable", 504: "RequestTimeOut", "not_found": "InvalidURL",
}  # fmt: skip


def read_generation(body: Any, most_tokens: int, stream: bool, passes: frozenset[str] = frozenset()) -> ChatRequest:
    """The request; raises ApiError. Of what the backend `passes`, that which leaves an answer one text."""
    if not isinstance(body, dict) or not isinstance(body.get("input"), dict) or not isinstance(body.get("model"), str):
        raise ApiError(400, "invalid_request", 'the body must be {"model": "...", "input": {"messages": [...]}}')
    parameters = {} if body.get("parameters") is None else body["parameters"]
    if not isinstance(parameters, dict):
        raise ApiError(400, "invalid_parameter", "parameters must be an object")
    if not isinstance(increments := parameters.get("incremental_output"), bool | None):
        raise ApiError(400, "invalid_parameter", "incremental_output must be true or false")
    return ChatRequest(
        model=body["model"],
        messages=body["input"].get("messages"),
        sampling=read_sampling(parameters, ("max_tokens",), most_tokens),
        stream=stream,
        increments=increments is True,
        thinking=read_thinking(parameters),
        more=read_more(parameters, passes & WORDS),
    )


def write_answer(chat: ChatRequest, request_id: str, text: str, finish: str, usage: Usage) -> dict[str, Any]:
    """The body of an answer, and of each of its events; `finish` is the text "null" until the end."""
    message = {"role": "assistant", "content": [{"text": text}]}
    counts = {"input_tokens": usage.input, "output_tokens": usage.output, "total_tokens": usage.input + usage.output}
    counts |= {"image_tokens": usage.image} | ({"video_tokens": usage.video} if usage.video else {})
    return {
        "output": {"choices": [{"message": message, "finish_reason": finish}]},
        "usage": counts | {"input_tokens_details": usage.input_details, "output_tokens_details": {"text_tokens": usage.output}},
        "request_id": request_id,
    }


def write_whole(chat: ChatRequest, request_id: str, pieces: Sequence[Piece]) -> dict[str, Any]:
    """The body of an answer that is not streamed."""
    return write_answer(chat, request_id, "".join(piece.text for piece in pieces), pieces[-1].finish or "stop", pieces[-1].usage)


class EventWriter:
    """Server-sent events of one answer, one JSON each."""

    def __init__(self, chat: ChatRequest, request_id: str):
        self.chat, self.request_id = chat, request_id
        self.text, self.number = "", 0

    def piece(self, text: str, finish: str | None, usage: Usage, *_: Any) -> Iterator[str]:
        """A Piece of the answer."""
        if text or finish:
            self.text, self.number = self.text + text, self.number + 1
            said = text if self.chat.increments else self.text
            body = write_answer(self.chat, self.request_id, said, finish or "null", usage)
            yield f"id:{self.number}\nevent:result\n:HTTP_STATUS/200\ndata:{json.dumps(body, ensure_ascii=False)}\n\n"

    def fail(self, error: ApiError) -> Iterator[str]:
        """An error after the answer has begun: in exactly this form, without spaces, or the client breaks."""
        body = json.dumps(write_error(error, self.request_id), ensure_ascii=False)
        yield f"event:error\nstatus:{error.status}\ndata:{body}\n\n"


def write_policy(upload_host: str, folder: str, signature: str, request_id: str) -> dict[str, Any]:
    """Where a client may upload a file to, and with what."""
    data = {
        "policy": folder,
        "signature": signature,
        "oss_access_key_id": "qwenvl_ft",
        "upload_dir": folder,
        "upload_host": upload_host,
        "x_oss_object_acl": "private",
        "x_oss_forbid_overwrite": "true",
    }
    return {"request_id": request_id, "data": data}


def write_error(error: ApiError, request_id: str) -> dict[str, Any]:
    """The body of a refusal; the id is in the server's log, too."""
    code = CODES.get(error.code) or CODES.get(error.status, "InvalidParameter" if error.status < 500 else "InternalError")
    return {"code": code, "message": error.message, "request_id": request_id}
