"""OpenAI's newer dialect, /v1/responses, over the older one: what is asked becomes a chat, its pieces become items.

Nothing is stored, so a conversation comes whole each time. Source: the types of openai 3.54.
"""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from qwenvl_ft.serve import openai_api
from qwenvl_ft.serve.api import ApiError, ChatRequest, Piece, Usage

LOGPROBS = "message.output_text.logprobs"
# What would change an answer and nobody here does, with the values that ask for nothing.
REFUSED = {
    "previous_response_id": "nothing is stored here: send the whole conversation as input",
    "conversation": "nothing is stored here", "prompt": "no prompts are stored here",
    "background": "answers are given while the client waits", "max_tool_calls": "no tools are run here",
    "context_management": "nothing of a conversation is left out here", "truncation": "nothing of a conversation is left out here",
    "reasoning": "send enable_thinking, true or false",
}  # fmt: skip
IDLE: tuple[Any, ...] = (None, False, "disabled", {}, [])
ECHOED = ("instructions", "max_output_tokens", "metadata", "temperature", "text", "top_p", "user")
# Not handed to the older dialect as they are: written anew for it, or its own words, which mean nothing in this one.
OTHERS = ("input", "instructions", "tools", "tool_choice", "text", "max_tokens", "max_completion_tokens")
TEXTS = ("input_text", "output_text", "text")
PARTS = {"message": "output_text", "reasoning": "reasoning_text"}  # the part that an item has


def read_chat(body: Any, most_tokens: int, passes: frozenset[str] = frozenset()) -> ChatRequest:
    """The request; raises ApiError. `echo` is what an answer repeats of it."""
    if not isinstance(body, dict):
        raise ApiError(400, "invalid_request", "the body must be a JSON object")
    for key, why in REFUSED.items():
        asked = body.get(key)
        asks_nothing = asked in IDLE or (key == "reasoning" and isinstance(asked, dict) and not any(asked.values()))
        if not asks_nothing:
            raise ApiError(400, "unsupported_parameter", f"{key} is not supported here: {why}")
    include = body.get("include") or []
    if not isinstance(include, list) or set(map(str, include)) - {LOGPROBS}:
        raise ApiError(400, "unsupported_parameter", f"include may hold {LOGPROBS} and nothing else here")
    if body.get("n") not in (None, 1):
        raise ApiError(400, "unsupported_parameter", "n is not supported here: a response is one answer, ask again for another")
    chat = {key: value for key, value in body.items() if key not in OTHERS}
    chat |= {"messages": _messages(body), "max_tokens": body.get("max_output_tokens"), "response_format": _format(body.get("text"))}
    chat |= {"tools": _tools(body.get("tools")), "tool_choice": _choice(body.get("tool_choice"))}
    if include or body.get("top_logprobs"):
        chat["logprobs"] = True
    echo = {key: body.get(key) for key in ECHOED} | {
        "tools": body.get("tools") or [],
        "tool_choice": body.get("tool_choice") or "auto",
    }
    read = openai_api.read_chat(chat, most_tokens, passes)
    if read.sampling.capped:
        echo["max_output_tokens"] = read.sampling.max_new_tokens
    return replace(read, echo=echo | {"parallel_tool_calls": body.get("parallel_tool_calls") is not False})


def write_whole(chat: ChatRequest, request_id: str, pieces: Sequence[Piece]) -> dict[str, Any]:
    """The body of an answer that is not streamed."""
    writer = EventWriter(chat, request_id)
    for piece in pieces:
        for _ in writer.piece(*piece):
            pass
    return writer.response


