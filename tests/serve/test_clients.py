"""The clients that people have: dashscope, openai and langchain-openai get equal answers from one server."""

import asyncio
import itertools
import json
import os
import subprocess
import sys

import dashscope
import httpx
import langchain_openai
import openai
import pytest
from dashscope import AioMultiModalConversation, MultiModalConversation

from tests.serving import CHARTS, data_url, question, serving, tiny_engines, wait_for

KEY = "a key"
SNIPPET = '''
from dashscope import MultiModalConversation
dashscope.base_http_api_url = 'https://dashscope-intl.aliyuncs.com/api/v1'


def simple_multimodal_conversation_call():
    """Simple single round multimodal conversation call.
    """
    messages = [
        {
            "role": "user",
            "content": [
                {"image": "https://dashscope.oss-cn-beijing.aliyuncs.com/images/dog_and_girl.jpeg"},
                {"text": "这是什么?"}
            ]
        }
    ]
    responses = MultiModalConversation.call(model='qwen-vl-max',
                                           messages=messages,
                                           stream=True)
    for response in responses:
        print(response)


if __name__ == '__main__':
    simple_multimodal_conversation_call()
'''


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    engines = tiny_engines(tmp_path_factory.mktemp("adapters"))
    with serving({**engines, "qwen-vl-max": engines["tiny"]}, key=KEY, hosts=["dashscope.oss-cn-beijing.aliyuncs.com"]) as server:
        yield server


@pytest.fixture(autouse=True)
def alibaba(served, monkeypatch):
    """The dashscope package, turned to our server."""
    monkeypatch.setattr(dashscope, "base_http_api_url", f"{served.url}/api/v1")
    monkeypatch.setattr(dashscope, "api_key", KEY)


@pytest.fixture
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def call(*content, model="tiny", **more):
    messages = [{"role": "user", "content": list(content)}]
    return MultiModalConversation.call(model=model, messages=messages, max_tokens=24, **more)


def text_of(response) -> str:
    assert response.status_code == 200, response
    return response.output.choices[0].message.content[0]["text"]


def local(path) -> dict:
    return {"image": f"file://{path.resolve()}"}


@pytest.mark.parametrize("model", ["tiny", "one", "two.b"])
def test_three_clients_get_equal_answers(client, served, model):
    chart = CHARTS[3]
    first = text_of(call(local(chart), {"text": "read"}, model=model))
    messages = question("read", chart)
    second = client.chat.completions.create(model=model, messages=messages, max_tokens=24)
    chain = langchain_openai.ChatOpenAI(model=model, base_url=f"{served.url}/v1", api_key=KEY, max_tokens=24, temperature=0)
    third = chain.invoke([("user", messages[0]["content"])])
    assert first == second.choices[0].message.content == third.content
    assert second.usage.prompt_tokens == third.usage_metadata["input_tokens"]
    assert first == "".join(piece.content for piece in chain.stream([("user", messages[0]["content"])]))


def test_dashscope_streams_increments_or_the_text_so_far():
    chart = CHARTS[4]
    whole = call(local(chart), {"text": "read"})
    text = text_of(whole)
    plain = [text_of(part) for part in call(local(chart), {"text": "read"}, stream=True)]
    assert plain[-1] == text and all(later.startswith(former) for former, later in itertools.pairwise(plain))
    pieces = [text_of(part) for part in call(local(chart), {"text": "read"}, stream=True, incremental_output=True)]
    assert "".join(pieces) == text
    merged = list(call(local(chart), {"text": "read"}, stream=True, incremental_output=False))
    assert text_of(merged[-1]) == text and merged[-1].usage.input_tokens == whole.usage.input_tokens
    assert whole.usage.image_tokens > 0 and whole.output.choices[0].finish_reason in ("stop", "length")


def test_dashscope_uploads_files_whatever_their_names(tmp_path):
    chinese = tmp_path / "图表 一.png"
    chinese.write_bytes(CHARTS[5].read_bytes())
    two = call(local(chinese), local(CHARTS[6]), {"text": "Which is larger?"})
    assert text_of(two) == text_of(
        call({"image": data_url(CHARTS[5])}, {"image": data_url(CHARTS[6])}, {"text": "Which is larger?"})
    )
    film = [f"file://{CHARTS[5].resolve()}", f"file://{chinese}"]
    assert call({"video": film}, {"text": "Describe this video."}).usage.video_tokens > 0


def test_two_files_of_one_name_are_not_mixed_up(tmp_path):
    """With one permit both would have the same key: the second is refused, not put in the first's place."""
    for folder, chart in (("a", CHARTS[5]), ("b", CHARTS[6])):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "chart.png").write_bytes(chart.read_bytes())
    with pytest.raises(dashscope.common.error.UploadFileException):
        call(local(tmp_path / "a/chart.png"), local(tmp_path / "b/chart.png"), {"text": "Which is larger?"})


def test_the_asynchronous_dashscope_client():
    async def ask() -> str:
        messages = [{"role": "user", "content": [local(CHARTS[3]), {"text": "read"}]}]
        return text_of(await AioMultiModalConversation.call(model="tiny", messages=messages, max_tokens=24))

    assert asyncio.run(ask()) == text_of(call(local(CHARTS[3]), {"text": "read"}))


