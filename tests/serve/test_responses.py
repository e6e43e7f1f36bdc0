"""/v1/responses, with the real openai client: whole, streamed, with pictures and a schema; calls of tools with vLLM's words behind."""

import openai
import pytest

from qwenvl_ft.serve import responses_api
from qwenvl_ft.serve.api import FORMS, WORDS, ApiError, ChatRequest, Piece, Sampling, Usage
from tests.serving import CHARTS, data_url, question, serving, tiny_engines

ZOOM = {
    "type": "function",
    "name": "zoom",
    "parameters": {"type": "object", "properties": {"bar": {"type": "integer"}}},
    "strict": True,
}
USAGE = Usage(input=20, output=3, image=12, cached=2)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with serving(tiny_engines(tmp_path_factory.mktemp("adapters"))) as server:
        yield server


@pytest.fixture
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def shown(path, text="read") -> list[dict]:
    parts = [{"type": "input_image", "image_url": data_url(path), "detail": "auto"}, {"type": "input_text", "text": text}]
    return [{"role": "user", "content": parts}]


def test_it_says_what_the_older_dialect_says(client):
    asked = {"model": "tiny", "max_output_tokens": 24}
    whole = client.responses.create(**asked, input=shown(CHARTS[0]), instructions="be brief", metadata={"a": "b"})
    talk = [{"role": "system", "content": "be brief"}, *question("read", CHARTS[0])]
    chat = client.chat.completions.create(model="tiny", max_tokens=24, messages=talk)
    assert whole.output_text == chat.choices[0].message.content != ""
    assert whole.usage.input_tokens == chat.usage.prompt_tokens and whole.usage.output_tokens == chat.usage.completion_tokens
    length = chat.choices[0].finish_reason == "length"
    assert whole.status == ("incomplete" if length else "completed") and bool(whole.incomplete_details) is length
    assert (whole.instructions, whole.metadata, whole.max_output_tokens) == ("be brief", {"a": "b"}, 24)
    with client.responses.stream(**asked, input=shown(CHARTS[0]), instructions="be brief") as stream:
        heard = list(stream)
    kinds, final = [event.type for event in heard], heard[-1].response  # the client keeps only one that is completed
    assert final.output_text == whole.output_text and final.status == whole.status and final.usage.output_tokens
    assert kinds[:4] == ["response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        f"response.{whole.status}",
    ]
    assert set(kinds[4:-4]) == {"response.output_text.delta"}


def test_a_conversation_goes_on_with_what_was_answered(client):
    first = client.responses.create(model="tiny", input=shown(CHARTS[1]), max_output_tokens=8)
    again = [*shown(CHARTS[1]), *(item.to_dict() for item in first.output), {"role": "user", "content": "Are you sure?"}]
    second = client.responses.create(model="tiny", input=again, max_output_tokens=8)
    talk = [
        *question("read", CHARTS[1]),
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "Are you sure?"},
    ]
    assert (
        second.output_text == client.chat.completions.create(model="tiny", messages=talk, max_tokens=8).choices[0].message.content
    )
    assert second.usage.input_tokens_details.cached_tokens > 0


@pytest.mark.parametrize("key, value, why", [
    ("previous_response_id", "resp_1", "nothing is stored"), ("background", True, "while the client waits"), ("tools", [ZOOM], "tools"),
    ("tools", [{"type": "web_search"}], "web_search"), ("truncation", "auto", "left out"), ("include", ["file_search_call.results"], "include"),
    ("input", [{"role": "user", "content": [{"type": "input_file", "file_id": "1"}]}], "input_file"), ("input", [], "input"),
    ("input", [{"type": "item_reference", "id": "1"}], "item_reference"), ("max_output_tokens", 0, "max_tokens"),
    ("reasoning", {"effort": "high"}, "enable_thinking"),
])  # fmt: skip
def test_what_is_not_done_is_refused_in_words(client, key, value, why):
    with pytest.raises(openai.BadRequestError, match=why):
        client.responses.create(**{"model": "tiny", "input": "hi"} | {key: value})


def test_an_error_in_the_middle_of_a_stream_is_an_event(served, client, monkeypatch):
    batcher = served.backend.batcher
    monkeypatch.setattr(batcher, "ends", set())
    step = batcher._step

    def fail(adapter, batch):
        step(adapter, batch)
        if any(len(request.ids) > 4 for request in batch.requests):
            raise RuntimeError("out of memory")

    monkeypatch.setattr(batcher, "_step", fail)
    heard = list(client.responses.create(model="tiny", input="hi", stream=True))
    assert heard[-1].type == "error" and heard[-1].code == "model_error" and len(heard) > 3


