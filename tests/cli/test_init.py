"""`init` as somebody meets it who has an empty folder and nothing else."""

import json
from pathlib import Path

import pytest

from qwenvl_ft.config import load_config
from tests.conftest import ROOT

LORA = (ROOT / "configs/lora.yaml").read_bytes()


@pytest.fixture
def empty(tmp_path, monkeypatch):
    """The current folder, with nothing in it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_init_writes_the_config_that_explains_every_key_with_the_samples_paths(run, empty):
    code, out, err = run("init")
    assert (code, err) == (0, "") and "`qwenvl-ft plan`" in out and [path.name for path in empty.iterdir()] == ["lora.yaml"]
    written, whole = (text.decode().splitlines() for text in (Path("lora.yaml").read_bytes(), LORA))
    changed = [(line, now) for line, now in zip(whole, written, strict=True) if line != now]
    assert [line.split(":")[0] for line, _ in changed] == ["model", "train_meta_file", "train_data_dir"]
    assert all(line.split("#")[1] == now.split("#")[1] for line, now in changed), "the comments stay"


def test_init_and_then_plan_is_a_whole_plan(run, empty):
    assert run("init")[0] == 0
    code, out, err = run("plan", "--json")
    assert (code, err) == (0, "") and json.loads(out)["used"] == json.loads(out)["records"] > 200


OWN = ["model=models/mine", "train_meta_file=data/mine.json", "train_data_dir=data/mine"]


def test_a_plan_of_what_is_not_there_says_all_of_it_at_once(run, empty):
    run("init")
    for command in ("plan", "train"):
        code, out, err = run(command, *OWN)
        assert (code, out) == (1, "") and err.endswith("3 problems\n") and err.count("\n  fix: ") == 3
        for override in OWN:
            assert f"{override.replace('=', ': ')}: is no" in err


def test_no_model_is_brought_from_a_hub_for_data_that_are_not_there(run, empty, monkeypatch):
    monkeypatch.setattr("qwenvl_ft.hub.download.download", lambda *_: pytest.fail("it was brought"))
    run("init")
    code, _, err = run("plan", *OWN[1:], "model=hf:org/tiny", "eval_meta_file=eval.json")
    assert code == 1 and err.endswith("3 problems\n") and "eval_meta_file: eval.json: is not there" in err


def test_without_a_config_plan_says_who_writes_one(run, empty):
    for command in ("plan", "train"):
        code, _, err = run(command)
        assert code == 1 and err.startswith("lora.yaml: is not there") and "`qwenvl-ft init`" in err
    run("init")
    assert "fix: write --config demo.yaml" in run("plan", "demo.yaml")[2]


def test_init_overwrites_nothing(run, empty):
    Path("lora.yaml").write_text("mine")
    code, out, err = run("init")
    assert (code, out) == (1, "") and err.startswith("lora.yaml: exists already\n  fix: ") and err.endswith("1 problem\n")
    assert Path("lora.yaml").read_text() == "mine"
    Path("data").mkdir()
    assert run("init", "data")[0] == 1
    Path("gone.yaml").symlink_to("nowhere")  # writing would go through it
    assert run("init", "gone.yaml")[0] == 1 and not Path("nowhere").exists()


def test_init_writes_where_it_is_told_and_which_config_it_is_named(run, empty):
    code, out, _ = run("init", "conf/my.yaml")
    assert code == 0 and f"`qwenvl-ft plan --config {Path('conf/my.yaml')}`" in out
    run("init")
    assert Path("conf/my.yaml").read_bytes() == Path("lora.yaml").read_bytes()
    for path in (ROOT / "configs").iterdir():
        if path.name != "lora.yaml":
            assert run("init", path.name)[0] == 0 and Path(path.name).read_bytes() == path.read_bytes()
    code, _, err = run("init", "zero2.yaml/my.yaml")
    assert code == 1 and ("cannot be written" in err or "exists already" in err)


def test_a_path_that_yaml_would_misread_is_quoted(run, empty, monkeypatch):
    from qwenvl_ft.cli import init

    strange = empty / "a: b # c"
    (strange / "configs").mkdir(parents=True)
    (strange / "configs" / "lora.yaml").write_bytes(LORA)
    monkeypatch.setattr(init, "SHIPPED", strange)
    assert run("init")[0] == 0 and load_config("lora.yaml").model == strange / "data/tiny"
