"""What training does where there is a GPU, as far as it shows without one."""

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from types import SimpleNamespace

import accelerate
import pytest
import torch
from accelerate.utils import DistributedType
from torch.utils.data._utils.pin_memory import pin_memory

from qwenvl_ft.data.rows import Rows
from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.folders.runs import checkpoints
from qwenvl_ft.model.load import load_base
from qwenvl_ft.train import activations, loop, setup, state
from qwenvl_ft.train.launch import Workers, no_word_of_workers
from qwenvl_ft.train.memory import out_of_memory
from qwenvl_ft.train.state import Run
from tests.conftest import TINY
from tests.runs import adapter, config, few_records, run, same
from tests.train.conftest import SETTINGS

FULL = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 1.16 GiB. GPU 0 has a total capacity of 23.64 GiB of which 0.50 GiB is free. "
    "Of the allocated memory 21.00 GiB is allocated by PyTorch, and 1.00 GiB is reserved by PyTorch but unallocated."
)


@pytest.mark.parametrize("checkpointing", [False, True, "auto", "auto, and nothing is kept"])
def test_a_row_that_does_not_fit_is_named_and_what_is_saved_goes_on(checkpointing, plain, tmp_path, monkeypatch):
    """It was a traceback of 55 lines."""
    calls = iter(range(99))
    keeps = checkpointing in (False, "auto")
    settings = {**SETTINGS, "gradient_checkpointing": checkpointing if isinstance(checkpointing, bool) else "auto"}
    if not keeps:
        monkeypatch.setattr(activations, "free_bytes", lambda device, processes: 0)

    def filled(*args, stock=Run.loss):
        if next(calls) == 5 + (settings["gradient_checkpointing"] == "auto"):  # in the third step, whatever measures goes before
            raise FULL
        return stock(*args)

    with monkeypatch.context() as patched, pytest.raises(UserError) as stopped:
        patched.setattr(Run, "loss", filled)
        patched.setattr(torch.cuda, "max_memory_allocated", lambda: 21 * 2**30)
        run(tmp_path, **settings)
    (problem,) = stopped.value.problems
    assert "few.json[" in problem.where and "with 21.0 GiB of tensors at the peak: CUDA out of memory." in problem.what
    assert "0.50 GiB is free." in problem.what and "reserved by PyTorch" not in problem.what
    assert "goes on from checkpoint-2" in problem.fix
    key = "set gradient_checkpointing: true" if keeps else "lower row_tokens (now 700) or max_pixels (now 1003520), and choose"
    assert key in problem.fix
    if keeps:
        assert same(run(tmp_path, **SETTINGS, resume=True, gradient_checkpointing=True), adapter(plain))


def test_where_prefixes_are_shared_that_is_named_as_something_to_leave_out(tmp_path):
    for shares in (True, False):
        fix = out_of_memory(FULL, config(tmp_path), "here", "a row", keeps=False, shares=shares).fix
        assert ("max_pixels (now 1003520), or set share_prefix: off, and choose" in fix) is shares


def test_held_out_records_that_do_not_fit_are_named_too(tmp_path, monkeypatch):
    stock = Run.loss

    def filled(of, *row):
        if not of.model.training:
            raise FULL
        return stock(of, *row)

    monkeypatch.setattr(Run, "loss", filled)
    with pytest.raises(UserError, match=r"few\.json\[0\].* does not fit"):
        run(tmp_path, max_steps=1, eval_meta_file=few_records(tmp_path))


def test_a_model_that_does_not_fit_is_said_in_words(tmp_path, monkeypatch):
    def full(*args):
        raise FULL

    monkeypatch.setattr(accelerate.Accelerator, "prepare", full)
    with pytest.raises(UserError, match=r"model: data/tiny: .* does not fit(?s:.*)nothing is saved yet"):
        run(tmp_path)
    assert not checkpoints(tmp_path / "run")


def test_cudnns_attention_is_off_once_a_model_is_loaded():
    torch.backends.cuda.enable_cudnn_sdp(True)
    load_base(TINY, "float32")
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_an_error_that_nobody_foresaw_leaves_no_worker_that_the_exit_waits_for(tmp_path, monkeypatch):
    """They ignore signals: a run that was over with its traceback on the screen never ended, and kept its GPU."""

    def broken(*args):
        raise KeyError("forced")

    monkeypatch.setattr(loop, "train_step", broken)
    with pytest.raises(KeyError) as held:  # as the interpreter does to its end
        run(tmp_path, dataloader_num_workers=1)
    assert held.tb and not multiprocessing.active_children()


def test_a_worker_that_hangs_is_ended_with_the_run(tmp_path, monkeypatch):
    """It ignores the signal by which torch would end it, and the run waited for it for ever."""

    def hung(*args):
        if multiprocessing.parent_process():
            (tmp_path / "hangs").touch()
            time.sleep(1000)
        while not (tmp_path / "hangs").exists():
            time.sleep(0.01)
        raise KeyError("forced")

    monkeypatch.setattr(Rows, "build", hung)
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.5)
    monkeypatch.setattr(loop, "train_step", hung)
    with pytest.raises(KeyError):
        run(tmp_path, dataloader_num_workers=1)
    assert not multiprocessing.active_children()


