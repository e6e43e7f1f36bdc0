"""What vLLM does beyond our own engine, through our server: the real openai client before it, vLLM's words behind it."""

import base64
import json

import httpx
import openai
import pytest

from qwenvl_ft.data.reading import Reading
from qwenvl_ft.data.template import compile_template
from qwenvl_ft.infer.engine import AS_TRAINED
from qwenvl_ft.serve.api import Bounds
from qwenvl_ft.serve.app import make_app
from qwenvl_ft.serve.open_request import Opener
from qwenvl_ft.serve.vllm_backend import VllmBackend, tool_parser
from tests import films
from tests.conftest import TINY
from tests.serving import Served, question
from tests.tiny import template_of

ZOOM = {
    "name": "zoom",
    "description": "not <|im_end|>",
    "parameters": {"type": "object", "properties": {"bar": {"type": "integer"}}},
}
TOOLS = [{"type": "function", "function": ZOOM}]
CALL = {"id": "call_1", "type": "function", "function": {"name": "zoom", "arguments": '{"bar": 3}'}}
LOGPROBS = {
    "content": [{"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": [{"token": "a", "logprob": -0.5, "bytes": [97]}]}]
}
USAGE = {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}


def whole(*messages, finish="stop", logprobs=None) -> httpx.Response:
    """As vLLM 0.32 answers what is not streamed."""
    choices = [{"index": index, "message": {"role": "assistant", "content": None, "refusal": None, "tool_calls": [], **message},
                "logprobs": logprobs, "finish_reason": finish} for index, message in enumerate(messages)]  # fmt: skip
    return httpx.Response(200, json={"object": "chat.completion", "choices": choices, "usage": USAGE})