def test_a_schema_and_tools_become_the_older_dialects():
    body = {"input": [{"role": "user", "content": "hi"}, {"type": "function_call", "call_id": "1", "name": "zoom", "arguments": "{}"},
                      {"type": "function_call", "call_id": "2", "name": "zoom", "arguments": "{}"},
                      {"type": "function_call_output", "call_id": "1", "output": "blue"}],
            "tools": [ZOOM], "tool_choice": {"type": "function", "name": "zoom"}, "parallel_tool_calls": False, "top_logprobs": 2,
            "text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "object"}, "strict": True}}}  # fmt: skip
    chat = responses_api.read_chat(body, 100, WORDS | FORMS)
    function = {key: value for key, value in ZOOM.items() if key != "type"}
    assert chat.more["tools"] == [{"type": "function", "function": function}] and chat.more["top_logprobs"] == 2
    assert chat.more["tool_choice"] == {"type": "function", "function": {"name": "zoom"}} and chat.more["logprobs"] is True
    assert chat.more["response_format"]["json_schema"] == {"name": "a", "schema": {"type": "object"}, "strict": True}
    assert chat.more["parallel_tool_calls"] is False and [call["id"] for call in chat.messages[1]["tool_calls"]] == ["1", "2"]
    assert chat.messages[2] == {"role": "tool", "tool_call_id": "1", "content": "blue"}
    with pytest.raises(ApiError, match="response_format"):
        responses_api.read_chat({"input": "hi", "text": body["text"]}, 100)


def test_there_is_one_answer_of_max_output_tokens():
    """Behind vLLM two answers came as one text, and the older dialect's bound went before."""
    with pytest.raises(ApiError, match="n is not supported"):
        responses_api.read_chat({"input": "hi", "n": 2}, 100, WORDS | FORMS)
    chat = responses_api.read_chat({"input": "hi", "n": 1, "max_output_tokens": 5, "max_completion_tokens": 50}, 100)
    assert chat.sampling.max_new_tokens == 5 and not chat.more


def test_calls_and_thoughts_are_items():
    """vLLM's pieces, read by the client's own types."""
    from openai.lib.streaming.responses._responses import ResponseStreamState
    from openai.types.responses import ResponseStreamEvent
    from pydantic import TypeAdapter

    whole = [{"id": "call_1", "type": "function", "function": {"name": "zoom", "arguments": '{"bar": 3}'}}]
    deltas = [{"reasoning": "hm"}, {}, {"tool_calls": [whole[0] | {"index": 0, "function": {"name": "zoom"}}]},
              {"tool_calls": [{"index": 0, "function": {"arguments": '{"bar": 3}'}}]}]  # fmt: skip
    chat = ChatRequest("tiny", [], Sampling(), echo={"tools": [], "tool_choice": "auto", "parallel_tool_calls": True})
    pieces = [Piece("so" if not delta else "", None, USAGE, 0, delta) for delta in deltas] + [Piece("", "tool_calls", USAGE)]
    writer, state = responses_api.EventWriter(chat, "id"), ResponseStreamState(input_tools=[], text_format=openai.omit)
    reader = TypeAdapter(ResponseStreamEvent)
    lines = "".join(event for piece in pieces for event in writer.piece(*piece)).split("\n\n")[:-1]
    numbers = []
    for line in lines:
        event = reader.validate_json(line.split("data: ", 1)[1], strict=True)
        numbers.append(event.sequence_number)
        state.handle_event(event)
    assert numbers == [*range(len(lines))]
    thought, message, call = state._completed_response.output
    assert (thought.content[0].text, message.content[0].text, call.name, call.arguments) == ("hm", "so", "zoom", '{"bar": 3}')
    at_once = [Piece("so", None, USAGE, 0, {"reasoning": "hm", "tool_calls": whole}), Piece("", "tool_calls", USAGE)]
    output = responses_api.write_whole(chat, "id", at_once)["output"]
    assert output == writer.response["output"]
    again = responses_api.read_chat({"input": [{"role": "user", "content": "hi"}, *output]}, 100, WORDS | FORMS)
    told = {"role": "assistant", "content": [{"type": "text", "text": "so"}], "tool_calls": whole}
    assert again.messages == [{"role": "user", "content": "hi"}, told], "what was answered is what the next question begins with"