def broken_off():
    """As Python's own thread does that hands over a tensor, when whoever asked for it is gone."""
    try:
        raise ConnectionResetError("broken off")
    except ConnectionResetError:
        sys.excepthook(*sys.exc_info())


def test_a_worker_prints_no_traceback_of_a_row_that_nobody_waits_for(capfd):
    """It stood beside the words of the run, which knew why."""
    (worker := Workers().Process(target=broken_off)).start()
    worker.join()
    assert worker.exitcode == 0 and capfd.readouterr() == ("", "")


def test_workers_end_where_one_is_gone_before_all_are_started(tmp_path, monkeypatch):
    calls = iter(range(9))

    @contextlib.contextmanager
    def told(stock=state.no_word_of_workers):
        with stock():
            yield
        if next(calls) == 0:
            raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")

    monkeypatch.setattr(state, "no_word_of_workers", told)
    with pytest.raises(UserError, match="a process that decodes pictures is gone") as held:
        run(tmp_path, dataloader_num_workers=1)
    assert held.tb and not multiprocessing.active_children()


def test_word_of_a_worker_that_is_gone_is_heard_though_another_one_is_starting():
    """Within a fork Python printed what torch raised, and went on."""
    starting = [False]

    def gone(*args):
        raise RuntimeError("is killed by signal")

    os.register_at_fork(after_in_parent=lambda: starting[0] and os.kill(os.getpid(), signal.SIGCHLD))
    before, worker = signal.signal(signal.SIGCHLD, gone), Workers().Process(target=int)
    try:
        starting[0] = True
        with pytest.raises(RuntimeError, match="is killed by signal"), no_word_of_workers():
            worker.start()
    finally:
        starting[0] = False
        signal.signal(signal.SIGCHLD, before)
        worker.join()


@pytest.mark.parametrize(
    ("device", "kind", "fused"),
    [("cpu", DistributedType.NO, None), ("cuda", DistributedType.NO, True), ("cuda", DistributedType.DEEPSPEED, None)],
)
def test_the_optimizer_is_one_kernel_on_a_gpu(device, kind, fused, tmp_path):
    accelerator = SimpleNamespace(device=torch.device(device), distributed_type=kind)
    weights = [torch.nn.Parameter(torch.zeros(2))]
    assert setup.new_optimizer(weights, config(tmp_path), accelerator).defaults["fused"] is fused


@pytest.mark.parametrize(("device", "kind", "straight"), [("cpu", "NO", False), ("cuda", "NO", True), ("cuda", "DEEPSPEED", False)])
def test_the_base_is_read_straight_to_a_gpu(device, kind, straight):
    accelerator = SimpleNamespace(device=torch.device(device), distributed_type=DistributedType[kind])
    assert setup.straight_to(accelerator) == (torch.device(device) if straight else None)


def test_a_base_that_is_read_straight_to_a_device_is_the_same_there():
    """Its embedding is tied to the head, and nothing is hung on it that would move what it is given."""
    straight, plain = load_base(TINY, "float32", device=torch.device("cpu")), load_base(TINY, "float32")
    elsewhere = load_base(TINY, "float32", device=torch.device("meta"))
    assert {of.device.type for of in elsewhere.parameters()} == {"meta"}
    assert same(straight.state_dict(), plain.state_dict())
    assert straight.lm_head.weight is straight.get_input_embeddings().weight
    assert not [module for module in straight.modules() if hasattr(module, "_hf_hook")]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_rows_are_pinned_for_a_gpu_and_come_through_it_whole(device, monkeypatch):
    holder = SimpleNamespace(
        accelerator=SimpleNamespace(device=torch.device(device)),
        config=SimpleNamespace(dataloader_num_workers=0),
        rows_of=lambda of: SimpleNamespace(built_or_problems=None),
    )
    loader = Run.loader(holder, [0, None], SimpleNamespace(plan=SimpleNamespace(rows=[[0]])))
    assert loader.pin_memory == (device == "cuda") and list(loader.sampler) == [0, 0]
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    problem = Problem("here", "is broken", "mend it")
    row, problems = pin_memory(({"labels": torch.ones(2), "max_length_q": 3}, [problem]))
    assert row["labels"].sum() == 2 and row["max_length_q"] == 3 and problems == [problem]
    error = UserError(problem)
    assert pin_memory(error) is error


def test_held_out_rows_are_built_by_the_workers(tmp_path, monkeypatch):
    def noted(self, index, stock=Rows.build):
        with (tmp_path / "built_by").open("a") as file:
            file.write(f"{os.getpid()} {len(self)}\n")
        return stock(self, index)

    monkeypatch.setattr(Rows, "build", noted)
    run(tmp_path, max_steps=1, rows_per_step=1, eval_meta_file=few_records(tmp_path), dataloader_num_workers=1)
    by = [line.split()[0] for line in (tmp_path / "built_by").read_text().splitlines()]
    assert len(set(by)) == 2 and str(os.getpid()) not in by  # one for training, one for evaluation
