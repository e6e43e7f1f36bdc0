"""What needs no torch to be said is said before torch is imported, which takes seconds: here its import ends the process."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from qwenvl_ft.config import load_config
from qwenvl_ft.data import prepare
from qwenvl_ft.errors import UserError
from tests.conftest import ROOT, SAMPLE, TINY

QUESTIONS = ["--data-dir", str(SAMPLE / "images")]
TRAIN = ["train", "--config", "configs/demo.yaml", "output_dir=OUT/run"]
COMMANDS = {
    "a setting": ([*TRAIN, "seed=x"], "seed is x"),
    "a config": (["train", "--config", "OUT/bad.json"], "unknown key conversations"),
    "records": ([*TRAIN, "train_meta_file=OUT/bad.json"], "has no assistant turn"),
    "held-out records": ([*TRAIN, "eval_meta_file=OUT/bad.json"], "has no assistant turn"),
    "records that are too long": ([*TRAIN, "row_tokens=2"], "are too long for a row of 2 tokens"),
    "bounds": ([*TRAIN, "max_pixels=3136", "min_pixels=6272"], "set it to at least min_pixels"),
    "a folder of something else": ([*TRAIN, "output_dir=data/sample"], "holds files and none of a run"),
    "a model without weights": ([*TRAIN, "model=OUT/model"], "safetensors"),
    "a plan": (["plan", "--config", "configs/demo.yaml", "train_meta_file=OUT/bad.json"], "has no assistant turn"),
    "questions": (["eval", str(TINY), "OUT/bad.json", "--data-dir", "OUT"], "has no assistant turn"),
    "a model to be scored": (["eval", "OUT/model", str(SAMPLE / "eval.json"), *QUESTIONS], "safetensors"),
    "an adapter to be scored": (["eval", str(TINY), str(SAMPLE / "eval.json"), *QUESTIONS, "--adapter", "OUT"], "adapter_config.json"),
    "a picture to ask about": (["ask", str(TINY), "hi", "--image", "OUT/no.png"], "cannot be read (No such file or directory)"),
    "a picture that is none": (["ask", str(TINY), "hi", "--image", "OUT/bad.json"], "is JSON text, not a picture"),
    "a video to ask about": (["ask", str(TINY), "hi", "--video", "OUT/no.mp4"], "cannot be read (No such file or directory)"),
    "a folder of frames": (["ask", str(TINY), "hi", "--video", str(SAMPLE / "images")], "has frames of several sizes"),
    "a file of questions": (["ask", str(TINY), "--jsonl", "OUT/bad.json", "--out", "OUT/answers"], "is no question"),
    "a model to ask": (["ask", "OUT/model", "hi"], "safetensors"),
    "an adapter to merge": (["export", "--adapter", "OUT", "--out", "OUT/merged"], "adapter_config.json"),
    "an adapter to serve": (["serve", str(TINY), "--adapter", "a=OUT", "--port", "0"], "adapter_config.json"),
    "a model to serve": (["serve", "OUT/model", "--port", "0"], "safetensors"),
    "a name of two": (["serve", str(TINY), "--adapter", "tiny=OUT", "--port", "0"], "names the base, too"),
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_what_is_wrong_is_said_before_torch_is_imported(name, tmp_path):
    """`train` imported torch, transformers and accelerate, and then said that a record has no answer."""
    arguments, said = COMMANDS[name]
    (tmp_path / "torch.py").write_text("import os; os._exit(99)")
    (tmp_path / "bad.json").write_text(json.dumps({"conversations": [{"from": "user", "value": "q"}]}))
    shutil.copytree(TINY, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    command = [sys.executable, "-m", "qwenvl_ft", *(argument.replace("OUT", str(tmp_path)) for argument in arguments)]
    env = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(command, env=env, text=True, capture_output=True, cwd=ROOT)
    assert (done.returncode, "Traceback" in done.stderr) == (1, False), done.stderr
    assert said in done.stderr


def test_that_torch_is_not_there_ends_what_does_need_it(tmp_path):
    """The test above can fail."""
    (tmp_path / "torch.py").write_text("import os; os._exit(99)")
    env = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    assert (
        subprocess.run(
            [sys.executable, "-m", "qwenvl_ft", "ask", str(TINY), "hi"], env=env, cwd=ROOT, capture_output=True
        ).returncode
        == 99
    )


def test_a_tracker_that_is_not_installed_is_named_before_torch(monkeypatch, tmp_path):
    monkeypatch.setattr(prepare, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"swanlab is not installed\n  fix: pip install swanlab(.|\n)*tensorboard is not installed"):
        prepare.make_ready(load_config("configs/demo.yaml", [f"output_dir={tmp_path}/run", "report_to=[swanlab, tensorboard]"]))
