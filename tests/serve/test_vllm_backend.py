"""Another server behind ours: one of our own, which speaks OpenAI's dialect as vLLM does."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from qwenvl_ft.data.geometry import Limits, resized
from qwenvl_ft.data.records import Turn
from qwenvl_ft.errors import UserError
from qwenvl_ft.infer.messages import read_messages
from qwenvl_ft.serve.api import ApiError, Bounds
from qwenvl_ft.serve.app import make_app
from qwenvl_ft.serve.open_request import Opener
from qwenvl_ft.serve.vllm_backend import VllmBackend, end, sized, write_message
from tests.conftest import TINY
from tests.serving import CHARTS, Running, Served, data_url, events, question, random_adapter, serving, tiny_engines, wait_for

CHAT = "/v1/chat/completions"
GENERATION = "/api/v1/services/aigc/multimodal-generation/generation"


@pytest.fixture(scope="module")
def behind(tmp_path_factory):
    with serving(tiny_engines(tmp_path_factory.mktemp("adapters"))) as server:
        yield server


@pytest.fixture(scope="module")
def front(behind):
    opener = Opener(Bounds(pictures=4))
    backend = VllmBackend(behind.url, opener)
    served = Served(make_app(backend, opener, 8), backend)
    yield served
    served.stop()
    served.thread.join(30)


def ask(served, messages, model="tiny", **more):
    return httpx.post(served.url + CHAT, json={"model": model, "messages": messages, "max_tokens": 24, **more}, timeout=60)


FRAMES = [{"role": "user", "content": [{"type": "video", "video": [data_url(CHARTS[2])] * 4, "fps": 2.0}, {"text": "read"}]}]


@pytest.mark.parametrize("messages", [question("read", CHARTS[0]), question("Which?", *CHARTS[:2]), question("hi"), FRAMES])
@pytest.mark.parametrize("model", ["tiny", "one"])
def test_it_answers_what_the_server_behind_it_answers(front, behind, messages, model):
    ask(behind, messages, model)  # from here on it has read the prompt, and says so
    through, straight = (ask(served, messages, model).json() for served in (front, behind))
    for key in ("choices", "usage"):
        assert through[key] == straight[key]
    streamed = events(ask(front, messages, model, stream=True, stream_options={"include_usage": True}).text)
    text = "".join(part["choices"][0]["delta"].get("content", "") for part in streamed[:-1])
    assert text == straight["choices"][0]["message"]["content"] and streamed[-1]["usage"] == straight["usage"]


def test_dashscope_before_openai(front, behind):
    body = {
        "model": "tiny",
        "input": {"messages": [{"role": "user", "content": [{"image": data_url(CHARTS[0])}, {"text": "read"}]}]},
    }
    answers = [httpx.post(served.url + GENERATION, json=body, timeout=60).json() for served in (front, behind)]
    assert answers[0]["output"] == answers[1]["output"] and answers[0]["usage"] == answers[1]["usage"]


def test_bounds_hold_before_the_other_server_is_asked(front, behind):
    asked = behind.metric('qwenvl_tokens_total{kind="input"}')
    for messages in (question("hi", *CHARTS[:5]), [{"role": "user", "content": [{"image": "/etc/passwd"}]}]):
        assert ask(front, messages).status_code == 400
    unknown = ask(front, question("hi"), model="another")
    assert unknown.status_code == 404 and "tiny, one, two.b" in unknown.json()["error"]["message"]
    assert behind.metric('qwenvl_tokens_total{kind="input"}') == asked


def test_a_client_that_goes_away_stops_the_generation_behind(front, behind, monkeypatch):
    monkeypatch.setattr(behind.backend.batcher, "ends", set())
    with httpx.stream("POST", front.url + CHAT, json={"messages": question("hi"), "max_tokens": 4096, "stream": True}) as answer:
        next(answer.iter_lines())
    wait_for(lambda: not behind.backend.batcher.active)


def test_errors_behind_have_no_words_here(front, behind, monkeypatch):
    def fails(adapter, batch):
        raise RuntimeError("out of memory at 0x7f00")

    monkeypatch.setattr(behind.backend.batcher, "_step", fails)
    assert ask(front, question("hi")).status_code in (500, 503)
    assert [event.get("error", {}).get("code") for event in events(ask(front, question("hi"), stream=True).text)][
        -1
    ] == "model_error"


def test_control_tokens_go_on_as_text_and_pictures_as_they_were():
    written = write_message(Turn("user", ("<|im_end|> <|not a token", *read_messages(question("read", CHARTS[0]))[0].parts)))
    assert "<|im_end|>" not in written["content"][0]["text"] and "<|not a token" in written["content"][0]["text"]
    again = read_messages([written])[0].parts[1].source
    assert again.tobytes() == read_messages(question("read", CHARTS[0]))[0].parts[0].source.tobytes()
    assert write_message(Turn("system", ("a", "b"))) == {"role": "system", "content": "ab"}


def test_pictures_go_on_at_the_size_of_their_bounds_and_of_their_adapters_training():
    whole, (small,) = (
        read_messages([{"role": "user", "content": [{"image": data_url(CHARTS[0])} | bounds]}])[0].parts
        for bounds in ({}, {"max_pixels": 50_000})
    )
    (whole,) = whole
    base, trained = Limits(14, 2, 3_136, 200_704), Limits(14, 2, 3_136, 40_000)
    assert sized(whole, base, base) is whole and sized(whole, None, None) is whole and sized("text", base, base) == "text"
    for part, limits, most in ((whole, trained, 40_000), (small, base, 50_000), (small, trained, 40_000)):
        image = sized(part, limits, base).source
        own = Limits(14, 2, 3_136, most)
        assert image.size[::-1] == resized(whole.height, whole.width, own)
        assert resized(image.height, image.width, base) == image.size[::-1], "vLLM's own processor leaves it alone"
    larger = Limits(14, 2, 3_136, 150_000)
    with pytest.raises(ApiError, match="the engine's own limits would change that"):
        sized(read_messages(question("read", CHARTS[0]))[0].parts[0], larger, trained)
    for part, limits in ((small, None), (replace(small, max_pixels=9), base)):
        with pytest.raises(ApiError, match="max_pixels"):
            sized(part, limits, base)


def test_no_server_behind():
    with pytest.raises(UserError, match="does not list models"):
        VllmBackend("http://127.0.0.1:1", Opener(Bounds()))


STAND_IN = """#!{python}
# Takes vLLM's arguments, lists a model and answers every question with the same words.
import json, os, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Answers(BaseHTTPRequestHandler):
    def do_GET(self):
        self.say(json.dumps(dict(data=[dict(id=name) for name in sys.argv[8:9]])))

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        chunks = [dict(choices=[dict(delta=dict(content="a bar\u2028chart"))]), dict(choices=[dict(delta={{}}, finish_reason="stop")]),
                  dict(choices=[], usage=dict(prompt_tokens=9, completion_tokens=3))]
        self.say("".join("data: " + json.dumps(chunk, ensure_ascii=False) + "\\n\\n" for chunk in chunks) + "data: [DONE]\\n\\n")

    def say(self, text):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass

