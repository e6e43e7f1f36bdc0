"""Training as a job of PAI: its folders, its environment and its shell are laid out here as PAI does it, and nothing else is said."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from qwenvl_ft.cli.main import main
from qwenvl_ft.cloud.job import METRICS, job_settings, launcher, own_words
from qwenvl_ft.config import load_config
from qwenvl_ft.errors import UserError
from qwenvl_ft.folders.runs import checkpoints, newest
from qwenvl_ft.folders.whole import damage
from tests.conftest import ROOT, SAMPLE, TINY
from tests.runs import BASE, adapter, difference, few_records, metrics, run, same

SETTINGS = {"max_steps": 3, "save_steps": 1, "lora_dropout": 0.1}
TEXT = """two words, 'one' and "another" $HOME \\ *"""
HYPERPARAMETERS = {
    **{key: str(value) for key, value in {**BASE, **SETTINGS}.items() if key not in ("model", "train_data_dir")},
    "run_name": json.dumps(TEXT),
}  # fmt: skip
OURS = re.compile("PAI_|ACCELERATE_|LOCAL_RANK$|WORLD_SIZE$|RANK$|NPROC_PER_NODE$|MASTER_")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The run that no job is."""
    folder = tmp_path_factory.mktemp("plain")
    run(folder, **SETTINGS)
    return folder / "run"


class Job:
    """What PAI mounts at /ml, here below a folder, and the environment that it gives the job's command."""

    def __init__(self, ml: Path, hyperparameters: dict, **channels: Path):
        self.config, self.model, self.checkpoints = ml / "input" / "config", ml / "output" / "model", ml / "output" / "checkpoints"
        for folder in (self.config, self.model, self.checkpoints, ml / "tmp"):
            folder.mkdir(parents=True, exist_ok=True)
        (self.config / "hyperparameters.json").write_text(json.dumps(hyperparameters))
        self.environ = {
            "PAI_CONFIG_DIR": str(self.config), "PAI_HPS": json.dumps(hyperparameters), "TMPDIR": str(ml / "tmp"),
            "PAI_OUTPUT_MODEL": str(self.model), "PAI_OUTPUT_CHECKPOINTS": str(self.checkpoints),
            "PAI_USER_ARGS": " ".join(shlex.quote(word) for name, value in hyperparameters.items() for word in (f"--{name}", value)),
            **{f"PAI_HPS_{name.upper()}": value for name, value in hyperparameters.items()},
            **{f"PAI_INPUT_{name.upper()}": str(path) for name, path in channels.items()},
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "23456", "WORLD_SIZE": "1", "RANK": "0", "NPROC_PER_NODE": "1",
        }  # fmt: skip

    def start(self, command: str, **environ: str) -> subprocess.Popen:
        """The job's command, by a shell, as PAI runs it."""
        ours = {name: value for name, value in os.environ.items() if not OURS.match(name)}
        return subprocess.Popen(
            ["sh", "-c", command], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
            env={**ours, **self.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable, "COLUMNS": "80", **environ},
        )  # fmt: skip


@pytest.fixture
def job(tmp_path):
    """Makes a job of the plain run's settings, but for `changes`; its data and its model are channels."""

    def make(changes: dict | None = None, **channels: Path) -> Job:
        inputs = {"model": TINY, "train_data_dir": SAMPLE / "images", "train_meta_file": few_records(tmp_path), **channels}
        return Job(tmp_path / "ml", {**HYPERPARAMETERS, **(changes or {})}, **inputs)

    return make


@pytest.fixture
def inside(monkeypatch):
    """Runs `qwenvl-ft train` in this process, as the job's; returns its exit code."""

    def enter(job: Job, *words: str) -> int:
        for name in [name for name in os.environ if OURS.match(name)]:
            monkeypatch.delenv(name)
        for name, value in job.environ.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(tempfile, "tempdir", None)  # it remembers the TMPDIR that it met first
        try:
            main(["train", *words])
        except SystemExit as done:
            return int(done.code or 0)
        return 0

    return enter


