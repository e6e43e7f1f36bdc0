"""Both dialects, word for word, without a model: what is read, what is written."""

import json

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from qwenvl_ft.serve import dashscope_api, openai_api, responses_api
from qwenvl_ft.serve.api import JSON_VALUES, ApiError, Bounds, ChatRequest, Piece, Sampling, Usage, read_json, unknown_model
from qwenvl_ft.serve.app import State
from qwenvl_ft.serve.middleware import is_allowed
from qwenvl_ft.serve.uploads import FIELDS, FILE_BYTES, KEY_BYTES, Uploads, read_form

MESSAGES = [{"role": "user", "content": "hi"}]
USAGE = Usage(input=20, output=3, image=12, video=4)


@pytest.fixture(autouse=True)
def noon(monkeypatch):
    monkeypatch.setattr("qwenvl_ft.serve.openai_api.time.time", lambda: 1700000000.5)


def lines(parts) -> list[str]:
    return "".join(parts).split("\n\n")[:-1]


def refusal(act) -> ApiError:
    with pytest.raises(ApiError) as error:
        act()
    return error.value


def test_openai_is_read():
    body = {"model": "tiny", "messages": MESSAGES, "max_completion_tokens": 7, "max_tokens": 9, "temperature": 0.5, "top_p": 0.9,
            "top_k": 4, "seed": 1, "stop": "end", "stream": True, "stream_options": {"include_usage": True}, "max_pixels": 50176,
            "user": "somebody", "presence_penalty": 0, "n": 1, "tools": None, "response_format": {"type": "text"}}  # fmt: skip
    assert openai_api.read_chat(body, 100) == ChatRequest(
        "tiny", MESSAGES, Sampling(7, 0.5, 0.9, 4, 1, ("end",)), stream=True, usage_in_stream=True, max_pixels=50176
    )
    assert openai_api.read_chat({"messages": MESSAGES}, 100) == ChatRequest("", MESSAGES, Sampling(100), usage_in_stream=False)
    assert openai_api.read_chat({"messages": MESSAGES, "max_tokens": 3}, 10**6).sampling.max_new_tokens == 3
    assert openai_api.read_chat({"messages": MESSAGES}, 10**6).sampling.max_new_tokens == 1024


def test_dashscope_is_read():
    parameters = {
        "max_tokens": 7,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 4,
        "seed": 1,
        "stop": ["a", "b"],
        "repetition_penalty": 1.1,
    }
    body = {"model": "tiny", "input": {"messages": MESSAGES}, "parameters": parameters}
    expected = ChatRequest("tiny", MESSAGES, Sampling(7, 0.5, 0.9, 4, 1, ("a", "b"), 1.1), increments=False)
    assert dashscope_api.read_generation(body, 100, stream=False) == expected
    body["parameters"] = {"incremental_output": True}
    assert dashscope_api.read_generation(body, 100, stream=True) == ChatRequest("tiny", MESSAGES, Sampling(100), stream=True)
    assert dashscope_api.read_generation({"model": "tiny", "input": {}}, 9, stream=False).messages is None


@pytest.mark.parametrize("key, value", [
    ("max_tokens", 0), ("max_tokens", (1 << 20) + 1), ("max_tokens", True), ("max_tokens", 1.5), ("temperature", -1), ("temperature", "1"),
    ("temperature", float("nan")), ("top_p", 1.1), ("top_k", 0.5), ("seed", 1 << 63), ("stop", 1), ("stop", [""]), ("stop", [1]),
    ("n", 2), ("tools", [{}]), ("logprobs", True), ("presence_penalty", 0.1), ("repetition_penalty", 0), ("logit_bias", {"1": 2}),
    ("min_p", 0.1), ("stop_token_ids", [5]), ("guided_json", {"type": "object"}), ("tool_choice", "required"), ("modalities", ["audio"]),
    ("echo", True), ("enable_thinking", "yes"), ("chat_template_kwargs", {"add_vision_id": True}), ("chat_template_kwargs", 1), ("vl_high_resolution_images", True), ("mm_processor_kwargs", {"max_pixels": 9000}), ("top_logprobs", 2), ("stop", False), ("stop", {}),
    ("max_tokens", 5.5), ("max_tokens", float("inf")),
])  # fmt: skip
def test_a_wrong_parameter_is_named_in_both_dialects(key, value):
    first = refusal(lambda: openai_api.read_chat({"messages": MESSAGES, key: value}, 100))
    body = {"model": "tiny", "input": {"messages": MESSAGES}, "parameters": {key: value}}
    second = refusal(lambda: dashscope_api.read_generation(body, 100, False))
    assert first.status == second.status == 400 and key in first.message and key in second.message