class EventWriter:
    """Server-sent events of one answer: it is created, each item of it begins, grows and ends, it is complete.

    `response` is the answer so far.
    """

    def __init__(self, chat: ChatRequest, request_id: str):
        self.request_id, self.number, self.begun = request_id, 0, False
        self.output: list[dict[str, Any]] = []
        self.calls: dict[int, int] = {}  # place in the output, by a call's number
        self.is_open = False  # the last item
        self.response: dict[str, Any] = {
            "id": f"resp_{request_id}", "object": "response", "created_at": int(time.time()), "status": "in_progress",
            "model": chat.model, "error": None, "incomplete_details": None, "output": self.output, "usage": None,
            "store": False, "previous_response_id": None, "background": False, "truncation": "disabled",
            "reasoning": {"effort": None, "summary": None}, **chat.echo,
        }  # fmt: skip

    def piece(self, text: str, finish: str | None, usage: Usage, number: int = 0, delta: dict[str, Any] | None = None,
              logprobs: Any = None) -> Iterator[str]:  # fmt: skip
        """A Piece, and all that comes before the first and after the last."""
        if not self.begun:
            self.begun = True
            yield self._event("response.created", {"response": self.response})
            yield self._event("response.in_progress", {"response": self.response})
        said = delta or {}
        if thought := said.get("reasoning") or said.get("reasoning_content"):
            yield from self._text("reasoning", thought, [])
        if text:
            yield from self._text("message", text, (logprobs or {}).get("content") or [])
        for place, call in enumerate(said.get("tool_calls") or ()):
            yield from self._call(call.get("index", place), call)
        if finish:
            if not self.output:
                yield from self._text("message", "", [])
            whole = finish != "length"
            yield from self._end("completed" if whole else "incomplete")
            self.response |= {"status": "completed" if whole else "incomplete", "usage": write_usage(usage)}
            if not whole:
                self.response["incomplete_details"] = {"reason": "max_output_tokens"}
            yield self._event(f"response.{self.response['status']}", {"response": self.response})

    def fail(self, error: ApiError) -> Iterator[str]:
        """An error after the answer has begun."""
        told = openai_api.write_error(error, self.request_id)["error"]
        yield self._event("error", {"code": told["code"], "message": told["message"], "param": None})

    def _text(self, kind: str, text: str, logprobs: list[Any]) -> Iterator[str]:
        """More of the text of a message or a thought."""
        part_type = PARTS[kind]
        if not self.is_open or self.output[-1]["type"] != kind:
            part: dict[str, Any] = {"type": part_type, "text": ""}
            part |= {"annotations": [], "logprobs": []} if kind == "message" else {}
            own: dict[str, Any] = {"role": "assistant"} if kind == "message" else {"summary": []}
            yield from self._begin({"type": kind, **own, "content": []})
            yield self._event("response.content_part.added", {"part": part, "content_index": 0} | self._place())
            self.output[-1]["content"].append(part)
        part = self.output[-1]["content"][0]
        part["text"] += text
        more = {"logprobs": logprobs} if kind == "message" else {}
        if more:
            part["logprobs"] += logprobs
        if text:
            yield self._event(f"response.{part_type}.delta", {"delta": text, "content_index": 0} | more | self._place())

    def _call(self, number: int, call: dict[str, Any]) -> Iterator[str]:
        """More of a call."""
        function = call.get("function") or {}
        if number not in self.calls:
            name, call_id = function.get("name") or "", call.get("id") or f"call_{self.request_id}_{number}"
            yield from self._begin({"type": "function_call", "call_id": call_id, "name": name, "arguments": ""})
            self.calls[number] = len(self.output) - 1
        if (arguments := function.get("arguments")) and self.calls[number] == len(self.output) - 1:
            self.output[-1]["arguments"] += arguments
            yield self._event("response.function_call_arguments.delta", {"delta": arguments} | self._place())

    def _begin(self, item: dict[str, Any]) -> Iterator[str]:
        """The next item, once the last one has ended."""
        yield from self._end("completed")
        prefix = {"message": "msg", "reasoning": "rs", "function_call": "fc"}[item["type"]]
        self.output.append({"id": f"{prefix}_{self.request_id}_{len(self.output)}", "status": "in_progress", **item})
        self.is_open = True
        yield self._event("response.output_item.added", {"item": self.output[-1], "output_index": len(self.output) - 1})

    def _end(self, status: str) -> Iterator[str]:
        """The end of the last item, if it is open."""
        if not self.is_open:
            return
        self.is_open, item = False, self.output[-1]
        item["status"] = status
        if item["type"] == "function_call":
            told = {"arguments": item["arguments"], "name": item["name"]}
            yield self._event("response.function_call_arguments.done", told | self._place())
        else:
            part, more = item["content"][0], {}
            if "logprobs" in part:
                more = {"logprobs": part["logprobs"]}
            yield self._event(f"response.{part['type']}.done", {"text": part["text"], "content_index": 0} | more | self._place())
            yield self._event("response.content_part.done", {"part": part, "content_index": 0} | self._place())
        yield self._event("response.output_item.done", {"item": item, "output_index": len(self.output) - 1})

    def _place(self) -> dict[str, Any]:
        return {"item_id": self.output[-1]["id"], "output_index": len(self.output) - 1}

    def _event(self, kind: str, values: dict[str, Any]) -> str:
        body = {"type": kind, "sequence_number": self.number} | values
        self.number += 1
        return f"event: {kind}\ndata: {json.dumps(body, ensure_ascii=False)}\n\n"