REFUSED: list[Path] = []  # below these there is no rename and no append, as in a mounted bucket


def _refuse(event: str, arguments: tuple) -> None:
    if REFUSED and event in ("os.rename", "open"):
        path, other, flags = (*arguments, 0)[:3]
        appends = event == "open" and ("a" in (other or "") or bool(flags & os.O_APPEND))
        places = [path, other] if event == "os.rename" else [path] if appends else []
        if any(str(place).startswith(str(mount)) for place in places for mount in REFUSED):
            raise PermissionError(1, "a mounted bucket does no such thing", str(path))


sys.addaudithook(_refuse)


def test_a_job_ends_with_the_adapter_of_the_same_run_by_a_config_and_writes_to_its_mounts_what_a_bucket_can(
    plain, job, inside, tmp_path, capsys
):
    """$PAI_USER_ARGS broke texts at their spaces; renaming in a mounted bucket is copying, and no append is one."""
    (tmp_path / "held_out.json").write_text(json.dumps(json.loads((SAMPLE / "eval.json").read_text())[:1]))
    made = job(eval_meta_file=tmp_path / "held_out.json")
    broken = subprocess.run(["sh", "-c", r"printf '%s\0' $PAI_USER_ARGS"], env=made.environ, text=True, capture_output=True)
    REFUSED.append(made.model.parent)
    try:
        assert inside(made, *broken.stdout.split("\0")[:-1]) == 0
    finally:
        REFUSED.clear()
    assert same(adapter(plain), adapter(made.model)) and damage(made.model) is None
    assert load_config(made.model / "config.yaml").run_name == TEXT
    kept = {path.name for path in plain.iterdir() if path.is_file()} - {".lock", "picture_hashes.json"}
    assert kept == {path.name for path in made.model.iterdir()} - {"picture_hashes.json"}
    assert [(path.name, damage(path)) for path in checkpoints(made.checkpoints)] == [(f"checkpoint-{n}", None) for n in (1, 2, 3)]
    said = capsys.readouterr().out
    assert f"It lies whole in {made.model}" in said
    keys = {"loss": "line_loss", "eval_loss": "eval_loss", "learning_rate": "learning_rate"}
    for name, values in found(said).items():
        wanted = [
            line[keys[name]]
            for line in metrics(made.model)
            if (keys[name] in line and (name == "eval_loss" or "line_loss" in line))
        ]
        assert values == pytest.approx(wanted, abs=1e-4) and values, name


def found(said: str) -> dict[str, list[float]]:
    """What each metric's expression finds, with its whole line as PAI has it."""
    return {name: [float(hit[1]) for line in said.splitlines() if (hit := re.fullmatch(regex, line))] for name, regex in METRICS}


def test_the_rehearsal_of_a_mounted_bucket_does_refuse(tmp_path):
    """The test above can fail."""
    (tmp_path / "file").write_text("")
    REFUSED.append(tmp_path)
    try:
        with pytest.raises(PermissionError):
            (tmp_path / "file").rename(tmp_path / "other")
        with pytest.raises(PermissionError), (tmp_path / "file").open("a"):
            pass
    finally:
        REFUSED.clear()


def test_a_killed_job_that_is_started_again_on_another_machine_ends_with_the_same_bits(plain, job, inside):
    made = job()
    process = made.start("exec $PYTHON train.py")
    deadline = time.monotonic() + 200
    while not (made.checkpoints / "checkpoint-2" / "MANIFEST.json").is_file():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    shutil.rmtree(made.environ["TMPDIR"])
    os.mkdir(made.environ["TMPDIR"])
    shutil.rmtree(made.checkpoints / "checkpoint-3", ignore_errors=True)  # where the kill came late
    (made.checkpoints / "checkpoint-3").mkdir()  # and where it came in the middle of the copy
    shutil.copy(made.checkpoints / "checkpoint-2" / "state.json", made.checkpoints / "checkpoint-3")
    shutil.rmtree(made.model)
    made.model.mkdir()
    assert inside(made) == 0
    assert same(adapter(plain), adapter(made.model))
    assert [line["loss"] for line in metrics(plain)] == [line["loss"] for line in metrics(made.model)]
    assert newest(made.checkpoints)[0].name == "checkpoint-3"


