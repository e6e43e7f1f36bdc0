"""Two processes: the weights of one, with DDP, with DeepSpeed and going on; and what stops one stops both."""

import json
import shutil
from contextlib import nullcontext
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from qwenvl_ft.errors import UserError
from qwenvl_ft.folders.whole import LOCK
from qwenvl_ft.train import launch as launching
from qwenvl_ft.train import loop
from qwenvl_ft.train.state import Run
from tests.forked import train_two
from tests.runs import adapter, config, difference, launch, metrics, same
from tests.train.conftest import SETTINGS


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The same run in two processes, as a user launches them."""
    folder = tmp_path_factory.mktemp("two")
    launch(folder, "run", "--multi_gpu", "--num_processes", "2", "--main_process_port", "29613", **SETTINGS)
    return folder / "run"


def test_two_processes_end_where_one_does(plain, two):
    assert difference(adapter(plain), adapter(two)) < 1e-3
    for one, other in zip(metrics(plain), metrics(two), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)


def test_the_variables_that_torchrun_sets_are_enough(two, tmp_path, forks):
    """Without a GPU only processes that torch's own agent had started came together; kubeflow, Ray and srun set no more than these."""
    codes, said = forks.train(tmp_path, fault=("tests.forked", "launched_by_torch"), **SETTINGS)
    assert codes == [0, 0] and "2 x cpu" in said, said[-3000:]
    assert same(adapter(two), adapter(tmp_path / "run"))


def test_after_a_restart_the_addresses_of_those_that_are_gone_are_not_found(monkeypatch):
    """torchrun that is told a --master_addr serves one store for all attempts: a process of the second looked for the other host's of the
    first, broke, and in the end two waited for each other that were of different attempts."""
    served = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    given = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(served.port), "RANK": "1", "WORLD_SIZE": "2"}
    for name, value in (given | {"TORCHELASTIC_USE_AGENT_STORE": "True"}).items():
        monkeypatch.setenv(name, value)

    def meet(attempt):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        url = f"{launching.ATTEMPT}://"
        return next(torch.distributed.rendezvous(url, 1, 2, timeout=timedelta(seconds=10)))

    store, rank, world = meet("0")
    store.set("address", "of a process")
    assert (rank, world) == (1, 2) and meet("0")[0].check(["address"]) and not meet("1")[0].check(["address"])


def test_gradients_are_exchanged_once_a_step(monkeypatch, tmp_path):
    """With every row they were, since its forward ran outside of no_sync."""
    exchanged, rows = [], [0, 1, 2]

    def exchange(state, bucket):
        exchanged.append(bucket.buffer().clone())
        (future := torch.futures.Future()).set_result(bucket.buffer())
        return future

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(nn.Linear(4, 1))
        model.register_comm_hook(None, exchange)
        bare, run = model.module, Run.__new__(Run)
        run.config, run.model, run.bare, run.deepspeed = config(tmp_path), model, bare, False
        run.features, run.untouched = {}, {}
        run.optimizer = torch.optim.SGD(bare.parameters(), lr=0.0)
        run.accelerator = Accelerator(cpu=True)
        monkeypatch.setattr(run.accelerator, "no_sync", lambda of: of.no_sync())  # as it does where processes are several
        run.prepared = SimpleNamespace(taught_tokens=lambda row: 1)
        monkeypatch.setattr(run, "loss", lambda row, keep: run.model(row["x"]).sum())
        built = [({"x": torch.full((1, 4), float(row)), "labels": torch.tensor([[1]])}, []) for row in rows]
        loop.train_step(run, 0, rows, iter(built), SimpleNamespace(stop=lambda *of, **named: 0))
    finally:
        torch.distributed.destroy_process_group()
    (sums,) = exchanged
    assert sums.tolist() == pytest.approx([1.0] * 5)  # of rows of 0, 1 and 2, by 3 tokens


def test_two_processes_go_on_where_one_stopped(plain, tmp_path, forks):
    """As after a card was taken away: the same rows in the same order, equal up to the order of sums."""
    shutil.copytree(plain, tmp_path / "run")
    for path in [*(tmp_path / "run").glob("adapter_*"), *(tmp_path / "run").glob("checkpoint-*")]:
        if path.name != "checkpoint-2":
            path.unlink() if path.is_file() else shutil.rmtree(path)
    train_two(forks, tmp_path, **SETTINGS, resume=True)
    assert difference(adapter(plain), adapter(tmp_path / "run")) < 1e-3