with open({log!r}, "w") as log:
    json.dump([os.getpid(), *sys.argv[1:]], log)
ThreadingHTTPServer(("127.0.0.1", int(sys.argv[6])), Answers).serve_forever()
"""


def stand_in(folder, text):
    """A stand-in for vLLM's program, which is not installed here; its environment."""
    program = folder / "vllm"
    program.write_text(text.format(python=sys.executable, log=str(folder / "log")), encoding="utf-8")
    program.chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


def test_vllm_is_started_and_stopped_as_it_is_installed(tmp_path):
    environment, log = stand_in(tmp_path, STAND_IN), tmp_path / "log"
    adapter = random_adapter(TINY, tmp_path / "adapter", 1)
    environment |= {"HTTP_PROXY": "http://127.0.0.1:1", "ALL_PROXY": "http://127.0.0.1:1"}  # for the internet, not for the engine
    arguments = ["--engine", "vllm", "--name", "chart", "--adapter", f"demo={adapter}", "--engine-arg=--enforce-eager"]
    with Running(*arguments, env=environment) as running:
        answer = httpx.post(running.url + CHAT, json={"messages": question("read", CHARTS[0]), "max_tokens": 4}, timeout=60).json()
        assert answer["model"] == "chart" and answer["choices"][0]["message"]["content"] == "a bar\u2028chart"
        assert answer["usage"]["total_tokens"] == 12
        process, *arguments = json.loads(log.read_text())
        port = arguments[5]
        assert arguments == ["serve", "data/tiny", "--host", "127.0.0.1", "--port", port, "--served-model-name", "chart",
                             "--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"demo={adapter}",
                             "--enforce-eager"]  # fmt: skip
        running.stop()
        wait_for(lambda: not Path(f"/proc/{process}").exists())


STUBBORN = """#!{python}
# Never comes up, and does not end when it is asked to.
import os, signal, subprocess, time

def asked(*_):
    with open({log!r}, "a") as log:
        log.write("asked ")

signal.signal(signal.SIGTERM, asked)
worker = subprocess.Popen(["sleep", "600"])
with open({log!r}, "w") as log:
    log.write(f"{{os.getpid()}} {{worker.pid}} ")
while True:
    time.sleep(0.1)
"""


def runs(process: str) -> bool:
    status = Path(f"/proc/{process}/stat")
    return status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z"


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_vllm_that_is_still_starting_ends_with_the_server(tmp_path, number, code):
    """It is asked first; a second signal does not leave it, or a worker of its, behind."""
    environment, log = stand_in(tmp_path, STUBBORN), tmp_path / "log"
    command = [str(Path(sys.executable).parent / "qwenvl-ft"), "serve", "data/tiny", "--port", "0", "--engine", "vllm"]
    server = subprocess.Popen(command, env=os.environ | environment)
    wait_for(lambda: log.is_file() and log.read_text().endswith(" "), 60)
    server.send_signal(number)
    wait_for(lambda: "asked" in log.read_text())
    server.terminate()
    assert server.wait(10) == code
    wait_for(lambda: not any(map(runs, log.read_text().split()[:2])))


def test_vllm_that_does_not_end_is_killed(tmp_path, monkeypatch):
    """The server waited for it without an end."""
    monkeypatch.setattr("qwenvl_ft.serve.vllm_backend.STOP_SECONDS", 0.3)
    stand_in(tmp_path, STUBBORN)
    process = subprocess.Popen([tmp_path / "vllm"], start_new_session=True)
    log = tmp_path / "log"
    wait_for(lambda: log.is_file() and log.read_text().endswith(" "))
    end(process)
    assert "asked" in log.read_text() and process.returncode == -signal.SIGKILL
    wait_for(lambda: not any(map(runs, log.read_text().split()[:2])))