def test_checkpoints_that_are_damaged_stop_the_job_in_words(job, inside, capsys):
    made = job()
    (made.checkpoints / "checkpoint-1").mkdir()
    (made.checkpoints / "checkpoint-1" / "MANIFEST.json").write_text('{"state.json": {"bytes": 1, "sha256": ""}}')
    assert inside(made) == 1
    assert "cannot resume: checkpoint-1: state.json is missing" in capsys.readouterr().err


def resolved(environ: dict, *words: str, config: Path | None = None) -> dict:
    """The settings as `train` would resolve them."""
    named, of_job = job_settings(environ)
    return load_config(config or named, own_words(words, environ), of_job).model_dump()


def test_hyperparameters_are_the_same_however_they_come(job):
    environ = job().environ
    by_file = resolved(environ)
    assert by_file["run_name"] == TEXT and by_file["lora_dropout"] == 0.1
    no_file = {name: value for name, value in environ.items() if name != "PAI_CONFIG_DIR"}
    alone = {name: value for name, value in no_file.items() if name != "PAI_HPS"}
    broken = subprocess.run(["sh", "-c", r"printf '%s\0' $PAI_USER_ARGS"], env=environ, text=True, capture_output=True)
    whole = subprocess.run(["sh", "-c", f"printf '%s\\0' {environ['PAI_USER_ARGS']}"], text=True, capture_output=True)
    in_one = [f"--{key}={value}" for key, value in HYPERPARAMETERS.items()]
    words = [text.split("\0")[:-1] for text in (broken.stdout, whole.stdout)]
    assert "'\"two" in words[0] and json.dumps(TEXT) in words[1]
    of_channels = {name: value for name, value in no_file.items() if "PAI_HPS" not in name}
    for how in (resolved(no_file), resolved(alone), *(resolved(environ, *of) for of in words), resolved(of_channels, *words[1]),
                resolved(of_channels, *in_one)):  # fmt: skip
        assert how == by_file


def test_the_command_line_counts_before_hyperparameters_and_these_before_channels_and_the_file(job, tmp_path):
    (tmp_path / "settings.yaml").write_text(
        "seed: 1\nlora_rank: 1\nlearning_rate: 1e-5\noutput_dir: runs/here\ntrain_data_dir: there\n"
    )
    elsewhere = {"train_meta_file": "mine.json", "model": "oss://bucket/model/", "config": str(tmp_path / "settings.yaml")}
    environ = job(elsewhere).environ
    settings = resolved(environ, "--learning_rate", "2e-3", "max_steps=7")
    assert (settings["learning_rate"], settings["max_steps"], settings["lora_rank"], settings["seed"]) == (2e-3, 7, 4, 1)
    assert (settings["train_meta_file"], settings["model"], settings["train_data_dir"]) == (
        Path("mine.json"),
        TINY,
        SAMPLE / "images",
    )
    assert settings["resume"] and Path(tempfile.gettempdir()) in settings["output_dir"].parents
    assert resolved(environ, "output_dir=mine", "resume=false")["output_dir"] == Path("mine")
    only = {name: value for name, value in environ.items() if name != "PAI_OUTPUT_CHECKPOINTS"}
    assert resolved(only)["output_dir"] != settings["output_dir"]


def test_a_run_into_a_folder_of_the_users_own_leaves_its_adapter_in_the_jobs_model_too(job, inside, tmp_path):
    made = job({"output_dir": str(tmp_path / "mine"), "max_steps": "1"})
    assert inside(made) == 0
    assert same(adapter(tmp_path / "mine"), adapter(made.model)) and not checkpoints(made.checkpoints)
    assert inside(made, "lora_rank=2") == 1  # resume is on, and says what changed