@pytest.fixture(scope="module")
def zero(request, tmp_path_factory, forks):
    """The same run with DeepSpeed."""
    folder = tmp_path_factory.mktemp("zero")
    train_two(forks, folder, request.param, **SETTINGS)
    return folder, request.param


@pytest.mark.parametrize("zero", [2], indirect=True)
def test_zero_2_in_two_processes_ends_with_the_weights_of_ddp(two, zero, tmp_path, forks):
    """To the bit where nothing is clipped: DeepSpeed sums the norm in another order, and Adam enlarges its last bit."""
    folder, _ = zero
    assert json.loads((folder / "run" / "checkpoint-2" / "state.json").read_text())["deepspeed"]
    assert difference(adapter(two), adapter(folder / "run")) < 1e-3
    for stage in (0, 2):
        (tmp_path / str(stage)).mkdir()
        train_two(forks, tmp_path / str(stage), stage, **SETTINGS, max_grad_norm=1e9)
    assert same(adapter(tmp_path / "0" / "run"), adapter(tmp_path / "2" / "run"))


@pytest.mark.parametrize("zero", [2, 3], indirect=True)
def test_under_deepspeed_too_a_run_goes_on_to_the_same_bits_and_no_pickle_is_in_its_checkpoint(zero, tmp_path, forks):
    """DeepSpeed's own checkpoint is made of pickles, and going on from one ran whatever code was in it."""
    folder, zero_stage = zero
    shutil.copytree(folder / "run", tmp_path / "run")
    whole = adapter(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    (tmp_path / "run" / "adapter_model.safetensors").unlink()
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file() and "checkpoint" in str(path)} <= {
        ".json",
        ".safetensors",
        ".md",
        ".jsonl",
    }
    states = {path.name for path in (tmp_path / "run" / "checkpoint-2").glob("opt*")}
    assert states == {"optimizer-0.safetensors", "optimizer-1.safetensors"}
    train_two(forks, tmp_path, zero_stage, **SETTINGS, resume=True)
    assert same(whole, adapter(tmp_path / "run"))


def test_processes_recompute_what_the_one_with_the_least_memory_has_to(two, tmp_path, forks):
    codes, said = forks.train(
        tmp_path, fault=("tests.forked", "with_memory_of", 2**40, 0), gradient_checkpointing="auto", **SETTINGS
    )
    assert codes == [0, 0] and said.count("activations of 0 of 4 layers are kept, 4 recomputed") == 1, said[-3000:]
    assert same(adapter(two), adapter(tmp_path / "run"))


@pytest.mark.parametrize("zero", [2, 3], indirect=True)
def test_under_deepspeed_too_some_layers_may_keep_their_activations(zero, tmp_path, forks):
    """ZeRO-3 gathers a layer's weights once more where it is recomputed; those that it gathers are no activations."""
    folder, stage = zero
    codes, said = forks.train(tmp_path, stage, fault=("tests.forked", "keeping", 2), **SETTINGS, gradient_checkpointing="auto")
    assert codes == [0, 0] and "activations of 2 of 4 layers are kept, 2 recomputed" in said, said[-3000:]
    assert same(adapter(folder / "run"), adapter(tmp_path / "run"))


def skipped(folder):
    return json.loads((folder / "all_results.json").read_text())["skipped"]


def test_two_processes_skip_them_alike(skipping, tmp_path, forks):
    """Of three rows a process has one more pass than rows; the broken records are in rows of both."""
    folder, settings = skipping
    two = train_two(forks, tmp_path, **settings)
    assert difference(adapter(folder), adapter(two)) < 1e-3
    for alone, both in zip(metrics(folder), metrics(two), strict=True):
        assert alone["loss"] == pytest.approx(both["loss"], rel=1e-5)
    where = [{problem["where"] for problem in skipped(of)} for of in (folder, two)]
    assert where[0] == where[1]


def test_deepspeed_skips_them_alike(skipping, tmp_path, forks):
    """Its engine steps within the last backward: there is no later moment to divide in."""
    folder, settings = skipping
    zero = train_two(forks, tmp_path, zero_stage=2, **settings)
    assert difference(adapter(folder), adapter(zero)) < 1e-3
    assert len(skipped(zero)) == 2


