"""Adapters that come and go while the server runs: with the admin key, by the built-in engine, and passed on to vLLM."""

import asyncio
import threading
from functools import partial
from pathlib import Path

import httpx
import pytest

from qwenvl_ft.infer.engine import Engine, check_folders, open_adapter, open_beside
from qwenvl_ft.serve.api import ApiError, Bounds
from qwenvl_ft.serve.app import make_app
from qwenvl_ft.serve.open_request import Opener
from qwenvl_ft.serve.transformers_backend import TransformersBackend
from qwenvl_ft.serve.vllm_backend import VllmBackend
from tests.conftest import TINY
from tests.serving import CHARTS, Served, question, random_adapter, serving, wait_for

LOAD, UNLOAD, CHAT = "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/chat/completions"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    parent = tmp_path_factory.mktemp("adapters")
    return {name: random_adapter(TINY, parent / name, seed) for seed, name in enumerate(("one", "two"))}


@pytest.fixture(scope="module")
def served():
    """The tiny base alone."""
    engine, opener = open_beside(TINY, {})[None], Opener(Bounds())

    def opens(beside, folder, slot):
        check_folders(TINY, [folder])
        return open_adapter(beside, TINY, folder, slot)

    backend = TransformersBackend({"tiny": engine}, opener, 4, opens=opens)
    served = Served(make_app(backend, opener, 8, admin_key="admin"), backend)
    yield served
    served.stop()
    served.thread.join(30)


def change(served, path: str, key: str = "admin", **body) -> httpx.Response:
    return httpx.post(served.url + path, json=body, headers={"Authorization": f"Bearer {key}"}, timeout=60)


def ask(served, model: str, **more) -> httpx.Response:
    body = {"model": model, "messages": question("read", CHARTS[0]), "max_tokens": 16, **more}
    return httpx.post(served.url + CHAT, json=body, timeout=60)


def said(answer: httpx.Response) -> str:
    return answer.json()["choices"][0]["message"]["content"]


def names(served) -> list[str]:
    return [model["id"] for model in httpx.get(served.url + "/v1/models").json()["data"]]


def test_an_adapter_comes_answers_as_it_does_alone_and_goes(served, folders):
    base = said(ask(served, "tiny"))
    alone = {name: Engine.open(TINY, folder).ask(question("read", CHARTS[0]), 16) for name, folder in folders.items()}
    for name, folder in folders.items():  # the name means other weights then, and what was read for the first is not theirs
        assert change(served, LOAD, lora_name="first", lora_path=str(folder)).json()["models"] == ["tiny", "first"] == names(served)
        assert said(ask(served, "first")) == alone[name] != base
        assert said(ask(served, "tiny")) == base, "the base is as it was"
        assert change(served, UNLOAD, lora_name="first").status_code == 200 and names(served) == ["tiny"]
        assert ask(served, "first").status_code == 404
    for name, folder in folders.items():
        change(served, LOAD, lora_name=name, lora_path=str(folder))
    assert said(ask(served, "two")) == alone["two"]
    change(served, UNLOAD, lora_name="two")
    assert (said(ask(served, "tiny")), said(ask(served, "one"))) == (base, alone["one"]), "one of two is gone"
    change(served, UNLOAD, lora_name="one")


def test_what_was_asked_of_it_is_answered_before_it_goes(served, folders, monkeypatch):
    change(served, LOAD, lora_name="first", lora_path=str(folders["one"]))
    monkeypatch.setattr(served.backend.batcher, "ends", set())
    answers = []
    asking = threading.Thread(target=lambda: answers.append(ask(served, "first", max_tokens=120)))
    asking.start()
    wait_for(lambda: served.backend.batcher.active)
    assert change(served, UNLOAD, lora_name="first").status_code == 200
    asking.join(60)
    assert answers[0].status_code == 200 and answers[0].json()["usage"]["completion_tokens"] == 120
    assert said(ask(served, "tiny"))


def test_only_the_admin_changes_adapters(served, folders):
    body = {"lora_name": "first", "lora_path": str(folders["one"])}
    for key in ("none", "wrong"):
        assert change(served, LOAD, key, **body).status_code == 401
    assert names(served) == ["tiny"]
    with serving({"tiny": served.backend.engines["tiny"]}, key="key") as shut:  # no admin key: there is nothing at these paths
        assert change(shut, LOAD, "key", **body).status_code == 404 and change(shut, LOAD, "admin", **body).status_code == 401