def test_outside_of_a_job_nothing_changes():
    assert job_settings({"WORLD_SIZE": "1", "RANK": "0"}) == (None, [])
    assert own_words(["--seed", "1"], {"PATH": "x"}) == ["--seed", "1"]
    assert launcher({"WORLD_SIZE": "2", "RANK": "0"}, ["train"]) is None


def test_a_number_of_nodes_that_is_none_is_said_in_words():
    """It was torchrun's traceback."""
    environ = {"WORLD_SIZE": "abc", "RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1.5"}
    with pytest.raises(UserError, match=r"WORLD_SIZE=abc: is no number(.|\n)*MASTER_PORT=1.5: is no number"):
        launcher(environ, ["train"])
    assert launcher(environ | {"WORLD_SIZE": "2", "NPROC_PER_NODE": "gpu", "MASTER_PORT": "1"}, ["train"])


NO_PLACE = Path("/no/such/folder")
COMPLAINTS = {
    "a hyperparameter that is none": ({"lora_rnak": "8"}, {}, "PAI job, lora_rnak=8: unknown key lora_rnak\n  fix: did you mean lora_rank?"),
    "a value of another type": ({"lora_rank": "eight"}, {}, "PAI job, lora_rank=eight: lora_rank is eight\n  fix: it should be a valid integer"),
    "a value that is no YAML": ({"lora_on": "[language"}, {}, "lora_on=[language: its value is not YAML"),
    "a channel that is not mounted": ({}, {"train_data_dir": NO_PLACE}, f"input channel train_data_dir: {NO_PLACE}: is not there"),
    "a channel of no key": ({}, {"train": SAMPLE}, f"input channel train: {SAMPLE}: sets nothing\n  fix: name it like the key"),
    "a config that is not there": ({"config": "no.yaml"}, {}, "no.yaml: is not there"),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPLAINTS)
def test_what_is_wrong_with_a_job_is_said_in_words(name, job, inside, capsys):
    changes, channels, said = COMPLAINTS[name]
    made = job(changes, **channels)
    assert inside(made) == 1
    assert said in capsys.readouterr().err and not any(made.checkpoints.iterdir())


def test_hyperparameters_that_are_no_object_are_said_in_words(job):
    environ = job().environ
    (Path(environ["PAI_CONFIG_DIR"]) / "hyperparameters.json").write_text("[1")
    with pytest.raises(UserError, match=r"hyperparameters\.json: holds no JSON object"):
        job_settings(environ)


def test_a_channel_that_a_hyperparameter_names_needs_no_key(job, tmp_path):
    environ = job({"train_data_dir": str(SAMPLE / "images")}, sample=SAMPLE).environ
    assert resolved(environ)["train_data_dir"] == SAMPLE / "images"


def test_deepspeed_on_several_nodes_wants_a_folder_that_they_share(job):
    environ = job().environ | {"GROUP_WORLD_SIZE": "2", "ACCELERATE_USE_DEEPSPEED": "true"}
    with pytest.raises(UserError, match="none sees another's disk"):
        job_settings(environ)
    shared = job({"output_dir": "/cpfs/run"}).environ
    assert resolved(shared | {"GROUP_WORLD_SIZE": "2", "ACCELERATE_USE_DEEPSPEED": "true"})["output_dir"] == Path("/cpfs/run")


def test_two_nodes_come_up_as_two_processes_and_end_where_one_does(plain, job, tmp_path):
    """DLC starts one process a node and says neither LOCAL_RANK nor that WORLD_SIZE counts nodes: each trained alone, or one hung."""
    made = job()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    nodes = []
    for rank in ("0", "1"):
        (disk := tmp_path / f"disk{rank}").mkdir()  # another machine has another
        nodes.append(
            made.start("exec $PYTHON train.py $PAI_USER_ARGS", WORLD_SIZE="2", RANK=rank, MASTER_PORT=port, TMPDIR=str(disk))
        )
    outputs = [node.communicate(timeout=280)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert "2 x cpu" in outputs[0] and "step 3/3" in outputs[0] and "step" not in outputs[1]
    assert difference(adapter(plain), adapter(made.model)) < 1e-3
    for one, other in zip(metrics(plain), metrics(made.model), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