def test_dashscope_is_told_of_errors():
    unknown = call({"text": "hi"}, model="three")
    assert (unknown.status_code, unknown.code) == (404, "ModelNotFound") and unknown.request_id
    wrong = call({"text": "hi"}, api_key="another")
    assert (wrong.status_code, wrong.code) == (401, "InvalidApiKey")
    bad = call({"text": "hi"}, temperature=9.0)
    assert bad.status_code == 400 and "temperature" in bad.message
    assert [part.status_code for part in call({"image": "data:image/png;base64,AAAA"}, {"text": "hi"}, stream=True)] == [400]


@pytest.fixture
def breaks(served, monkeypatch):
    """The model fails once an answer has begun."""
    batcher = served.backend.batcher
    monkeypatch.setattr(batcher, "ends", set())
    step = batcher._step

    def fail(adapter, batch):
        step(adapter, batch)
        if any(len(request.ids) > 8 for request in batch.requests):
            raise RuntimeError("out of memory at 0x7f00")

    monkeypatch.setattr(batcher, "_step", fail)


def test_dashscope_is_told_of_an_error_in_the_middle_of_a_stream(breaks):
    parts = list(call({"text": "hi"}, stream=True))
    assert [part.status_code for part in parts[:-1]] == [200] * (len(parts) - 1) and len(parts) > 1
    assert (parts[-1].status_code, parts[-1].code) == (500, "InternalError") and "0x7f" not in parts[-1].message


def test_openai_is_told_of_an_error_in_the_middle_of_a_stream(breaks, client):
    heard = []
    with pytest.raises(openai.APIError, match="the model failed"):
        for part in client.chat.completions.create(model="tiny", messages=question("hi"), stream=True):
            heard.append(part)
    assert len(heard) > 1


def test_openai_streams_with_usage(client):
    messages = question("read", CHARTS[8])
    client.chat.completions.create(model="tiny", messages=messages, max_tokens=1)  # both below find it read
    whole = client.chat.completions.create(model="tiny", messages=messages, max_completion_tokens=24)
    stream = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=24, stream=True, stream_options={"include_usage": True}
    )
    parts = list(stream)
    assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices) == whole.choices[0].message.content
    assert parts[-1].usage == whole.usage and whole.usage.prompt_tokens_details.image_tokens > 0
    assert [model.id for model in client.models.list()] == ["tiny", "one", "two.b", "qwen-vl-max"]


def test_openai_asks_for_one_model(client, served):
    assert client.models.retrieve("two.b").id == "two.b"
    with pytest.raises(openai.NotFoundError, match=r"tiny, one, two\.b"):
        client.models.retrieve("qwen/three")
    assert httpx.get(f"{served.url}/compatible-mode/v1/models/one", headers={"Authorization": KEY}).json()["id"] == "one"


def test_openai_is_told_of_errors(client, served):
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="three", messages=question("hi"))
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="another").models.list()
    with pytest.raises(openai.BadRequestError, match="not a picture"):
        client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:;base64,AAAA"}}]}]
        )


def test_openai_sends_dashscopes_extras(client):
    """What extra_body holds lands beside the messages; a list of frames is a video."""
    frames = [data_url(CHARTS[3])] * 4
    parts = [{"type": "video", "video": frames, "fps": 1.0}, {"type": "text", "text": "Describe this video."}]
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": parts}], max_tokens=8, extra_body={"top_k": 1, "min_pixels": 3136}
    )
    assert answer.usage.prompt_tokens_details.model_extra["video_tokens"] > 0


def test_a_client_that_breaks_its_stream_off_stops_the_generation(served, client, monkeypatch):
    monkeypatch.setattr(served.backend.batcher, "ends", set())
    stream = client.chat.completions.create(model="tiny", messages=question("hi"), stream=True, max_tokens=4096)
    next(stream)
    stream.close()
    wait_for(lambda: not served.backend.batcher.active)


def test_the_documented_snippet_runs(served, monkeypatch, tmp_path):
    """Unchanged but for the base URL and the import that it lacks. Its picture, on an allowed host, comes from a file here."""
    asked = []

    def fetch(url, hosts, *bounds):
        asked.append((url, set(hosts)))
        return CHARTS[9].read_bytes()

    monkeypatch.setattr("qwenvl_ft.serve.open_request.fetch", fetch)
    script = tmp_path / "snippet.py"
    script.write_text("import dashscope\n" + SNIPPET.replace("https://dashscope-intl.aliyuncs.com", served.url), encoding="utf-8")
    environment = {**os.environ, "DASHSCOPE_API_KEY": KEY, "NO_PROXY": "127.0.0.1", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert said[-1]["status_code"] == 200 and said[-1]["usage"]["image_tokens"] > 0
    expected = call({"image": data_url(CHARTS[9])}, {"text": "这是什么?"})
    full = httpx.post(
        f"{served.url}/v1/chat/completions",
        headers={"Authorization": KEY},
        json={"messages": question("这是什么?", CHARTS[9])},
        timeout=60,
    )
    text = said[-1]["output"]["choices"][0]["message"]["content"][0]["text"]
    assert text == full.json()["choices"][0]["message"]["content"] and text.startswith(text_of(expected))
    assert asked == [
        ("https://dashscope.oss-cn-beijing.aliyuncs.com/images/dog_and_girl.jpeg", {"dashscope.oss-cn-beijing.aliyuncs.com"})
    ]
