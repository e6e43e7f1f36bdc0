"""How a run ends before its end: signals, another run in its folder, a launch that was not asked for, a full disk, NaN."""

import json
import os
import platform
import resource
import signal
import subprocess
import sys
import termios
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from qwenvl_ft.errors import NonFiniteLoss, UserError
from qwenvl_ft.folders.runs import newest
from qwenvl_ft.folders.whole import held
from qwenvl_ft.train import launch as launching
from qwenvl_ft.train.state import Run
from tests.runs import BASE, ROOT, few_records, launch, metrics, run, same
from tests.train.rehearsal import DEVICE, Rehearsal

LONG = {"max_steps": 100_000, "logging_steps": 1, "dataloader_num_workers": 2}


def start_alone(folder, terminal=None, **settings):
    """`python train.py` in a process group of its own, which a terminal's Ctrl-C reaches as a whole; or on a terminal."""
    values = {**BASE, **LONG, "train_meta_file": few_records(folder), "output_dir": folder / "run", **settings}
    (folder / "config.yaml").write_text("seed: 42\n")
    arguments = ["train.py", "--config", str(folder / "config.yaml"), *(f"{key}={value}" for key, value in values.items())]
    code = f"import fcntl, os, sys; fcntl.ioctl(0, {termios.TIOCSCTTY}, 0); os.execv(sys.executable, sys.argv[1:])"
    command = [sys.executable, *(["-c", code, sys.executable] if terminal else []), *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, text=True, stdin=terminal, stdout=terminal or subprocess.PIPE, stderr=terminal or subprocess.STDOUT,
        start_new_session=True, env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def read_until(process, wanted):
    """What the process has printed up to the line that holds `wanted`."""
    said = ""
    while wanted not in said:
        line = process.stdout.readline()
        assert line, said
        said += line
    return said


def nobody_left(group, seconds=20):
    """Whether every process of the group ends."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize(
    ("number", "name"), [(signal.SIGINT, "Ctrl-C (SIGINT)"), (signal.SIGTERM, "SIGTERM"), (signal.SIGHUP, "SIGHUP")]
)
def test_a_signal_to_the_whole_group_saves_though_workers_decode_the_pictures(number, name, tmp_path):
    """The workers got it, too, and the run ended in a DataLoader traceback, exit code 1, nothing saved."""
    process = start_alone(tmp_path)
    read_until(process, "step 1/")
    os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + number, output
    assert f"stopped by {name} after step" in output and "Traceback" not in output
    assert newest(tmp_path / "run")[0] is not None and nobody_left(process.pid)


def test_a_terminal_that_is_closed_leaves_a_saved_run(tmp_path):
    """SIGHUP ended the run at once; and after it every line that is printed is an error."""
    mine, its = os.openpty()
    process = start_alone(tmp_path, its)
    os.close(its)
    said = b""
    while b"step 1/" not in said:
        said += os.read(mine, 65536)
    os.close(mine)
    assert process.wait(timeout=120) == 128 + signal.SIGHUP, said
    assert newest(tmp_path / "run")[0] is not None and nobody_left(process.pid)


def test_ctrl_c_under_the_launcher_stops_between_the_rows_of_a_long_step(tmp_path):
    """The launcher kills 30 s after it was told to stop, and a step of 40 s had not ended by then."""
    process = launch(tmp_path, "run", "--multi_gpu", "--num_processes", "2", "--main_process_port", "29631", wait=False,
                     script="tests/slow_train.py", env={"PYTHONPATH": str(ROOT)},
                     rows_per_step=8, **LONG)  # fmt: skip
    said = read_until(process, "a long row begins")
    assert "step 1/" in said
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=200)
    ours, _, theirs = output.partition("what follows is the launcher's")
    assert "stopped by Ctrl-C (SIGINT) after step 1; go on with resume=true" in ours and theirs
    assert "Traceback" not in ours
    assert newest(tmp_path / "run")[0].name == "checkpoint-1"
    assert nobody_left(process.pid)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    return run(folder, rows_per_step=2)


@pytest.mark.parametrize("rows_before", [1, 3])
def test_a_step_that_is_given_up_has_not_happened(rows_before, plain, tmp_path, monkeypatch, capsys):
    backward, calls = Run.backward, []

    def interrupted(self, loss, last):
        calls.append(last)
        if len(calls) == rows_before:
            os.kill(os.getpid(), signal.SIGTERM)
        return backward(self, loss, last)

    monkeypatch.setattr(launching, "GRACE_SECONDS", 0)
    monkeypatch.setattr(Run, "backward", interrupted)
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, rows_per_step=2)
    assert stopped.value.code == 143 and len(calls) == rows_before
    said = "before the first step was done: nothing is saved" if rows_before == 1 else "after step 1; go on with resume=true"
    assert f"stopped by SIGTERM {said}" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-1"] * (rows_before == 3)
    monkeypatch.undo()
    os.chdir(ROOT)
    assert same(plain, run(tmp_path, rows_per_step=2, resume=True))


def test_an_evaluation_that_is_long_is_given_up_for_a_signal_and_the_step_before_it_is_saved(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(launching, "GRACE_SECONDS", 0)
    stock = Run.loss

    def interrupted(of, *row):
        if not of.model.training:
            os.kill(os.getpid(), signal.SIGTERM)
        return stock(of, *row)

    monkeypatch.setattr(Run, "loss", interrupted)
    with pytest.raises(SystemExit):
        run(tmp_path, eval_meta_file=few_records(tmp_path), eval_steps=1)
    assert "step 1  the evaluation was given up; resuming does it" in capsys.readouterr().out
    assert newest(tmp_path / "run")[0].name == "checkpoint-1" and "eval_loss" not in metrics(tmp_path / "run")[0]
    monkeypatch.setattr(Run, "loss", stock)
    for name, resume in (("run", True), ("plain", False)):
        run(tmp_path, name, eval_meta_file=few_records(tmp_path), eval_steps=1, resume=resume)
    losses = [[line["eval_loss"] for line in metrics(tmp_path / name)] for name in ("run", "plain")]
    assert losses[0] == losses[1] and len(losses[0]) == 3


@pytest.mark.parametrize(
    "error", [EOFError(), ConnectionResetError(104, "reset"), RuntimeError("DataLoader worker (pid 1) is killed")]
)
def test_a_process_that_decodes_pictures_and_is_gone_is_said_however_it_shows(error, tmp_path, monkeypatch):
    """What it was sending broke off before torch had learnt of its death: a traceback that ended in EOFError."""
    monkeypatch.setattr(Run, "loss", lambda *args: (_ for _ in ()).throw(error))
    with pytest.raises(UserError, match="a process that decodes pictures is gone"):
        run(tmp_path)


def test_nohup_is_obeyed(tmp_path, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with launching.Signals(1800) as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not signals.received
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_process_that_waits_for_one_that_is_gone_says_how_to_go_on(monkeypatch, capsys):
    """On GPUs it waits outside Python, where no handler of a signal runs, and is killed without a word."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(launching, "STUCK_SECONDS", 0)
    with launching.Signals(1800) as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        deadline, said = time.monotonic() + 60, ""
        while "go on with resume=true" not in said and time.monotonic() < deadline:
            said += capsys.readouterr().out
            time.sleep(0.01)
        assert "another process of this run seems to be gone; go on with resume=true" in said and signals.received


def test_processes_on_gpus_agree_over_their_cpus(monkeypatch):
    """A sum over GPUs before each row waited for all that they had to do. Here the other process is one that got no signal."""
    accelerator, groups = SimpleNamespace(num_processes=2, device=DEVICE), []
    stock = torch.distributed.new_group
    monkeypatch.setattr(torch.distributed, "new_group", lambda **named: groups.append(named["backend"]) or stock(**named))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with launching.Signals(1800) as signals, Rehearsal() as found:
            assert signals.stop(accelerator) == 0
            os.kill(os.getpid(), signal.SIGTERM)
            assert signals.stop(accelerator) == signal.SIGTERM
    finally:
        torch.distributed.destroy_process_group()
    assert groups == ["gloo"] and not found.waits and not found.sent


def test_two_runs_do_not_write_one_folder(tmp_path):
    """Nine of nine were mixed."""
    run(tmp_path, save_steps=1)
    content = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    lock = held(tmp_path / "run")
    with pytest.raises(UserError) as refused:
        run(tmp_path, resume=True)
    (problem,) = refused.value.problems
    assert problem.where == f"output_dir: {tmp_path / 'run'}"
    assert problem.what == f"process {os.getpid()} on {platform.node()} is training into it"
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == content
    lock.release()
    run(tmp_path, save_steps=1, resume=True)


def test_orphans_of_a_killed_launcher_keep_their_folder_and_say_who_died(tmp_path):
    """They went on writing beside the run that was started after them; and the death of one said nothing of resume."""
    process = launch(tmp_path, "run", "--multi_gpu", "--num_processes", "2", "--main_process_port", "29633", wait=False, **LONG)
    read_until(process, "step 1/")
    ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    process.kill()
    holder = (tmp_path / "run" / ".lock").read_text().split()[1]
    assert len(ranks) == 2 and holder in ranks
    with pytest.raises(UserError, match=rf"process {holder} on .* is training into it"):
        run(tmp_path, resume=True)
    (other,) = set(ranks) - {holder}
    os.kill(int(other), signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    assert "another process of this run is gone" in output and "resume=true" in output and "Traceback" not in output
    assert nobody_left(int(holder))
    held(tmp_path / "run").release()


def test_the_processes_of_a_second_launch_all_refuse_in_words(tmp_path):
    (tmp_path / "run").mkdir()
    lock = held(tmp_path / "run")
    process = launch(tmp_path, "run", "--multi_gpu", "--num_processes", "2", "--main_process_port", "29635", wait=False)
    output, _ = process.communicate(timeout=120)
    lock.release()
    assert process.returncode == 1
    ours, _, _ = output.partition("Traceback")  # of the launcher
    assert f"process {os.getpid()} on {platform.node()} is training into it" in ours and "1 problem" in ours
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_processes_that_accelerate_does_not_start_are_missed(tmp_path):
    """`--num_processes 2 --cpu` ran one process and ended with exit code 0."""
    process = launch(tmp_path, "run", "--num_processes", "2", "--cpu", wait=False)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1 and not (tmp_path / "run").exists()
    assert "several processes were asked for (accelerate set MASTER_ADDR) and one came up" in output
    assert "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N train.py" in output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_a_gpu_the_missing_one_is_named(tmp_path, monkeypatch):
    """The advice was the command that the user had just typed."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    with pytest.raises(
        UserError, match=r"1 came up: torch finds no GPU here \(CUDA_VISIBLE_DEVICES is '7'\)(.|\n)*ACCELERATE_USE_CPU=true"
    ):
        run(tmp_path)


def test_more_processes_than_gpus_are_refused_before_cuda_does(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="4 processes were asked for on this machine, and it shows 2 GPUs"):
        run(tmp_path)


@contextmanager
def files_of_at_most(size):
    """As on a full disk: who writes more is refused by the system."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [30_000, 400_000])
def test_what_the_disk_refuses_is_said_in_words_whoever_was_writing(size, tmp_path):
    """tokenizers says it in an Exception, safetensors in an error of its own; both were tracebacks."""
    with files_of_at_most(size), pytest.raises(UserError, match=r"File too large \(.* GiB free\)(.|\n)*resume=true"):
        run(tmp_path, lora_rank=64, save_steps=1)
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    run(tmp_path, lora_rank=64, resume=True)


@pytest.mark.parametrize("name", ["plan.json.incoming", "metrics.jsonl"])
def test_a_disk_that_is_full_is_said_in_words(name, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("")
    (tmp_path / "run" / name).symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"No space left on device \(.* GiB free\)"):
        run(tmp_path)


def test_a_held_out_loss_that_is_not_finite_stops_and_is_not_written(tmp_path, monkeypatch):
    """It passed with exit code 0 and was written as NaN, which is no JSON."""
    stock = Run.loss
    monkeypatch.setattr(Run, "loss", lambda of, *row: stock(of, *row) * (1.0 if of.model.training else float("nan")))
    with pytest.raises(NonFiniteLoss, match=r"few\.json\[0\].*: the loss of held-out records is nan"):
        run(tmp_path, eval_meta_file=few_records(tmp_path), eval_steps=2)
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1]
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("settings", [{"save_steps": 2}, {}])
def test_weights_that_are_not_finite_are_never_saved(settings, tmp_path, monkeypatch):
    stock, steps = torch.optim.AdamW.step, []

    def spoil(self, *args):
        stock(self, *args)
        steps.append(1)
        if len(steps) == (2 if settings else 3):
            next(iter(self.param_groups[0]["params"])).data[0, 0] = float("inf")

    monkeypatch.setattr(torch.optim.AdamW, "step", spoil)
    with pytest.raises(NonFiniteLoss, match=r"1 of the adapter's \d+ tensors hold NaN or infinity and are not saved"):
        run(tmp_path, **settings)
    assert not list((tmp_path / "run").glob("**/adapter_model.safetensors"))


def test_the_names_of_json_are_all_that_a_metrics_line_holds(tmp_path):
    run(tmp_path)
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert [json.loads(line, parse_constant=pytest.fail)["step"] for line in text.splitlines()] == [1, 2, 3]