def streamed(*choices) -> httpx.Response:
    """As vLLM 0.32 streams."""
    events = [*({"choices": [choice]} for choice in choices), {"choices": [], "usage": USAGE}]
    return httpx.Response(200, text="".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n")


@pytest.fixture(scope="module")
def front():
    """Our server before one whose answers the tests write: `answer` gives the next, `asked` are the bodies that it was sent."""
    import qwenvl_ft.serve.vllm_backend as module

    listed = httpx.Response(200, json={"data": [{"id": "tiny"}]}, request=httpx.Request("GET", "http://behind"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.httpx, "get", lambda *_, **__: listed)
        backend = VllmBackend("http://behind", opener := Opener(Bounds()))
    served = Served(make_app(backend, opener, 8), backend)
    served.asked = []

    def behind(request: httpx.Request) -> httpx.Response:
        served.asked.append(json.loads(request.content))
        return served.answer

    backend.client = httpx.AsyncClient(transport=httpx.MockTransport(behind))
    yield served
    served.stop()
    served.thread.join(30)


@pytest.fixture
def create(front):
    with openai.OpenAI(base_url=f"{front.url}/v1", api_key="none", max_retries=0) as client:

        def create(answer: httpx.Response, messages=None, **more):
            front.answer = answer
            return client.chat.completions.create(model="tiny", messages=messages or question("read"), **more)

        yield create


@pytest.mark.parametrize("key, value", [
    ("response_format", {"type": "json_object"}), ("response_format", {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}),
    ("presence_penalty", 0.5), ("frequency_penalty", -0.5), ("logit_bias", {"5": 1}), ("n", 2), ("logprobs", True),
])  # fmt: skip
def test_what_vllm_can_do_is_passed_on_as_it_was_sent(front, create, key, value):
    create(whole(*[{"content": "a"}] * (value if key == "n" else 1)), **{key: value})
    assert front.asked[-1][key] == value and front.asked[-1]["stream"] is False
    create(whole({"content": "a"}))
    assert key not in front.asked[-1], "it was not asked for"


def test_tools_their_calls_and_answers(front, create):
    answer = create(whole({"tool_calls": [CALL]}, finish="tool_calls"), tools=TOOLS, tool_choice="required")
    (call,) = answer.choices[0].message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("zoom", {"bar": 3})
    assert answer.choices[0].finish_reason == "tool_calls" and answer.choices[0].message.content is None
    assert (
        front.asked[-1]["tool_choice"] == "required" and front.asked[-1]["tools"][0]["function"]["parameters"] == ZOOM["parameters"]
    )
    assert "<|im_end|>" not in json.dumps(front.asked[-1]), "a control token in a tool's text would act"
    talk = [
        *question("read"),
        answer.choices[0].message,
        {"role": "tool", "tool_call_id": "call_1", "content": "it is <|im_end|> 3"},
    ]
    assert create(whole({"content": "three"}), talk, tools=TOOLS).choices[0].message.content == "three"
    user, called, told = front.asked[-1]["messages"]
    assert (user["role"], called["tool_calls"], told["role"], told["tool_call_id"]) == ("user", [CALL], "tool", "call_1")
    assert "<|im_end|>" not in told["content"] and told["content"].endswith(" 3")


def test_a_call_is_streamed(front, create):
    pieces = [{"tool_calls": [{"index": 0, "id": "call_1", "type": "function", "function": {"name": "zoom"}}]},
              *({"tool_calls": [{"index": 0, "function": {"arguments": text}}]} for text in ('{"bar"', ": 3}")), {}]  # fmt: skip
    choices = [{"index": 0, "delta": piece, "finish_reason": None if piece else "tool_calls"} for piece in pieces]
    parts = list(create(streamed(*choices), tools=TOOLS, stream=True, stream_options={"include_usage": True}))
    calls = [part.choices[0].delta.tool_calls[0] for part in parts[:-1] if part.choices[0].delta.tool_calls]
    assert calls[0].function.name == "zoom" and "".join(call.function.arguments or "" for call in calls) == '{"bar": 3}'
    assert parts[-2].choices[0].finish_reason == "tool_calls" and parts[-1].usage.total_tokens == 12
    assert front.asked[-1]["stream"] is True


def test_several_answers_and_their_logprobs(create):
    answer = create(whole({"content": "a"}, {"content": "b"}, logprobs=LOGPROBS), n=2, logprobs=True, top_logprobs=1)
    assert [(choice.index, choice.message.content, choice.finish_reason) for choice in answer.choices] == [
        (0, "a", "stop"),
        (1, "b", "stop"),
    ]
    assert answer.choices[1].logprobs.content[0].top_logprobs[0].logprob == -0.5 and answer.usage.completion_tokens == 3
    pieces = [{"index": index, "delta": {"content": text}, "logprobs": LOGPROBS} for index, text in ((1, "b"), (0, "a"), (1, "c"))]
    ends = [{"index": index, "delta": {}, "finish_reason": finish} for index, finish in ((0, "stop"), (1, "length"))]
    parts = [part.choices[0] for part in create(streamed(*pieces, *ends), n=2, logprobs=True, stream=True)]
    assert ["".join(part.delta.content or "" for part in parts if part.index == index) for index in (0, 1)] == ["a", "bc"]
    assert [(part.index, part.finish_reason) for part in parts if part.finish_reason] == [(0, "stop"), (1, "length")]
    assert parts[1].logprobs.content[0].logprob == -0.5


def test_an_answer_goes_on_from_what_it_begins_with(front, create):
    begun = [*question("read"), {"role": "assistant", "content": "Egypt"}]
    create(whole({"content": " 7"}), begun, extra_body={"continue_final_message": True})
    assert front.asked[-1]["continue_final_message"] and front.asked[-1]["add_generation_prompt"] is False
    for talk, more in ((begun, {}), (question("read"), {"continue_final_message": True})):
        with pytest.raises(openai.BadRequestError, match="end with the assistant"):
            create(whole({"content": "a"}), talk, extra_body=more)


def test_ends_of_the_request_are_beside_those_of_the_model(front, create):
    create(whole({"content": "a"}), extra_body={"stop_token_ids": [7], "min_p": 0.5})
    assert front.asked[-1]["stop_token_ids"] == [7] and front.asked[-1]["min_p"] == 0.5


@pytest.mark.parametrize("key, value", [("n", 17), ("n", 1.5), ("tools", {}), ("tools", "zoom"), ("response_format", "json"), ("logprobs", 1.5),
                                        ("min_p", 2), ("stop_token_ids", 5), ("top_logprobs", 21), ("presence_penalty", 3),
                                        ("echo", True), ("functions", [ZOOM]), ("guided_json", {})])  # fmt: skip
def test_what_is_wrong_or_nobody_does_is_refused_here(front, create, key, value):
    asked = len(front.asked)
    with pytest.raises(openai.BadRequestError, match=key):
        create(whole({"content": "a"}), extra_body={key: value})
    assert len(front.asked) == asked


def test_the_engine_says_what_is_wrong_with_a_schema(create):
    error = {"error": {"message": "Grammar error: Invalid type: nonsense", "type": "BadRequestError", "code": 400}}
    with pytest.raises(openai.BadRequestError, match="Invalid type: nonsense"):
        create(httpx.Response(400, json=error), response_format={"type": "json_object"})


@pytest.mark.parametrize("finish", ["abort", "error"])
def test_an_answer_that_the_engine_was_stopped_in_is_no_answer(create, finish):
    with pytest.raises(openai.InternalServerError, match="the model failed"):
        create(whole({"content": "half of i"}, finish=finish))


def test_tools_are_refused_where_the_template_would_not_tell_the_model(front, create, monkeypatch):
    monkeypatch.setattr(front.backend, "chats", {"tiny": AS_TRAINED.open(TINY)})
    for messages, more in ((None, {"tools": TOOLS}), ([*question("a"), {"role": "tool", "content": "b"}], {})):
        with pytest.raises(openai.BadRequestError, match="template writes none"):
            create(whole({"content": "a"}), messages, **more)


def test_films_are_drawn_as_their_model_was_trained(front, create, monkeypatch, tmp_path):
    """All were drawn at two frames a second, whatever the model's processor says."""
    url = f"data:video/mp4;base64,{base64.b64encode(films.write(tmp_path / 'a.mp4', count=80).read_bytes()).decode()}"
    for rate, frames in ((2.0, 16), (0.5, 4)):
        chats = {"tiny": AS_TRAINED._replace(reading=Reading(video_fps=rate)).open(TINY)}
        monkeypatch.setattr(front.backend, "chats", chats)
        create(whole({"content": "a"}), [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": url}}]}])
        sent = front.asked[-1]["messages"][0]["content"][0]
        assert len(sent["video_url"]["url"].split(",")) == 1 + frames and sent["fps"] == rate


@pytest.mark.parametrize("name, parser", [("qwen3_vl", "hermes"), ("qwen3_5", "qwen3_coder")])
def test_vllm_is_told_how_the_template_writes_calls(name, parser):
    """Source of the names: vLLM's recipes for Qwen3-VL and Qwen3.5."""
    assert tool_parser(compile_template(template_of(name))) == parser
