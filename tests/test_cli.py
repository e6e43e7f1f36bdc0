"""The commands that need no GPU, as a user types them: what they print, what they exit with, and what they never import."""

import json
import shutil
import subprocess
import sys

import pytest

from qwenvl_ft.cli import main
from tests.conftest import ROOT, SAMPLE, TINY

TRAIN = str(SAMPLE / "train.json")
SHOW = ["--data-dir", str(SAMPLE / "images"), "--model", str(TINY)]
VALIDATE = ["validate-meta", TRAIN, "--data-dir", str(SAMPLE / "images")]
PLAN = ["plan", "--config", "configs/demo.yaml", f"model={TINY}", "rows_per_step=4", "num_train_epochs=8"]


@pytest.fixture
def run(capsys):
    """(exit code, standard output, standard error) of a command line."""

    def run(*arguments: str) -> tuple[int, str, str]:
        code: int | str | None = 0
        try:
            main(list(arguments))
        except SystemExit as exit:
            code = exit.code
        out, err = capsys.readouterr()
        return int(code or 0), out, err

    return run


def test_the_sample_is_valid_and_its_tokens_are_counted(run):
    num_records = len(json.loads((SAMPLE / "train.json").read_text()))
    code, out, err = run(*VALIDATE, "--model", str(TINY), "--json")
    report = json.loads(out)
    assert (code, err, report["problems"]) == (0, "", [])
    assert report["records"] == report["used"] == num_records
    assert report["pictures"] == 100 < report["shown"] == 302
    assert 0 < report["tokens"]["min"] <= report["tokens"]["median"] <= report["tokens"]["max"] < report["tokens"]["total"]
    code, out, err = run(*VALIDATE)
    assert (code, err) == (0, "") and f"{num_records}, {num_records} good" in out


def test_what_comes_before_the_gpu_never_imports_torch():
    """Importing torch takes 6 s here, transformers' Trainer 25 s; these commands answer at once."""
    code = """
import json, sys
from qwenvl_ft.cli import main
for arguments in json.load(sys.stdin):
    try:
        main(arguments)
    except SystemExit as exit:
        assert not exit.code, arguments
    heavy = {"torch", "transformers", "peft", "accelerate"} & sys.modules.keys()
    assert not heavy, (arguments, heavy)
"""
    commands = [["train", "--help"], VALIDATE, ["show", TRAIN, "0", *SHOW], PLAN]
    subprocess.run([sys.executable, "-c", code], input=json.dumps(commands), text=True, check=True, stdout=subprocess.PIPE)


def test_the_script_that_the_mission_names_is_the_command():
    command = [sys.executable, str(ROOT / "scripts" / "validate_meta.py"), *VALIDATE[1:], "--json"]
    assert json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)["problems"] == []


@pytest.mark.parametrize("arguments", [
    [], ["no-such-command"], ["validate-meta"], ["validate-meta", TRAIN], [*VALIDATE, "--yes"], ["show", TRAIN, "first", *SHOW],
    ["show", TRAIN, *SHOW], ["plan"], ["plan", "demo.yaml"], ["eval", "m", TRAIN, "--data-dir", ".", "--batch-size", "0"],
])  # fmt: skip
def test_wrong_usage_exits_with_2(arguments, run):
    code, out, err = run(*arguments)
    assert code == 2 and "Usage" in out + err


@pytest.mark.parametrize("command", ["validate-meta", "show", "plan", "train", "eval", "export", "ask"])
def test_every_command_helps_with_an_example_of_itself(command, run):
    code, out, _ = run(command, "--help")
    assert code == 0
    assert f"{command} " in out.split("Example:")[1]


def test_a_problem_is_printed_with_where_what_and_fix(run, talk, pictures):
    code, out, err = run("validate-meta", str(talk(["<img>a_.png</img>q", "a"], ["q", "a"])), "--data-dir", str(pictures))
    assert code == 1
    assert "2, 1 good" in out
    assert err == f"train.json[0].conversations[0]: a_.png is not in {pictures}\n  fix: did you mean a.png?\n1 problem\n"