def test_what_asks_for_nothing_and_whole_numbers_with_a_point_are_taken():
    idle = {"min_p": 0, "stop_token_ids": [], "guided_json": None, "tool_choice": "auto", "modalities": ["text"], "echo": False,
            "enable_thinking": False, "vl_high_resolution_images": False, "top_logprobs": 0, "stop": None, "mm_processor_kwargs": {}}  # fmt: skip
    assert openai_api.read_chat({"messages": MESSAGES, "max_tokens": 5.0, **idle}, 100).sampling == Sampling(5)
    body = {"model": "tiny", "input": {"messages": MESSAGES}, "parameters": {"max_tokens": 5.0, **idle}}
    assert dashscope_api.read_generation(body, 100, False).sampling == Sampling(5)
    assert "from 1 to 1048576" in refusal(lambda: openai_api.read_chat({"messages": MESSAGES, "max_tokens": 1 << 21}, 100)).message


def test_more_tokens_than_an_answer_may_have_are_capped():
    """They were refused, and clients that ask for 100,000 by default got no answer at all."""
    for asked, sampling in ((100, Sampling(100)), (101, Sampling(100, capped=True)), (1 << 20, Sampling(100, capped=True))):
        assert openai_api.read_chat({"messages": MESSAGES, "max_tokens": asked}, 100).sampling == sampling
        body = {"model": "tiny", "input": {"messages": MESSAGES}, "parameters": {"max_tokens": asked}}
        assert dashscope_api.read_generation(body, 100, False).sampling == sampling
    read = responses_api.read_chat({"input": "hi", "max_output_tokens": 500}, 100)
    assert read.sampling == Sampling(100, capped=True) and read.echo["max_output_tokens"] == 100


@pytest.mark.parametrize("value", [1, 0, "true", []])
def test_whether_to_stream_is_true_or_false(value):
    """1 equals True, but was answered as if it were False."""
    assert refusal(lambda: openai_api.read_chat({"messages": MESSAGES, "stream": value}, 100)).status == 400
    body = {"model": "tiny", "input": {"messages": MESSAGES}, "parameters": {"incremental_output": value}}
    assert refusal(lambda: dashscope_api.read_generation(body, 100, True)).status == 400


@pytest.mark.parametrize("parameters", [[], 0, "", False])
def test_dashscopes_parameters_are_an_object(parameters):
    body = {"model": "tiny", "input": {"messages": MESSAGES}, "parameters": parameters}
    assert refusal(lambda: dashscope_api.read_generation(body, 100, False)).status == 400


def test_openais_newer_words_are_understood():
    """`developer` is what OpenAI's newer clients call the system; null stands where an assistant said nothing."""
    sent = [{"role": "developer", "content": "be brief"}, *MESSAGES, {"role": "assistant", "content": None, "tool_calls": []}, 5]
    read = openai_api.read_chat({"messages": sent}, 100).messages
    assert read[0] == {"role": "system", "content": "be brief"} and read[1:2] == MESSAGES
    assert read[2]["content"] == "" and read[3] == 5 and sent[0]["role"] == "developer"
    assert openai_api.read_chat({"messages": "hi"}, 100).messages == "hi"
    called = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    assert "tool_calls" in refusal(lambda: openai_api.read_chat({"messages": [*MESSAGES, called]}, 100)).message


def test_openai_is_written():
    answer = openai_api.write_whole(ChatRequest("tiny", MESSAGES, Sampling()), "id", [Piece("größe", "stop", USAGE)])
    assert answer == {
        "id": "chatcmpl-id", "object": "chat.completion", "created": 1700000000, "model": "tiny",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "größe"}, "finish_reason": "stop", "logprobs": None}],
        "usage": {"prompt_tokens": 20, "completion_tokens": 3, "total_tokens": 23,
                  "prompt_tokens_details": {"text_tokens": 4, "image_tokens": 12, "video_tokens": 4, "cached_tokens": 0}},
    }  # fmt: skip


