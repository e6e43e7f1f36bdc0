"""Answers that are JSON of a schema: llguidance says which tokens may come next.

It refuses what of a schema it cannot hold, in words, and never drops it.
"""

import json
import threading
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch

from qwenvl_ft.data.chat import Chat
from qwenvl_ft.serve.api import ApiError

SCHEMA_BYTES = 64 << 10
INTERSECTIONS = (
    8  # by allOf: with 18 patterns llguidance 1.9 thinks for 13 s, with each more for twice as long, whatever its limits
)
SPACES: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}  # as Python's json writes it


def schema_of(response_format: dict[str, Any]) -> dict[str, Any] | None:
    """The schema of OpenAI's `response_format`; None where it asks for text. Raises ApiError for what is none."""
    kind, named = response_format.get("type"), response_format.get("json_schema")
    schema = {"type": "object"} if kind == "json_object" else named.get("schema") if isinstance(named, dict) else None
    if kind == "text":
        return None
    if kind not in ("json_object", "json_schema") or not isinstance(schema, dict):
        what = 'response_format must be {"type": "json_object"} or {"type": "json_schema", "json_schema": {"schema": {...}}}'
        raise ApiError(400, "invalid_parameter", what)
    if len(json.dumps(schema)) > SCHEMA_BYTES:
        raise ApiError(400, "invalid_parameter", f"response_format: the schema has more than {SCHEMA_BYTES} bytes")
    if (both := _intersections(schema)) > INTERSECTIONS:
        raise ApiError(
            400, "invalid_parameter", f"response_format: the schema has {both + 1} parts in allOf: at most {INTERSECTIONS + 1}"
        )
    return schema


def _intersections(value: Any) -> int:
    """How often the schema says `and` with allOf."""
    if isinstance(value, dict):
        every = value.get("allOf")
        return sum(map(_intersections, value.values())) + (len(every) - 1 if isinstance(every, list) and every else 0)
    return sum(map(_intersections, value)) if isinstance(value, list) else 0


class Grammars:
    """Makes the grammar of an answer, for the tokens of one model that has `num_scores` of them and these `ends`."""

    def __init__(self, chat: Chat, ends: Sequence[int], num_scores: int):
        self.chat, self.ends, self.num_scores = chat, ends, num_scores
        self.reading = threading.Lock()

    def grammar(self, schema: dict[str, Any]) -> "Grammar":
        """The grammar of one answer. Raises ApiError for a schema that is none, and where llguidance is not installed."""
        try:
            from llguidance import LLMatcher, LLParserLimits
        except ImportError:
            fix = "install it beside the server: pip install '.[schema]' in the checkout"
            raise ApiError(400, "unsupported_parameter", f"response_format needs the package llguidance; {fix}") from None
        with self.reading:
            tokens = self._tokens
        matcher = LLMatcher(
            tokens, LLMatcher.grammar_from_json_schema(schema, SPACES), log_level=0, limits=LLParserLimits(verbose_errors=False)
        )
        if matcher.is_error():
            raise ApiError(400, "invalid_parameter", f"response_format: the schema cannot be held: {matcher.get_error()}")
        return Grammar(matcher)

    @cached_property
    def _tokens(self) -> Any:
        """The vocabulary as llguidance has it: a second or two of a large one."""
        from llguidance import LLTokenizer

        return LLTokenizer(self.chat.tokenizer.to_str(), n_vocab=self.num_scores, eos_token=[*self.ends])


class Grammar:
    """What may still come of one answer."""

    def __init__(self, matcher: Any):
        self.matcher = matcher

    @property
    def failed(self) -> str:
        """Why it cannot go on, such as a schema that is too large to be held; nothing while it can."""
        return str(self.matcher.get_error())

    def mask(self, scores: torch.Tensor) -> torch.Tensor:
        """The scores (1, V), those of tokens that may not come at minus infinity."""
        allowed = torch.frombuffer(bytearray(self.matcher.compute_logit_bias()), dtype=torch.uint8).bool()
        return scores.masked_fill(~allowed.to(scores.device), float("-inf"))

    def take(self, token: int) -> None:
        """This token came."""
        self.matcher.consume_token(token)
