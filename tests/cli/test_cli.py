"""The commands that need no GPU, as a user types them: what they print, what they exit with, and what they never import."""

import json
import re
import shutil
import subprocess
import sys
from importlib.metadata import version

import pytest

from qwenvl_ft.cli.main import validate_meta_main
from tests.conftest import ROOT, SAMPLE, TINY

TRAIN = str(SAMPLE / "train.json")
SHOW = ["--data-dir", str(SAMPLE / "images"), "--model", str(TINY)]
VALIDATE = ["validate-meta", TRAIN, "--data-dir", str(SAMPLE / "images")]
PLAN = ["plan", "--config", "configs/demo.yaml", f"model={TINY}", "rows_per_step=4", "num_train_epochs=8"]


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


@pytest.mark.parametrize(
    "ignored", [["--adapter", "a=b"], ["--name", "a"], ["--engine-arg=--x"], ["data/tiny", "--engine-arg=--enforce-eager"]]
)
def test_serve_refuses_what_it_would_ignore(run, ignored):
    where = [] if ignored[0] == "data/tiny" else ["--engine-url", "http://127.0.0.1:9"]
    code, _, err = run("serve", "--port", "0", *where, *ignored)
    assert code == 2 and ("its own models" in err or "it is for --engine vllm" in err)


def test_what_comes_before_the_gpu_never_imports_torch(tmp_path):
    """Importing torch takes 6 s here, transformers' Trainer 25 s; these commands answer at once."""
    code = """
import json, sys
from qwenvl_ft.cli.main import main
for arguments in json.load(sys.stdin):
    try:
        main(arguments)
    except SystemExit as exit:
        assert not exit.code, arguments
    heavy = {"torch", "transformers", "peft", "accelerate"} & sys.modules.keys()
    assert not heavy, (arguments, heavy)
"""
    commands = [["train", "--help"], VALIDATE, ["show", TRAIN, "0", *SHOW], PLAN]
    commands.append(["show", TRAIN, *SHOW, "--html", str(tmp_path / "page.html"), "--limit", "2"])
    subprocess.run([sys.executable, "-c", code], input=json.dumps(commands), text=True, check=True, stdout=subprocess.PIPE)


def test_the_script_that_the_mission_names_is_the_command():
    command = [sys.executable, str(ROOT / "scripts" / "validate_meta.py"), *VALIDATE[1:], "--json"]
    assert json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)["problems"] == []


@pytest.mark.parametrize("arguments", [
    [], ["no-such-command"], ["validate-meta"], ["validate-meta", TRAIN, "more"], [*VALIDATE, "--yes"], ["show", TRAIN, "first", *SHOW],
    ["show", TRAIN, *SHOW], ["show", TRAIN, "0", "--limit", "2", *SHOW], ["show", TRAIN, *SHOW, "--html", "p.html", "--json"],
    ["show", TRAIN, "0", *SHOW, "--html", "p.html", "--start", "1"], ["eval", "m", TRAIN, "--data-dir", ".", "--batch-size", "0"],
])  # fmt: skip
def test_wrong_usage_exits_with_2(arguments, run):
    code, out, err = run(*arguments)
    assert code == 2 and "Usage" in out + err


@pytest.mark.parametrize(
    "command", ["init", "validate-meta", "show", "convert", "plan", "train", "eval", "compare", "export", "ask"]
)
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


def test_show_writes_a_page_of_many_records_or_of_one(run, tmp_path):
    out = tmp_path / "page.html"
    code, said, err = run("show", TRAIN, *SHOW, "--html", str(out), "--start", "2", "--limit", "3")
    assert (code, err) == (0, "")
    assert said.startswith(f"{out}: 3 records, 0 with problems, more follow (--start 5), ")
    places = re.findall(r'<article [^>]*id="([^"]*)"', out.read_text(encoding="utf-8"))
    assert places == ["train.json[2]", "train.json[3]", "train.json[4]"]
    assert run("show", TRAIN, "7", *SHOW, "--html", str(out))[0] == 0  # over a page of its own
    assert re.findall(r'<article [^>]*id="([^"]*)"', out.read_text(encoding="utf-8")) == ["train.json[7]"]