def write_usage(usage: Usage) -> dict[str, Any]:
    """Token counts, pictures told apart."""
    return {
        "input_tokens": usage.input,
        "input_tokens_details": usage.input_details | {"cached_tokens": usage.cached, "cache_write_tokens": 0},
        "output_tokens": usage.output,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.input + usage.output,
    }


def _messages(body: dict[str, Any]) -> Any:
    """The input as messages of a chat, the instructions before them."""
    asked, instructions = body.get("input"), body.get("instructions")
    messages: list[Any] = [] if instructions is None else [{"role": "system", "content": instructions}]
    if isinstance(asked, str):
        return [*messages, {"role": "user", "content": asked}]
    if not isinstance(asked, list) or not asked:
        raise ApiError(400, "invalid_request", "input must be a text or a list of items")
    for item in asked:
        if not isinstance(item, dict):
            raise ApiError(400, "invalid_request", "an item of input must be an object")
        kind = item.get("type") or "message"
        if kind == "message":
            messages.append({"role": item.get("role"), "content": _content(item.get("content"))})
        elif kind == "function_call":
            call = {
                "id": item.get("call_id"),
                "type": "function",
                "function": {"name": item.get("name"), "arguments": item.get("arguments")},
            }
            if not messages or messages[-1].get("role") != "assistant":
                messages.append({"role": "assistant", "content": None})
            messages[-1].setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": _content(item.get("output"))})
        elif kind != "reasoning":  # which the server wrote itself; a thought of before is told to no model, as in the older dialect
            raise ApiError(400, "unsupported_parameter", f"input: an item of type {str(kind)[:40]} is not supported here")
    return messages


def _content(content: Any) -> Any:
    """The parts of a message in the older dialect."""
    return [*map(_part, content)] if isinstance(content, list) else content


def _part(part: Any) -> Any:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in TEXTS:
        return {"type": "text", "text": part.get("text")}
    if kind == "input_image" and part.get("image_url") is not None:
        bounds = {key: part[key] for key in ("min_pixels", "max_pixels") if key in part}
        return {"type": "image_url", "image_url": {"url": part["image_url"]}, **bounds}
    if kind in ("input_image", "input_file", "input_audio"):
        what = "send a picture as image_url, a data: URL" if kind == "input_image" else "send its text, or its pages as pictures"
        raise ApiError(400, "unsupported_parameter", f"input: an {kind} is not read so here: {what}")
    return part


def _format(text: Any) -> Any:
    """`text.format` as response_format."""
    asked = text.get("format") if isinstance(text, dict) else None
    if isinstance(asked, dict) and asked.get("type") == "json_schema":
        return {"type": "json_schema", "json_schema": {key: value for key, value in asked.items() if key != "type"}}
    return asked


def _tools(tools: Any) -> Any:
    """Functions as the older dialect has them."""
    if not isinstance(tools, list):
        return tools
    for tool in tools:
        if not isinstance(tool, dict) or tool.get("type") != "function":
            kind = str(tool.get("type") if isinstance(tool, dict) else tool)[:40]
            raise ApiError(400, "unsupported_parameter", f"tools: no {kind} is run here, functions may be called")
    return [{"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}} for tool in tools]


def _choice(choice: Any) -> Any:
    if isinstance(choice, dict) and choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    return choice
