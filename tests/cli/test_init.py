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


def test_init_writes_the_config_that_explains_every_key(run, empty):
    code, out, err = run("init")
    assert (code, err) == (0, "") and "`qwenvl-ft plan`" in out
    assert Path("lora.yaml").read_bytes() == LORA and [path.name for path in empty.iterdir()] == ["lora.yaml"]


def test_a_plan_of_what_is_not_there_says_all_of_it_at_once(run, empty):
    run("init")
    for command in ("plan", "train"):
        code, out, err = run(command)
        assert (code, out) == (1, "") and err.endswith("3 problems\n") and err.count("\n  fix: ") == 3
        for key in ("model", "train_meta_file", "train_data_dir"):
            assert f"{key}: {getattr(load_config(Path('lora.yaml')), key)}: is no" in err


def test_no_model_is_brought_from_a_hub_for_data_that_are_not_there(run, empty, monkeypatch):
    monkeypatch.setattr("qwenvl_ft.hub.download.download", lambda *_: pytest.fail("it was brought"))
    run("init")
    code, _, err = run("plan", "model=hf:org/tiny", "eval_meta_file=eval.json")
    assert code == 1 and err.endswith("3 problems\n") and "eval_meta_file: eval.json: is not there" in err


def test_init_with_the_sample_is_a_whole_plan(run, empty):
    code, out, err = run("init", "--sample")
    assert (code, err) == (0, "") and "data/tiny, data/sample, lora.yaml" in out
    code, out, err = run("plan", "--json")
    assert (code, err) == (0, "") and json.loads(out)["used"] == json.loads(out)["records"] > 200


def test_without_a_config_plan_says_who_writes_one(run, empty):
    for command in ("plan", "train"):
        code, _, err = run(command)
        assert code == 1 and err.startswith("lora.yaml: is not there") and "`qwenvl-ft init`" in err
    run("init")
    assert "fix: write --config demo.yaml" in run("plan", "demo.yaml")[2]


def test_init_overwrites_nothing(run, empty):
    Path("lora.yaml").write_text("mine")
    Path("data/tiny").mkdir(parents=True)
    code, out, err = run("init", "--sample")
    assert (code, out) == (1, "") and err.endswith("2 problems\n")
    assert err.startswith("data/tiny: exists already\n  fix: ") and "lora.yaml: exists already\n  fix: " in err
    assert Path("lora.yaml").read_text() == "mine" and not Path("data/sample").exists() and not list(Path("data/tiny").iterdir())
    assert run("init", "data")[0] == 1
    Path("gone.yaml").symlink_to("nowhere")  # copying would write through it
    assert run("init", "gone.yaml")[0] == 1 and not Path("nowhere").exists()


def test_init_writes_where_it_is_told_and_which_config_it_is_named(run, empty):
    code, out, _ = run("init", "conf/my.yaml")
    assert code == 0 and "`qwenvl-ft plan --config conf/my.yaml`" in out and Path("conf/my.yaml").read_bytes() == LORA
    for path in (ROOT / "configs").iterdir():
        assert run("init", path.name)[0] == 0 and Path(path.name).read_bytes() == path.read_bytes()
    code, _, err = run("init", "zero2.yaml/my.yaml")
    assert code == 1 and "cannot be written" in err
