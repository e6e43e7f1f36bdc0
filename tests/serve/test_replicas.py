"""Several servers behind ours: the least busy is asked, and another where one fails before it has begun to answer."""

import asyncio
from collections import Counter

import httpx
import pytest

from qwenvl_ft.errors import UserError
from qwenvl_ft.serve.api import ApiError, Bounds, ChatRequest, Sampling
from qwenvl_ft.serve.open_request import Opener
from qwenvl_ft.serve.vllm_backend import VllmBackend

URLS = ("http://a", "http://b", "http://c")
WHOLE = {
    "choices": [{"index": 0, "message": {"content": "ok"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 1, "completion_tokens": 1},
}
BEGUN = 'data: {"choices": [{"index": 0, "delta": {"content": "half"}}]}\n\n'
CHAT = ChatRequest("tiny", [{"role": "user", "content": "hi"}], Sampling())


class Behind:
    """Servers by their hosts: what each does with a request; `asked` counts."""

    def __init__(self, monkeypatch, names=(["tiny"],) * 3):
        def listed(url, **_):
            found = names["abc".index(url.removeprefix("http://")[0])]
            return httpx.Response(200, json={"data": [{"id": name} for name in found]}, request=httpx.Request("GET", url))

        monkeypatch.setattr("qwenvl_ft.serve.vllm_backend.httpx.get", listed)
        self.backend = VllmBackend(URLS[0], Opener(Bounds()), others=URLS[1:])
        self.backend.client = httpx.AsyncClient(transport=httpx.MockTransport(self.answer))
        self.asked, self.does = Counter(), {}
        self.most = Counter()  # at a time
        self.waits_for = 0  # requests that must be here before any is answered

    async def answer(self, request: httpx.Request) -> httpx.Response:
        host = request.url.host
        self.asked[host] += 1
        here = next(replica for replica in self.backend.replicas if replica.url == f"http://{host}")
        self.most[host] = max(self.most[host], here.active)
        while self.asked.total() < self.waits_for:
            await asyncio.sleep(0.001)
        does = self.does.get(host, 200)
        if isinstance(does, Exception):
            raise does
        return does if isinstance(does, httpx.Response) else httpx.Response(does, json=WHOLE)

    async def ask(self, chat: ChatRequest = CHAT) -> str:
        return "".join([piece.text async for piece in self.backend.answer(chat, "id", 1e9)])

    def together(self, number: int) -> list:
        async def all_of_them():
            return await asyncio.gather(*(self.ask() for _ in range(number)), return_exceptions=True)

        return asyncio.run(all_of_them())


@pytest.fixture
def behind(monkeypatch):
    return Behind(monkeypatch)


def test_the_least_busy_is_asked(behind):
    behind.waits_for = 30
    assert behind.together(30) == ["ok"] * 30
    assert behind.asked == {"a": 10, "b": 10, "c": 10} and set(behind.most.values()) == {10}
    assert behind.backend.status() == {"active": 0, "replicas": 3, "alive": True}


@pytest.mark.parametrize("fails", [httpx.ConnectError("gone"), httpx.ReadError("killed"), httpx.RemoteProtocolError("killed"), 500, 503, 429,
                                   httpx.Response(200, json={"choices": [{"message": {"content": "h"}, "finish_reason": "abort"}]})])  # fmt: skip
def test_no_request_is_lost_where_one_of_them_fails(behind, fails):
    behind.does["a"] = fails
    assert behind.together(30) == ["ok"] * 30
    asked = behind.asked["a"]
    if fails == 429:  # it is full, and well
        assert behind.backend.status()["replicas"] == 3
    else:
        assert behind.backend.status()["replicas"] == 2
        behind.together(30)
        assert behind.asked["a"] == asked, "one that failed rests"
        behind.backend.replicas[0].rests_until, behind.does["a"] = 0.0, 200
        assert behind.together(30) == ["ok"] * 30 and behind.asked["a"] > asked, "and is asked again when it is back"


def test_where_all_fail_the_last_one_says_so(behind):
    behind.does |= {"a": httpx.ConnectError("gone"), "b": httpx.ConnectError("gone"), "c": 429}
    (refused,) = behind.together(1)
    assert isinstance(refused, ApiError) and refused.status in (429, 503) and behind.asked == {"a": 1, "b": 1, "c": 1}
    behind.does["c"] = httpx.ConnectError("gone")
    behind.together(1)
    assert behind.backend.status()["alive"] is False
    behind.does["b"] = 200
    assert behind.together(1) == ["ok"], "one that rests is better than none"


def test_the_callers_mistake_is_nobody_elses(behind):
    behind.does = dict.fromkeys("abc", 400)
    (refused,) = behind.together(1)
    assert refused.status == 400 and behind.asked.total() == 1 and behind.backend.status()["replicas"] == 3


@pytest.mark.parametrize("status", [500, 503])
def test_a_request_that_every_one_fails_on_puts_none_to_rest(behind, status):
    """It may be the request's fault: the server would call itself dead for it."""
    behind.does = dict.fromkeys("abc", status)
    (refused,) = behind.together(1)
    assert refused.status == 503 and behind.asked == {"a": 1, "b": 1, "c": 1}
    assert behind.backend.status() == {"active": 0, "replicas": 3, "alive": True}


def test_an_answer_that_has_begun_is_not_begun_again(behind):
    """Its beginning is with the client already."""
    behind.does = dict.fromkeys("abc", httpx.Response(200, text=BEGUN))
    chat = ChatRequest("tiny", CHAT.messages, Sampling(), stream=True)

    async def heard() -> list[str]:
        pieces = []
        with pytest.raises(ApiError, match="the model failed"):
            async for piece in behind.backend.answer(chat, "id", 1e9):
                pieces.append(piece.text)
        return pieces

    assert asyncio.run(heard()) == ["half"] and behind.asked.total() == 1


def test_servers_of_different_models_are_no_replicas(monkeypatch):
    with pytest.raises(UserError, match="http://b: serves other, and http://a serves tiny"):
        Behind(monkeypatch, (["tiny"], ["other"], ["tiny"]))


def test_the_command_takes_several(monkeypatch):
    from typer.testing import CliRunner

    from qwenvl_ft.cli import serve
    from qwenvl_ft.cli.main import app

    asked, served = [], []
    monkeypatch.setattr("qwenvl_ft.serve.vllm_backend.names_at", lambda url: asked.append(url) or ["tiny"])
    monkeypatch.setattr(serve, "_run", lambda *arguments: served.append(arguments[3]))
    done = CliRunner().invoke(app, ["serve", "--port", "0", *(f"--engine-url={url}" for url in URLS)], catch_exceptions=False)
    assert done.exit_code == 0 and asked == [*URLS] and served == [["tiny"]]