def test_show_as_json_is_what_the_model_reads_and_learns(run):
    first = json.loads((SAMPLE / "train.json").read_text())[0]["conversations"]
    code, out, _ = run("show", TRAIN, "0", *SHOW, "--json")
    facts = json.loads(out)
    assert code == 0 and list(facts) == ["ids", "labels", "text", "taught", "grids"]
    assert facts["taught"] == [turn["value"] + "<|im_end|>" for turn in first if turn["from"] == "assistant"]
    assert all(label in (-100, token) for token, label in zip(facts["ids"], facts["labels"], strict=True))
    ((time, rows, columns),) = facts["grids"]
    assert facts["text"].count("<|image_pad|>") == time * rows * columns // 4
    assert all(turn["value"].split("</img>\n")[-1] in facts["text"] for turn in first)


def test_show_draws_pictures_as_blocks(run):
    code, out, _ = run("show", TRAIN, "0", *SHOW)
    assert code == 0
    assert "train.json[0]" in out and "two_col_103562.png: " in out and "taught (green)" in out


def test_show_names_the_last_record_where_there_is_no_such_one(run, talk, tmp_path):
    meta = talk(["q", "a"], ["q"], ["q", "a"])
    code, _, err = run("show", str(meta), "3", "--data-dir", str(tmp_path), "--model", str(TINY))
    assert (code, err) == (1, f"{meta}: has no record 3\n  fix: count from 0; the last good record is train.json[2]\n1 problem\n")
    code, _, err = run("show", str(meta), "1", "--data-dir", str(tmp_path), "--model", str(TINY))
    assert (code, err.split("\n")[0]) == (1, "train.json[1]: has no assistant turn, so it teaches nothing")


def test_show_says_what_is_wrong_with_a_file_that_cannot_be_read(run, tmp_path):
    """It said "has no record 0, give a number from 0 to -1" and nothing of the file."""
    (tmp_path / "train.json").write_text("[")
    code, _, err = run("show", str(tmp_path / "train.json"), "0", "--data-dir", str(tmp_path), "--model", str(TINY))
    assert (code, err.split("\n")[0]) == (1, "train.json:1:2: is not JSON: expecting value")


def test_plan_as_json_adds_up(run):
    code, out, err = run(*PLAN, "--json")
    facts = json.loads(out)
    assert (code, err) == (0, "")
    assert list(facts) == [
        "records", "used", "skipped", "pictures", "pictures_shrunk", "tokens", "taught_tokens", "rows", "row_tokens", "fill",
        "steps_per_epoch", "steps",
    ]  # fmt: skip
    assert facts["records"] == facts["used"] and facts["skipped"] == []
    assert facts["fill"] == round(facts["tokens"]["total"] / (facts["rows"] * facts["row_tokens"]), 4)
    assert facts["steps_per_epoch"] == -(-facts["rows"] // 4) and facts["steps"] == 8 * facts["steps_per_epoch"]


def test_plan_leaves_out_what_is_too_long_only_if_it_may(run, talk, tmp_path):
    meta = talk(["q", "a"], ["q " * 500, "a"])
    settings = [*PLAN, f"train_meta_file={meta}", f"train_data_dir={tmp_path}", "row_tokens=200"]
    code, _, err = run(*settings)
    assert code == 1
    assert "train.json[1]: " in err and " tokens, a row holds 200\n  fix: raise row_tokens" in err
    code, out, err = run(*settings, "on_bad_record=skip")
    assert code == 0
    assert "2, 1 used, 1 problems" in out and "train.json[1]: " in err


def test_every_wrong_setting_is_printed_at_once(run):
    code, _, err = run(*PLAN, "epochs=3", "seed=x", "row_tokens=-1")
    assert code == 1 and err.endswith("\n3 problems\n")


def test_a_model_with_a_pointer_in_place_of_its_weights_is_named_before_anything_is_loaded(run, tmp_path):
    shutil.copytree(TINY, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    code, _, err = run("ask", str(tmp_path / "model"), "Who are you?")
    assert code == 1 and "without git-lfs" in err and "Traceback" not in err
