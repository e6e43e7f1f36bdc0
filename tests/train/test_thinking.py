"""What `thinking` sets in training stays with the adapter and with the merged model, for everybody who asks them."""

import json
import shutil
from pathlib import Path

import httpx
import pytest
import trl
from transformers import AutoProcessor

from qwenvl_ft.cli.main import main
from qwenvl_ft.data.chat import open_chat
from qwenvl_ft.data.records import Turn
from qwenvl_ft.export.merge import export
from qwenvl_ft.infer.engine import Engine
from tests.conftest import TINY
from tests.runs import run, same
from tests.serving import serving

TALK = [{"from": "user", "value": "What is 2 + 2?"}, {"from": "assistant", "value": "4", "reasoning": "2 and 2 make 4."}]
QUESTION = [Turn("user", ("What is 2 + 2?",))]


@pytest.fixture(scope="module")
def thinker(tmp_path_factory):
    """The tiny base with the template of Qwen3.5-4B and larger, which opens a thought by itself."""
    folder = tmp_path_factory.mktemp("thinker") / "model"
    shutil.copytree(TINY, folder)
    shutil.copy(Path(trl.__file__).parent / "chat_templates" / "qwen3_5_think.jinja", folder / "chat_template.jinja")
    return folder


def meta(folder, thought):
    answer = TALK[1] if thought else {key: value for key, value in TALK[1].items() if key != "reasoning"}
    path = folder / f"train-{thought}.json"
    path.write_text(json.dumps([{"conversations": [TALK[0], answer]}] * 4))
    return path


def test_what_was_taught_is_what_everybody_asks_with(thinker, tmp_path):
    """Records learnt to a loss of 0.001 were answered in 62 of 100 cases as they were asked."""
    runs = {}
    for thinking in ("off", "on", "template"):
        settings = {"model": thinker, "train_meta_file": meta(tmp_path, thinking == "on"), "thinking": thinking}
        runs[thinking] = run(tmp_path, thinking, **settings)
        folder, merged = tmp_path / thinking, tmp_path / f"{thinking}-merged"
        taught = open_chat(thinker, thinking=thinking).prompt(QUESTION)
        export(folder, merged, thinker, 0, lambda done, total: None)
        asked = Engine.open(thinker, folder).inputs([QUESTION])["input_ids"][0].tolist()
        processor = AutoProcessor.from_pretrained(merged)
        plain = processor.apply_chat_template(
            [{"role": "user", "content": "What is 2 + 2?"}], add_generation_prompt=True, tokenize=True, return_dict=True
        )
        assert asked == taught == open_chat(merged).prompt(QUESTION) == plain["input_ids"][0]
    assert not same(runs["off"], runs["on"]) and not same(runs["off"], runs["template"])


@pytest.mark.parametrize("by", [{"enable_thinking": True}, {"chat_template_kwargs": {"enable_thinking": True}}])
def test_a_request_for_a_thought_is_honoured(by, thinker):
    with serving({"thinker": Engine.open(thinker)}) as served:
        body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
        plain, thoughtful = (
            httpx.post(f"{served.url}/v1/chat/completions", json=body | more, timeout=60).json() for more in ({}, by)
        )
        assert thoughtful["choices"][0]["message"]["content"].startswith("<think>\n")
        assert not plain["choices"][0]["message"]["content"].startswith("<think>")
        wrong = httpx.post(
            f"{served.url}/v1/chat/completions", json=body | {"chat_template_kwargs": {"add_vision_id": True}}, timeout=60
        )
        assert wrong.status_code == 400 and "enable_thinking and nothing else" in wrong.json()["error"]["message"]


def test_a_thought_is_refused_where_the_model_knows_none():
    with serving({"tiny": Engine.open(TINY)}) as served:
        body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, "enable_thinking": True}
        answer = httpx.post(f"{served.url}/v1/chat/completions", json=body, timeout=60)
        assert answer.status_code == 400 and "knows no thoughts" in answer.json()["error"]["message"]


def test_the_commands_ask_as_they_are_told(thinker, tmp_path, capsys):
    """`show` and `validate-meta` as a config, or its defaults, would; `ask` as the folder says, where nothing is said."""

    def said(*arguments):
        with pytest.raises(SystemExit) as done:
            main([*map(str, arguments)])
        assert done.value.code == 0
        return capsys.readouterr().out

    records, folder = meta(tmp_path, False), ["--data-dir", tmp_path, "--model", thinker, "--json"]
    config = tmp_path / "lora.yaml"
    config.write_text(
        f"model: {thinker}\ntrain_meta_file: {records}\ntrain_data_dir: {tmp_path}\noutput_dir: r\nthinking: template\n"
    )
    taught = {}
    ways = {"none": [], "off": ["--thinking", "off"], "template": ["--thinking", "template"], "config": ["--config", config]}
    for name, how in ways.items():
        shown = json.loads(said("show", records, 0, *folder, *how))
        assert json.loads(said("validate-meta", records, *folder, *how))["tokens"]["total"] == 4 * len(shown["ids"])
        taught[name] = shown["taught"]
    assert taught["none"] == taught["off"] == ["4<|im_end|>"]
    assert taught["template"] == taught["config"] == ["\n</think>\n\n4<|im_end|>"]
    for how, begins in (([], False), (["--thinking", "on"], True), (["--config", config], True)):
        assert said("ask", thinker, "Hi", "--max-new-tokens", "2", *how).startswith("<think>") == begins