def test_a_page_replaces_no_file_of_the_users(run, talk, tmp_path):
    """`show train.json --html train.json` would have been the end of the data."""
    meta = talk(["q", "a"])
    before = meta.read_bytes()
    code, _, err = run("show", str(meta), "--data-dir", str(tmp_path), "--model", str(TINY), "--html", str(meta))
    assert (code, meta.read_bytes()) == (1, before) and "is there and is no page of this command" in err
    code, _, err = run("show", str(meta), "--data-dir", str(tmp_path), "--model", str(TINY), "--html", str(tmp_path))
    assert code == 1 and "is a folder" in err
    code, _, err = run(
        "show", str(meta), "--data-dir", str(tmp_path), "--model", str(TINY), "--html", str(tmp_path / "no" / "p.html")
    )
    assert code == 1 and "No such file or directory" in err


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
        "files", "forms", "media_position", "records", "used", "skipped", "pictures", "pictures_shrunk", "tokens", "paid", "features",
            "taught_tokens", "trains", "rows",
        "row_tokens", "fill", "steps_per_epoch", "steps", "checks", "notes",
    ]  # fmt: skip
    assert facts["notes"] == []
    assert facts["records"] == facts["used"] and facts["skipped"] == []
    assert facts["fill"] == round(facts["paid"]["tokens"] / (facts["rows"] * facts["row_tokens"]), 4)
    assert facts["paid"]["tokens"] < facts["tokens"]["total"] and facts["paid"]["media"] < facts["paid"]["media_shown"]
    assert facts["steps_per_epoch"] == -(-facts["rows"] // 4) and facts["steps"] == 8 * facts["steps_per_epoch"]


def test_plan_leaves_out_what_is_too_long_only_if_it_may(run, talk, tmp_path):
    meta = talk(["q", "a"], ["q " * 500, "a"])
    settings = [*PLAN, f"train_meta_file={meta}", f"train_data_dir={tmp_path}", "row_tokens=200"]
    code, _, err = run(*settings)
    assert code == 1
    assert "train.json[1]: 523 tokens, a row holds 200\n  fix: raise row_tokens to 523, lower max_pixels" in err
    code, out, err = run(*settings, "on_bad_record=skip")
    assert code == 0
    assert "2, 1 used, 1 problems" in out and "train.json[1]: " in err


def test_records_that_no_row_holds_are_one_problem_with_the_row_tokens_that_would_do(run, talk, tmp_path):
    """row_tokens=100 printed the same two lines for each of 15 records."""
    meta = talk(["q", "a"], *([f"{'q ' * length}", "a"] for length in (300, 500, 400)))
    settings = [*PLAN, f"train_meta_file={meta}", f"train_data_dir={tmp_path}", "row_tokens=200"]
    code, _, err = run(*settings)
    assert (code, err.split("\non_bad_record")[0]) == (1, (
        "train.json: 3 records are too long for a row of 200 tokens; train.json[2] is the longest, 523 tokens\n"
        "  fix: raise row_tokens to 523, lower max_pixels, or shorten them"
    ))  # fmt: skip
    skipped = json.loads(run(*settings, "on_bad_record=skip", "--json")[1])["skipped"]
    assert [problem["where"] for problem in skipped] == ["train.json[1]", "train.json[2]", "train.json[3]"]
    assert not run(*settings, "row_tokens=523")[0]


def test_a_run_of_a_few_steps_is_noted_in_the_plan(run):
    """A data set of a few records trained three steps without a word."""
    few = "optimizer steps teach little: lower rows_per_step or row_tokens, or raise num_train_epochs"
    _, out, _ = run(*PLAN, "num_train_epochs=1", "rows_per_step=200")
    assert f"note 1 {few}" in " ".join(out.split())
    notes = json.loads(run(*PLAN, "num_train_epochs=1", "rows_per_step=200", "--json")[1])["notes"]
    assert notes == ["101 rows are fewer than rows_per_step, 200: every step takes them all; lower it", f"1 {few}"]
    assert json.loads(run(*PLAN, "max_steps=49", "--json")[1])["notes"] == ["49 optimizer steps teach little: raise max_steps"]
    assert json.loads(run(*PLAN, "max_steps=50", "--json")[1])["notes"] == []


def test_a_small_picture_that_is_paid_for_again_and_again_is_noted_in_the_plan(run, talk, pictures):
    """Half of a short record is less than the 64 tokens that long ones share."""
    meta = talk(*[[f"<img>a.png</img>{question}", "7"] for question in "ABCD"])
    small = [*PLAN, f"train_meta_file={meta}", f"train_data_dir={pictures}", "max_pixels=3136", "--json"]
    shared = json.loads(run(*small)[1])
    assert shared["paid"]["media"] < shared["paid"]["media_shown"] and shared["tokens"]["max"] < 64
    notes = json.loads(run(*small, "share_prefix=off")[1])["notes"]
    assert "records that share a prefix pay for it each: share_prefix is off" in notes


def test_more_taught_tokens_than_the_rank_holds_are_noted_in_the_plan(run):
    on_q = [*PLAN, "lora_rank=1", "lora_alpha=1", "--json"]  # 4 layers of 192 x 192: 1,536 weights for each kind of layer
    (note,) = json.loads(run(*on_q, "lora_targets=[q_proj,k_proj]")[1])["notes"]
    assert note == (
        "10,586 taught tokens may be more than the adapter's 3,072 weights hold, about 2 of them a weight, by a rule of thumb: "
        "raise lora_rank from 1, if the loss stays high"
    )
    assert json.loads(run(*on_q, "lora_targets=[q_proj,k_proj,v_proj,o_proj]")[1])["notes"] == []


def test_plan_notes_an_attention_that_is_not_installed_here(run):
    """Not a problem: a plan may be made on another machine than the training."""
    code, out, _ = run(*PLAN, "attn_implementation=flash_attention_2", "--json")
    note, unshared = json.loads(out)["notes"]
    assert code == 0 and note.startswith("flash_attention_2 is not installed here, where train would stop")
    assert "attn_implementation is flash_attention_2, and only varlen" in unshared


def test_an_output_dir_that_holds_something_else_is_refused(run, tmp_path):
    """output_dir=data mixed a run into the user's data; a file ended in FileExistsError."""
    (tmp_path / "data").mkdir()
    assert run(*PLAN, f"output_dir={tmp_path}/data")[0] == run(*PLAN, f"output_dir={tmp_path}/new")[0] == 0
    (tmp_path / "data" / "train.json").write_text("[]")
    code, _, err = run(*PLAN, f"output_dir={tmp_path}/data")
    assert (code, err.splitlines()[0]) == (1, f"output_dir: {tmp_path}/data: holds files and none of a run")
    for name in (
        "config.yaml",
        "plan.json",
        "metrics.jsonl",
        "checkpoint-5",
        "predictions_base.json",
        "predictions-eval.json",
        "predictions-eval.jsonl",
    ):
        (tmp_path / "data" / name).write_text("")
        assert run(*PLAN, f"output_dir={tmp_path}/data")[0] == 0
        (tmp_path / "data" / name).unlink()
    for file in ("data/train.json", "data/train.json/below"):
        code, _, err = run(*PLAN, f"output_dir={tmp_path}/{file}")
        assert code == 1 and "is no folder to write to (Not a directory)" in err


def test_max_pixels_below_the_models_own_min_pixels_is_refused(run, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(TINY, model)
    settings = json.loads((model / "processor_config.json").read_text())
    settings["image_processor"]["size"]["shortest_edge"] = 65536
    (model / "processor_config.json").write_text(json.dumps(settings))
    code, _, err = run(*PLAN, f"model={model}", "max_pixels=50176")
    assert code == 1 and "max_pixels: is 50176, less than the model's own min_pixels, 65536" in err
    assert run(*PLAN, f"model={model}", "max_pixels=50176", "min_pixels=3136")[0] == 0


def test_options_in_place_of_overrides_are_understood_or_answered(run):
    assert json.loads(run(*PLAN, "--num_train_epochs=2", "--json")[1])["steps"] == 52
    code, _, err = run(*PLAN, "--learning_rate", "1e-4")
    assert (code, err) == (1, "--learning_rate 1e-4: is not an override\n  fix: write learning_rate=1e-4\n1 problem\n")


def test_of_several_processes_one_says_what_is_wrong_and_all_stop(run, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert run(*PLAN, "seed=x") == (1, "", "")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert run(*PLAN, "seed=x")[2].endswith("1 problem\n")


def test_usage_names_the_program_once_whatever_started_it(monkeypatch, capsys):
    """It said: Usage: validate-meta validate-meta."""
    monkeypatch.setattr(sys, "argv", ["validate-meta", "--help"])
    with pytest.raises(SystemExit):
        validate_meta_main()
    assert "Usage: qwenvl-ft validate-meta [OPTIONS]" in capsys.readouterr().out


def test_the_version_is_that_of_the_package(run):
    assert run("--version") == (0, f"qwenvl-ft {version('qwenvl-ft')}\n", "")


def test_every_wrong_setting_is_printed_at_once(run):
    code, _, err = run(*PLAN, "epochs=3", "seed=x", "row_tokens=-1")
    assert code == 1 and err.endswith("\n3 problems\n")


def test_a_model_with_a_pointer_in_place_of_its_weights_is_named_before_anything_is_loaded(run, tmp_path):
    shutil.copytree(TINY, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    code, _, err = run("ask", str(tmp_path / "model"), "Who are you?")
    assert code == 1 and "without git-lfs" in err and "Traceback" not in err


def test_boxes_of_no_said_unit_are_noted_and_are_problems_where_the_said_unit_is_not_theirs(run, talk, pictures):
    command = ["validate-meta", str(talk(["<img>a.png</img>", '{"bbox_2d": [1, 2, 100, 90]}'])), "--data-dir", str(pictures)]
    code, out, err = run(*command)
    assert (code, err) == (0, "") and "note: 1 record holds boxes in JSON, which are taught as they stand" in out
    code, out, _ = run(*command, "--json", "--boxes", "pixels")
    assert code == 0 and json.loads(out)["notes"] == []
    code, out, _ = run(*command, "--json", "--boxes", "unit")
    assert code == 1 and "lies outside its picture a.png, 168 x 112 px, as unit" in json.loads(out)["problems"][0]["what"]


def test_problems_of_one_kind_are_a_line_with_their_count_for_people_and_programs(run, tmp_path):
    """300 records with two troubles each were 1,201 lines."""
    turns = [{"from": "human", "value": "<audio>\nColour?"}, {"from": "gpt", "value": "Red."}]
    (tmp_path / "train.json").write_text(json.dumps([{"id": str(i), "audio": "a.wav", "conversations": turns} for i in range(300)]))
    command = ["validate-meta", str(tmp_path / "train.json"), "--data-dir", str(tmp_path)]
    code, _, err = run(*command)
    assert code == 1 and err.count("\n") == 5
    assert err.startswith('train.json[0], train.json[1], train.json[2] and 297 more: has a key "audio", which is not read\n')
    assert err.endswith("\n600 problems, 2 different (--all lists each)\n")
    found = json.loads(run(*command, "--json")[1])["problems"]
    assert [(problem["count"], len(problem["places"])) for problem in found] == [(300, 10)] * 2
    assert run(*command, "--all")[2].count("\n  fix: ") == 600
    assert len(json.loads(run(*command, "--json", "--all")[1])["problems"]) == 600


def test_the_plan_keeps_every_record_that_is_left_out_though_it_prints_kinds(run, talk, tmp_path):
    meta = talk(["q", "a"], *([["q"]] * 30))
    settings = [*PLAN, f"train_meta_file={meta}", f"train_data_dir={tmp_path}", "on_bad_record=skip"]
    assert "and 27 more: has no assistant turn" in run(*settings)[2]
    assert [problem["where"] for problem in json.loads(run(*settings, "--json")[1])["skipped"]] == [
        f"train.json[{i}]" for i in range(1, 31)
    ]