def test_openai_is_streamed():
    stream = openai_api.EventWriter(ChatRequest("tiny", MESSAGES, Sampling(), stream=True, usage_in_stream=True), "id")
    head = '{"id": "chatcmpl-id", "object": "chat.completion.chunk", "created": 1700000000, "model": "tiny", '
    parts = lines([*stream.piece("a\n", None, USAGE), *stream.piece("", None, USAGE), *stream.piece("b", "length", USAGE)])
    rest = '"logprobs": null}], "usage": null}'
    assert parts[:4] == [
        f'data: {head}"choices": [{{"index": 0, "delta": {{"role": "assistant", "content": ""}}, "finish_reason": null, {rest}',
        f'data: {head}"choices": [{{"index": 0, "delta": {{"content": "a\\n"}}, "finish_reason": null, {rest}',
        f'data: {head}"choices": [{{"index": 0, "delta": {{"content": "b"}}, "finish_reason": null, {rest}',
        f'data: {head}"choices": [{{"index": 0, "delta": {{}}, "finish_reason": "length", {rest}',
    ]
    assert json.loads(parts[4][6:])["usage"] == openai_api.write_usage(USAGE) and json.loads(parts[4][6:])["choices"] == []
    assert parts[5:] == ["data: [DONE]"]
    plain = openai_api.EventWriter(ChatRequest("tiny", MESSAGES, Sampling(), stream=True, usage_in_stream=False), "id")
    assert "usage" not in "".join(plain.piece("b", "stop", USAGE))
    failed = lines(stream.fail(ApiError(504, "timeout", "too slow")))
    assert failed == [
        'data: {"error": {"message": "too slow (request id)", "type": "server_error", "param": null, "code": "timeout"}}'
    ]


def test_dashscope_is_written():
    answer = dashscope_api.write_answer(ChatRequest("tiny", MESSAGES, Sampling()), "id", "größe", "stop", USAGE)
    assert answer == {
        "output": {"choices": [{"message": {"role": "assistant", "content": [{"text": "größe"}]}, "finish_reason": "stop"}]},
        "usage": {"input_tokens": 20, "output_tokens": 3, "total_tokens": 23, "image_tokens": 12, "video_tokens": 4,
                  "input_tokens_details": {"text_tokens": 4, "image_tokens": 12, "video_tokens": 4},
                  "output_tokens_details": {"text_tokens": 3}},
        "request_id": "id",
    }  # fmt: skip


@pytest.mark.parametrize("increments, texts", [(False, ["a", "ab"]), (True, ["a", "b"])])
def test_dashscope_is_streamed(increments, texts):
    chat = ChatRequest("tiny", MESSAGES, Sampling(), stream=True, increments=increments)
    stream = dashscope_api.EventWriter(chat, "id")
    parts = lines([*stream.piece("a", None, USAGE), *stream.piece("", None, USAGE), *stream.piece("b", "stop", USAGE)])
    written = [dashscope_api.write_answer(chat, "id", text, end, USAGE) for text, end in zip(texts, ("null", "stop"), strict=True)]
    assert parts == [
        f"id:{number}\nevent:result\n:HTTP_STATUS/200\ndata:{json.dumps(body, ensure_ascii=False)}"
        for number, body in enumerate(written, 1)
    ]
    failed = "".join(stream.fail(ApiError(500, "model_error", "the model failed")))
    assert failed == (
        'event:error\nstatus:500\ndata:{"code": "InternalError", "message": "the model failed", "request_id": "id"}\n\n'
    )


@pytest.mark.parametrize("status, kind, code", [
    (400, "invalid_request_error", "InvalidParameter"), (401, "authentication_error", "InvalidApiKey"), (404, "not_found_error", "ModelNotFound"),
    (413, "invalid_request_error", "InvalidParameter"), (429, "rate_limit_error", "Throttling"), (500, "server_error", "InternalError"),
    (504, "server_error", "RequestTimeOut"),
])  # fmt: skip
def test_errors_in_both_dialects(status, kind, code):
    error = ApiError(status, "a_code", "what is wrong")
    assert openai_api.write_error(error, "id")["error"] == {
        "message": "what is wrong (request id)", "type": kind, "param": None, "code": "a_code"
    }  # fmt: skip
    assert dashscope_api.write_error(error, "id") == {"code": code, "message": "what is wrong", "request_id": "id"}


