"""What the two dialects of the server share: a request, who answers it, what it costs, why it is refused.

Nothing here opens a picture or knows a model.
"""

import json
import re
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from qwenvl_ft.errors import UserError

MOST_TOKENS = 1 << 20  # that anybody asks for in earnest
DEFAULT_TOKENS = 1024  # of an answer whose request names no bound
MESSAGE_CHARS = 1000  # of an error's message; a caller's own text may be part of it
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
JSON_VALUES = 200_000  # a body of millions of [] keeps every other request waiting for seconds while it is read
# What would change an answer and only some backends do, with the values that ask for nothing.
UNSUPPORTED = {
    "n": (None, 1), "tools": (None, []), "functions": (None, []), "response_format": (None, {"type": "text"}),
    "continue_final_message": (None, False),
    "logit_bias": (None, {}), "logprobs": (None, False), "presence_penalty": (None, 0), "frequency_penalty": (None, 0),
    "min_p": (None, 0), "stop_token_ids": (None, []), "guided_json": (None,),
    "tool_choice": (None, "none", "auto"), "modalities": (None, ["text"]), "top_logprobs": (None, 0), "echo": (None, False),
    "vl_high_resolution_images": (None, False), "mm_processor_kwargs": (None, {}),
}  # fmt: skip
# Of these, what says which words may come, and what gives an answer another form than one text.
WORDS = frozenset({"response_format", "logit_bias", "presence_penalty", "frequency_penalty", "min_p", "stop_token_ids"})
FORMS = frozenset({"n", "tools", "tool_choice", "logprobs", "top_logprobs", "continue_final_message"})
RANGES = {  # of those that are numbers: from, to, whether whole
    "n": (1, 16, True), "top_logprobs": (0, 20, True), "min_p": (0, 1, False),
    "presence_penalty": (-2, 2, False), "frequency_penalty": (-2, 2, False),
}  # fmt: skip


KINDS = {
    "tools": list,
    "stop_token_ids": list,
    "response_format": dict,
    "logit_bias": dict,
    "logprobs": bool,
    "continue_final_message": bool,
}


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn. A temperature of 0 takes the likeliest token; no `repetition_penalty`: the model's own.

    `capped`: more tokens were asked for than an answer may have.
    """

    max_new_tokens: int = DEFAULT_TOKENS
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    repetition_penalty: float | None = None
    capped: bool = False


@dataclass(frozen=True)
class ChatRequest:
    """A request. `messages` are as they were sent, nothing in them opened; no model named: the first that is served.

    `increments`: the events of a stream hold pieces, not the text so far. `min_pixels` and `max_pixels` are for pictures that
    have no bounds of their own. `thinking` replaces what the model's chat template does by itself. `more` are keys of OpenAI's
    that the backend `passes`, as they were sent; `echo` is what the answer repeats.
    """

    model: str
    messages: Any
    sampling: Sampling
    stream: bool = False
    usage_in_stream: bool = True
    increments: bool = True
    min_pixels: int | None = None
    max_pixels: int | None = None
    thinking: bool | None = None
    more: dict[str, Any] = field(default_factory=dict)
    echo: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Usage:
    """Tokens of a request; pictures and videos are part of `input`, as is what was `cached`, read for a request before."""

    input: int = 0
    output: int = 0
    image: int = 0
    video: int = 0
    cached: int = 0

    @property
    def input_details(self) -> dict[str, int]:
        """Of what the input is, as both dialects say it."""
        return {"text_tokens": self.input - self.image - self.video, "image_tokens": self.image, "video_tokens": self.video}


class Piece(NamedTuple):
    """A piece of the answer `number` of `n`, with the tokens so far; its last has a finish: stop, length or tool_calls.

    `delta` is what OpenAI's message has beside its text, `logprobs` as OpenAI writes them.
    """

    text: str
    finish: str | None
    usage: Usage
    number: int = 0
    delta: dict[str, Any] = {}  # noqa: RUF012  nobody writes into it
    logprobs: Any = None


Pieces = AsyncGenerator[Piece, None]


class Backend(Protocol):
    """Something that answers: the models of this process, or another server."""

    names: list[str]  # of its models
    passes: frozenset[str]  # of the keys in UNSUPPORTED, those that it does

    def answer(self, chat: ChatRequest, request_id: str, until: float) -> Pieces:
        """Pieces of the answer, or of its `n` answers; nothing follows the last one's finish. Closing it stops the model.

        Raises ApiError for what is wrong with the question, and where the model fails. Whoever asks ends it at `until`, of the
        monotonic clock; no picture is opened later.
        """

    async def load_adapter(self, name: str, folder: str) -> None:
        """Serves one more adapter. Raises ApiError."""

    async def unload_adapter(self, name: str) -> None:
        """Ends serving an adapter, once what was asked of it is answered. Raises ApiError."""

    async def close(self) -> None:
        """Finishes what has begun."""

    def status(self) -> dict[str, float]:
        """What /metrics shows of it; alive is 1 or 0."""


@dataclass(frozen=True)
class Bounds:
    """What one request may cost. `pictures` counts the frames of videos; together they may have twice the `picture_pixels`."""

    body_bytes: int = 32 << 20
    pictures: int = 64
    picture_pixels: int = 50_000_000
    prompt_tokens: int = 16_384
    answer_tokens: int = 4096
    seconds: float = 120


class ApiError(Exception):
    """Refuses a request: HTTP status, a code of the field, a message that the caller may read."""

    def __init__(self, status: int, code: str, message: str):
        super().__init__(message)
        self.status, self.code, self.message = status, code, message[:MESSAGE_CHARS]


def unknown_model(names: Sequence[str]) -> ApiError:
    """What is said to whoever asks for a model that is not here."""
    return ApiError(404, "model_not_found", f"no model of this name is served here, but {', '.join(names)}")


def invalid_adapter(error: UserError) -> ApiError:
    """What is wrong with an adapter's folder, as whoever has the admin key gets it."""
    return ApiError(
        400, "invalid_adapter", "; ".join(f"{problem.where}: {problem.what}: {problem.fix}" for problem in error.problems)
    )