def test_a_prefix_sent_twice_leads_to_no_adapter(monkeypatch):
    """One was left out before the key was chosen and the other after it: whoever may ask took adapters away."""
    vllm = Vllm(monkeypatch)
    served = Served(make_app(vllm.backend, vllm.backend.opener, 8, "key", "/api/predict/n", admin_key="admin"), vllm.backend)
    body, once = {"lora_name": "first", "lora_path": "/adapters/first"}, f"/api/predict/n{LOAD}"
    answers = [
        change(served, path, key, **body) for path, key in ((f"/api/predict/n{once}", "key"), (once, "key"), (once, "admin"))
    ]
    served.stop()
    served.thread.join(30)
    assert [answer.status_code for answer in answers] == [404, 401, 200] and vllm.asked == [("a", LOAD), ("b", LOAD)]


@pytest.mark.parametrize("path, body, word", [
    (LOAD, {"lora_name": "tiny", "lora_path": "x"}, "served already"), (LOAD, {"lora_name": "a", "lora_path": "/no/such"}, "adapter_config.json"),
    (LOAD, {"lora_name": "a"}, "lora_path"), (LOAD, {"lora_name": 5, "lora_path": "x"}, "lora_name"), (UNLOAD, {"lora_name": "nobody"}, "no adapter"),
    (UNLOAD, {"lora_name": "tiny"}, "no adapter"),
])  # fmt: skip
def test_what_is_wrong_is_said(served, path, body, word):
    answer = change(served, path, **body)
    assert answer.status_code in (400, 404) and word in answer.json()["error"]["message"]
    assert names(served) == ["tiny"]


class Vllm:
    """Two replicas that change their adapters as vLLM does; `refuses` is the host of one that does not."""

    def __init__(self, monkeypatch):
        listed = httpx.Response(200, json={"data": [{"id": "tiny"}]}, request=httpx.Request("GET", "http://a"))
        monkeypatch.setattr("qwenvl_ft.serve.vllm_backend.httpx.get", lambda *_, **__: listed)
        self.backend = VllmBackend("http://a", Opener(Bounds()), others=["http://b"])
        self.backend.client = httpx.AsyncClient(transport=httpx.MockTransport(self.answer))
        self.asked, self.refuses, self.status = [], "", 400

    async def answer(self, request: httpx.Request) -> httpx.Response:
        self.asked.append((request.url.host, request.url.path))
        await asyncio.sleep(0)  # the others' turn
        if request.url.host == self.refuses:
            return httpx.Response(
                self.status, json={"error": {"message": "rank 64 is above max_lora_rank"} if self.status == 400 else {}}
            )
        return httpx.Response(200, text="Success: LoRA adapter added successfully.")


def test_every_replica_of_vllm_is_told_or_none(monkeypatch):
    vllm = Vllm(monkeypatch)
    run = partial(asyncio.run)
    run(vllm.backend.load_adapter("first", "/adapters/first"))
    assert vllm.backend.names == ["tiny", "first"] and vllm.asked == [("a", LOAD), ("b", LOAD)]
    run(vllm.backend.unload_adapter("first"))
    assert vllm.backend.names == ["tiny"] and vllm.asked[2:] == [("a", UNLOAD), ("b", UNLOAD)]
    vllm.refuses = "b"
    with pytest.raises(ApiError, match="max_lora_rank"):
        run(vllm.backend.load_adapter("second", "/adapters/second"))
    assert vllm.backend.names == ["tiny"] and vllm.asked[-1] == ("a", UNLOAD), "the first gives it up again"
    vllm.status = 404
    with pytest.raises(ApiError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
        run(vllm.backend.load_adapter("second", "/adapters/second"))


def test_of_two_who_bring_an_adapter_of_one_name_one_does(monkeypatch, served, folders):
    """Both did, and one of the two was never given up."""

    async def both(backend, folder: str) -> None:
        for change, given, code in (("load", (folder,), "exists"), ("unload", (), "model_not_found")):
            twice = [getattr(backend, f"{change}_adapter")("first", *given) for _ in range(2)]
            done, refused = await asyncio.gather(*twice, return_exceptions=True)
            assert done is None and isinstance(refused, ApiError) and refused.code == code
            assert backend.names == (["tiny", "first"] if change == "load" else ["tiny"])

    vllm = Vllm(monkeypatch)
    asyncio.run(both(vllm.backend, "/adapters/first"))
    assert vllm.asked == [("a", LOAD), ("b", LOAD), ("a", UNLOAD), ("b", UNLOAD)], "nobody is asked for what is not here"
    asyncio.run(both(served.backend, str(folders["one"])))