@pytest.mark.parametrize("stage", [2, 3])
def test_a_gradient_that_is_not_finite_stops_a_run_under_deepspeed_too(stage, tmp_path, forks):
    """DeepSpeed undoes such a step without a word, and the run ended with exit code 0."""
    codes, said = forks.train(tmp_path, stage, fault=("tests.torture.faults", "spoiling", "gradient", 1, 1))
    assert 1 in codes and 0 not in codes
    assert "the gradient's norm is nan" in said and "few.json[" in said, said[-3000:]
    assert not list((tmp_path / "run").glob("**/adapter_model.safetensors"))


@pytest.mark.parametrize(("by", "option"), [({"LOCAL_RANK": "0"}, "--nproc_per_node 1"),
                                            ({"LOCAL_RANK": "0", "ACCELERATE_MIXED_PRECISION": "no"}, "--num_processes 1")])  # fmt: skip
def test_more_processes_than_gpus_are_answered_in_the_words_of_their_launcher(by, option, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in {"LOCAL_WORLD_SIZE": "2", **by}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=option):
        launching.check_gpus()


def test_accelerates_fsdp_is_refused_and_not_left_out():
    """accelerate trains without it on a CPU; on GPUs a checkpoint would have held the first process's shards of the adapter."""
    before = {"WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    accelerator = SimpleNamespace(num_processes=2, distributed_type=DistributedType.MULTI_CPU)
    assert launching.launch_problem(accelerator, before) is None
    assert "shard_base: true" in launching.launch_problem(accelerator, before | {"ACCELERATE_USE_FSDP": "true"}).fix


@pytest.mark.parametrize("from_the_start", [True, False])
def test_a_process_that_never_answers_ends_the_run_after_ddp_timeout(from_the_start, tmp_path, forks):
    """As where the network between two machines is cut. torch waits for half an hour, and then raised in the midst of its own files."""
    codes, said = forks.train(tmp_path, fault=("tests.forked", "hanging", 1, from_the_start), ddp_timeout=6)
    assert codes[0] == 1 and "another process of this run has not answered for 6 s" in said, said[-3000:]
    assert "Traceback" not in said


def test_machines_that_have_other_output_dirs_are_told_so_before_training(tmp_path, forks):
    """They went on from what only one of them had, after a restart: after hours."""
    (tmp_path / "other").mkdir()
    codes, said = forks.train(tmp_path, fault=("tests.forked", "on_another_machine", 1, tmp_path / "other"), resume=True)
    assert 1 in codes and 0 not in codes and "is not the same folder on all machines, from which they would go on" in said, said[
        -3000:
    ]
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(("kind", "settings", "kept_elsewhere", "refused"), [
    ("MULTI_CPU", {}, False, False), ("DEEPSPEED", {}, False, True),
    ("MULTI_CPU", {"resume": True}, False, True), ("MULTI_CPU", {"resume": True}, True, False),
])  # fmt: skip
def test_what_machines_must_share_is_what_they_go_on_from(kind, settings, kept_elsewhere, refused, tmp_path, monkeypatch, capsys):
    accelerator = SimpleNamespace(num_processes=2, is_main_process=True, distributed_type=DistributedType[kind])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).write_text("process 1 on here")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setattr(launching, "broadcast_object_list", lambda values: None)
    for others, problem in ((True, False), (False, refused)):
        monkeypatch.setattr(launching, "gather_object", lambda own, others=others: [*own, others])
        with pytest.raises(UserError) if problem else nullcontext():
            launching.check_shared(accelerator, config(tmp_path, **settings), kept_elsewhere)
        noted = not others and not refused
        assert ("asks for a folder that all share" in " ".join(capsys.readouterr().out.split())) == noted


def test_processes_that_read_different_records_do_not_begin(tmp_path, forks):
    """Each machine may have its own copy of the files: rows of the one were trained with those of the other, or they waited for ever."""
    codes, said = forks.train(tmp_path, fault=("tests.forked", "reading_others", 1))
    assert 1 in codes and 0 not in codes and "its processes read different records" in said, said[-3000:]
    assert not list((tmp_path / "run").glob("checkpoint-*"))