def no_thoughts() -> ApiError:
    """What is said to whoever asks for a thought of a model that is taught none."""
    return ApiError(400, "unsupported_parameter", "enable_thinking: this model's chat template knows no thoughts")


def model_stopped() -> ApiError:
    """What whoever asks gets once the model answers nobody any more."""
    return ApiError(503, "unavailable", "the model has stopped")


def model_failed() -> ApiError:
    """What is said where an answer breaks off; why is in the log only."""
    return ApiError(500, "model_error", "the model failed on this request")


def read_json(body: bytes) -> Any:
    """The JSON of a request's body. Raises ApiError for what is none, nests too deep, is too much or holds half a character."""
    if sum(map(body.count, (b"[", b"{", b","))) > JSON_VALUES:  # those in texts, too: no text that a model reads has so many
        raise ApiError(400, "invalid_json", f"the body has more than {JSON_VALUES} values")
    try:
        value = json.loads(body.decode("utf-8-sig"))
        if SURROGATE.search(body):  # alone, in JSON it is fine, but it is no text: tokenizers and answers would break
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        raise ApiError(400, "invalid_json", "the body is no JSON that can be read") from None
    return value


def read_thinking(values: dict[str, Any]) -> bool | None:
    """`enable_thinking`, as DashScope's clients send it or as vLLM's do, in chat_template_kwargs. Raises ApiError."""
    template = {} if values.get("chat_template_kwargs") is None else values["chat_template_kwargs"]
    if not isinstance(template, dict) or template.keys() - {"enable_thinking"}:
        raise ApiError(400, "unsupported_parameter", "chat_template_kwargs may hold enable_thinking and nothing else here")
    asked = [wanted for of in (values, template) if (wanted := of.get("enable_thinking")) is not None]
    if not all(isinstance(wanted, bool) for wanted in asked) or len({*asked}) > 1:
        raise ApiError(400, "invalid_parameter", "enable_thinking must be true or false, and one of them")
    return asked[0] if asked else None


def read_more(values: dict[str, Any], passes: frozenset[str]) -> dict[str, Any]:
    """What a request asks for beyond Sampling, of the keys that are passed on; raises ApiError for another and a wrong number."""
    asked = {key for key, idle in UNSUPPORTED.items() if values.get(key) not in idle}
    if refused := asked - passes:
        raise ApiError(400, "unsupported_parameter", f"{', '.join(sorted(refused))} is not supported here: leave it out")
    if "tools" in asked:  # which alone give these a meaning
        asked |= {key for key in ("tool_choice", "parallel_tool_calls") if values.get(key) is not None}
    if wrong := [key for key in sorted(asked & KINDS.keys()) if not isinstance(values[key], KINDS[key])]:
        raise ApiError(400, "invalid_parameter", f"{wrong[0]} is of a wrong kind")
    numbers = {key: read_number(values, key, *RANGES[key]) for key in asked & RANGES.keys()}
    return {key: numbers.get(key, values[key]) for key in sorted(asked)}


def read_sampling(values: dict[str, Any], max_tokens_keys: tuple[str, ...], most: int) -> Sampling:
    """Sampling from a request's parameters, of at most `most` tokens, whatever is asked; raises ApiError naming what is wrong."""
    tokens = [read_number(values, key, 1, max(most, MOST_TOKENS), whole=True) for key in max_tokens_keys]
    wanted = next((number for number in tokens if number), min(DEFAULT_TOKENS, most))
    stop = values.get("stop")
    words = [stop] if isinstance(stop, str) else [] if stop is None else stop
    if not isinstance(words, list) or len(words) > 16 or not all(isinstance(word, str) and 0 < len(word) <= 256 for word in words):
        raise ApiError(400, "invalid_parameter", "stop must be a string or a list of at most 16 strings")
    top_p = read_number(values, "top_p", 0, 1)
    return Sampling(
        max_new_tokens=min(wanted, most),
        temperature=read_number(values, "temperature", 0, 2) or 0.0,
        top_p=1.0 if top_p is None else top_p,
        top_k=read_number(values, "top_k", -1, 1 << 20, whole=True) or 0,
        seed=read_number(values, "seed", -(1 << 63), (1 << 63) - 1, whole=True),
        stop=tuple(words),
        repetition_penalty=read_number(values, "repetition_penalty", 0.01, 100),
        capped=wanted > most,
    )


def read_number(values: dict[str, Any], key: str, low: float, high: float, whole: bool = False) -> Any:
    """A number of a request, None where it names none; raises ApiError for what is none or lies outside."""
    value = values.get(key)
    if value is None:
        return None
    if whole and isinstance(value, float) and value.is_integer():
        value = int(value)  # JavaScript and some JSON writers know no other numbers
    right = isinstance(value, int) if whole else isinstance(value, int | float)
    if isinstance(value, bool) or not right or not low <= value <= high:
        kind = "a whole number" if whole else "a number"
        raise ApiError(400, "invalid_parameter", f"{key} must be {kind} from {low} to {high}")
    return value
