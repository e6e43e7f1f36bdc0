"""Answers that are JSON of a schema, by the built-in engine: jsonschema judges them, the real openai client asks for them."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import jsonschema
import openai
import pytest
from pydantic import BaseModel

from qwenvl_ft.serve.api import ApiError
from qwenvl_ft.serve.schema import Grammars, schema_of
from tests.serving import CHARTS, question, serving, tiny_engines

ROW = {"type": "object", "required": ["unit", "value"], "additionalProperties": False,
       "properties": {"unit": {"enum": ["km", "°C", None]}, "value": {"type": "integer", "minimum": -9, "maximum": 99}}}  # fmt: skip
SCHEMA = {"type": "object", "required": ["title", "rows"], "additionalProperties": False,
          "properties": {"title": {"type": "string", "maxLength": 8}, "rows": {"type": "array", "items": ROW, "minItems": 1, "maxItems": 3}}}  # fmt: skip
HUGE = {"type": "object", "properties": {f"p{number}": {"type": "string"} for number in range(2100)}}


def asked(schema) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "chart", "schema": schema, "strict": True}}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    pytest.importorskip("llguidance", reason="the extra schema is not installed")
    with serving(tiny_engines(tmp_path_factory.mktemp("adapters"))) as server:
        yield server


@pytest.fixture
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.mark.parametrize("model, temperature", [("tiny", 0), ("one", 1.5)])
def test_an_answer_is_json_of_its_schema(client, model, temperature):
    """The tiny model, asked without, answers anything but JSON."""
    question_ = {"model": model, "messages": question("read", CHARTS[0]), "max_tokens": 150, "temperature": temperature, "seed": 3}
    answer = client.chat.completions.create(**question_, response_format=asked(SCHEMA))
    assert answer.choices[0].finish_reason == "stop"
    jsonschema.validate(json.loads(answer.choices[0].message.content), SCHEMA)
    parts = client.chat.completions.create(**question_, response_format=asked(SCHEMA), stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in parts) == answer.choices[0].message.content
    with pytest.raises(ValueError):
        json.loads(client.chat.completions.create(**question_ | {"max_tokens": 12}).choices[0].message.content)


def test_a_class_of_pydantics_is_answered_with_one(client):
    class Bar(BaseModel):
        is_blue: bool
        unit: Literal["km", "mile"]

    parsed = client.chat.completions.parse(model="tiny", messages=question("read", CHARTS[1]), response_format=Bar, max_tokens=40)
    assert isinstance(parsed.choices[0].message.parsed, Bar)


def test_a_json_object_begins_as_one(client):
    text = client.chat.completions.create(
        model="tiny", messages=question("read"), max_tokens=12, response_format={"type": "json_object"}
    )
    assert text.choices[0].message.content.startswith("{")


def test_requests_with_and_without_a_schema_share_a_batch(served, client):
    """A mask is one request's: the others answer as they do alone."""

    def ask(number: int) -> str:
        more = {"response_format": asked(SCHEMA)} if number % 2 else {}
        answer = client.chat.completions.create(model="tiny", messages=question("read", CHARTS[number % 4]), max_tokens=16, **more)
        return answer.choices[0].message.content

    alone = [ask(number) for number in range(4)]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(ask, range(8))) == alone * 2


@pytest.mark.parametrize("wrong, word", [
    (asked({"type": "nonsense"}), "nonsense"), (asked({"not": {}}), "not"), (asked({"$ref": "http://169.254.169.254/x"}), "cannot be held"),
    (asked({"allOf": [{"pattern": f"[a-z]*{letter}.*"} for letter in "abcdefghijklmnopqr"]}), "allOf"),
    (asked({"enum": ["x" * 70_000]}), "more than 65536 bytes"), ({"type": "grammar"}, "json_object"), ({"type": "json_schema"}, "json_object"),
    ({"type": "json_schema", "json_schema": {"schema": []}}, "json_object"),
])  # fmt: skip
def test_a_schema_that_cannot_be_held_is_refused_in_words(client, wrong, word):
    with pytest.raises(openai.BadRequestError, match=word) as refused:
        client.chat.completions.create(model="tiny", messages=question("read"), response_format=wrong)
    assert len(refused.value.message) < 1200


def test_a_grammar_that_fails_on_the_way_ends_its_answer_and_no_other(served, client):
    with pytest.raises(openai.APIError):
        client.chat.completions.create(model="tiny", messages=question("read"), response_format=asked(HUGE), max_tokens=64)
    assert served.backend.batcher.alive
    answer = client.chat.completions.create(model="tiny", messages=question("read"), max_tokens=4)
    assert answer.choices[0].finish_reason in ("stop", "length")


def test_text_is_no_schema():
    assert schema_of({"type": "text"}) is None and schema_of({"type": "json_object"}) == {"type": "object"}


def test_where_the_package_is_not_installed_the_answer_says_which(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ApiError, match=r"needs the package llguidance; .*pip install '.\[schema\]'") as refused:
        Grammars(None, [], 0).grammar({"type": "object"})
    assert refused.value.status == 400