def test_a_path_that_is_none_is_no_model_that_is_none():
    wrong, unknown = ApiError(404, "not_found", "nothing here"), unknown_model(["tiny", "one"])
    assert dashscope_api.write_error(wrong, "id")["code"] == "InvalidURL"
    assert dashscope_api.write_error(unknown, "id")["code"] == "ModelNotFound" and "tiny, one" in unknown.message


def test_models_are_listed():
    model = {"object": "model", "created": 0, "owned_by": "qwenvl_ft"}
    assert openai_api.write_models(["a", "b"]) == {"object": "list", "data": [{"id": "a", **model}, {"id": "b", **model}]}


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[" * 100_000, b'"\\ud800"', b'"\xed\xa0\x80"', b"9" * 10_000, b'{"a": 1}{'])
def test_what_is_no_json_is_refused(body):
    assert refusal(lambda: read_json(body)).code == "invalid_json"


def test_millions_of_values_are_not_even_read(monkeypatch):
    """A body of 32 MiB of [] kept every other request waiting for eight seconds: json holds the interpreter's lock."""
    for value in (b"[]", b"{}", b"1", b'""'):
        body = b"[" + b",".join([value] * 8_000_000) + b"]"
        monkeypatch.setattr("json.loads", None)
        assert "values" in refusal(lambda body=body: read_json(body)).message
        monkeypatch.undo()
    assert len(read_json(b"[" + b",".join([b"1"] * (JSON_VALUES // 2)) + b"]")) == JSON_VALUES // 2


def test_json_is_read():
    assert read_json('\ufeff{"a": "größe \\ud83d\\ude00"}'.encode()) == {"a": "größe 😀"}


@pytest.mark.parametrize("header, right", [
    ("key", True), ("Bearer key", True), ("bearer  key ", True), ("Bearer", False), ("", False), (None, False), ("Bearer kez", False),
    ("Basic key", False), ("key key", False), ("KEY", False), ("ké", False),
])  # fmt: skip
def test_keys(header, right):
    assert is_allowed(header, "key") is right


def form(**fields: bytes) -> bytes:
    return b"".join(
        b'--X\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n' % (name.encode(), value) for name, value in fields.items()
    )


def test_a_form_is_read_to_the_byte(monkeypatch):
    content = b"\x89PNG\r\n\r\n--Y\r\n\x00"
    fields = read_form(form(key="uploads/图表.png".encode(), file=content) + b"--X--\r\n", 'multipart/form-data; boundary="X"')
    assert fields == {"key": "uploads/图表.png".encode(), "file": content}
    assert read_form(form(file=content).replace(b'"file"', b"file") + b"--X--\r\n", "multipart/form-data; boundary=X") == {
        "file": content
    }
    big = content * 100_000  # python-multipart puts a file of more than a MiB onto the disk unless it is told not to
    named = form(file=big).replace(b'"file"', b'"file"; filename="a.png"') + b"--X--\r\n"
    monkeypatch.setattr("tempfile.NamedTemporaryFile", None)
    assert read_form(named, "multipart/form-data; boundary=X") == {"file": big}
    assert read_form(named[:-20], "multipart/form-data; boundary=X") == {}, "half a file is none"
    for body, kind in ((b"", "application/json"), (b"key=a", "application/x-www-form-urlencoded"), (named, "multipart/form-data")):
        assert refusal(lambda body=body, kind=kind: read_form(body, kind)).status == 400
    endless = b"--X\r\nContent-Disposition: " + b"a" * 10**6
    assert refusal(lambda: read_form(endless, "multipart/form-data; boundary=X")).status == 400
    many = form(**{f"f{number}": b"" for number in range(FIELDS)}) + b"--X--\r\n"
    assert refusal(lambda: read_form(many, "multipart/form-data; boundary=X")).status == 400


def test_uploads_are_kept_for_their_time_and_within_their_size():
    now = [0.0]
    uploads = Uploads(max_bytes=10 + 2 * (len("uploads/100-/a") + 32 + FILE_BYTES), seconds=100, clock=lambda: now[0])
    folder, signature = uploads.permit()
    uploads.check(folder, signature)
    for name, size in (("a", 6), ("b", 3), ("c", 4)):
        now[0] += 1
        uploads.put(folder, {"key": f"{folder}/{name}".encode(), "file": name.encode() * size})
    assert uploads.get(f"oss://{folder}/a") is None  # given up for c
    assert uploads.get(f"oss://{folder}/b") == b"bbb" and uploads.get(f"oss://{folder}/c") == b"cccc"
    assert refusal(lambda: uploads.put(folder, {"key": f"{folder}/c".encode(), "file": b"x"})).status == 409
    assert refusal(lambda: uploads.put(folder, {"key": b"uploads/elsewhere/a", "file": b"x"})).status == 400
    assert refusal(lambda: uploads.check(folder, signature[:-1] + "x")).status == 403
    assert refusal(lambda: uploads.check(folder.replace("uploads/1", "uploads/9"), signature)).status == 403
    now[0] += 100
    assert refusal(lambda: uploads.check(folder, signature)).status == 403
    assert uploads.get(f"oss://{folder}/b") is None


def test_keys_count_and_have_an_end():
    """Sixty files of one byte, each with a key of 31 MiB, were 4.4 GB of memory: only the files' own bytes were counted."""
    uploads = Uploads(max_bytes=50 * FILE_BYTES)
    folder, _ = uploads.permit()
    long = f"{folder}/{'x' * KEY_BYTES}".encode()
    assert refusal(lambda: uploads.put(folder, {"key": long, "file": b"x"})).status == 400
    assert refusal(lambda: uploads.put(folder, {"key": f"{folder}/{'图' * 200}".encode(), "file": b"x"})).status == 400
    for number in range(200):
        uploads.put(folder, {"key": f"{folder}/{number}".encode(), "file": b""})
    assert 0 < len(uploads.files) < 50 and uploads.get(f"oss://{folder}/199") == b""
    while uploads.files:
        uploads.held_bytes -= len(key := next(iter(uploads.files))) + len(uploads.files.pop(key)[1]) + FILE_BYTES
    assert uploads.held_bytes == 0


def test_a_file_that_does_not_fit_is_refused_and_drives_no_other_out():
    """It was answered with 200, and nothing was left, itself included."""
    uploads = Uploads(max_bytes=10_000)
    folder, _ = uploads.permit()
    uploads.put(folder, {"key": f"{folder}/a".encode(), "file": b"a"})
    assert refusal(lambda: uploads.put(folder, {"key": f"{folder}/b".encode(), "file": b"b" * 10_000})).status == 413
    assert uploads.get(f"oss://{folder}/a") == b"a"


def test_metrics_are_what_prometheus_reads():
    """The names and labels are those that people scrape."""

    class Idle:
        def status(self):
            return {"active": 1, "alive": True}

    state = State(Idle(), Bounds(), 8)
    state.requests.labels("openai", 200).inc(2)
    state.count_answer(0.3, USAGE)
    families = text_string_to_metric_families(generate_latest(state.registry).decode())
    read = {(sample.name, *sample.labels.values()): (family.type, sample.value) for family in families for sample in family.samples}
    assert read["qwenvl_requests_total", "openai", "200"] == ("counter", 2)
    assert read["qwenvl_tokens_total", "input"] == ("counter", 20) and read["qwenvl_tokens_total", "output"] == ("counter", 3)
    buckets = [read["qwenvl_answer_seconds_bucket", le][1] for le in ("0.25", "0.5", "120.0", "+Inf")]
    assert buckets == [0, 1, 1, 1] and read["qwenvl_answer_seconds_sum",] == ("histogram", 0.3)
    assert read["qwenvl_answer_seconds_count",] == ("histogram", 1)
    assert read["qwenvl_active",] == read["qwenvl_alive",] == ("gauge", 1) and read["qwenvl_requests_now",] == ("gauge", 0)
