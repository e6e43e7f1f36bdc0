"""Before the first step and around it: what was launched, who else writes here, which signals came, whom the run reports to."""

import ctypes
import os
import platform
import secrets
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, suppress
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.reduction import ForkingPickler
from threading import Thread
from traceback import walk_tb
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DistributedType, InitProcessGroupKwargs, broadcast_object_list, gather_object
from numpy.typing import NDArray
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import register_rendezvous_handler, rendezvous
from torch.multiprocessing.reductions import reduce_tensor
from torch.utils.data._utils import signal_handling

from qwenvl_ft.config import Config
from qwenvl_ft.console import print_line
from qwenvl_ft.data.targets import tower_trains
from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.folders.objects import address_of
from qwenvl_ft.folders.whole import LOCK, held
from qwenvl_ft.train.sharded import shard_problem

HANGUP = getattr(signal, "SIGHUP", None)  # Windows has none
PR_SET_PDEATHSIG = 1  # of Linux's prctl.h
STOPS = [signal.SIGINT, signal.SIGTERM, *([HANGUP] if HANGUP else [])]
GRACE_SECONDS = 5  # for the step that runs; torch's launcher kills 30 s after a signal, and there is a checkpoint to be written
STUCK_SECONDS = 20  # after a signal without coming to the end of a row
# Where trackers read their project; mlflow's own, MLFLOW_EXPERIMENT_NAME, is read by accelerate.
PROJECTS = {"wandb": "WANDB_PROJECT", "swanlab": "SWANLAB_PROJ_NAME"}
FIXES = {
    "wandb": "run `wandb login`, or set WANDB_MODE=offline in the environment",
    "swanlab": "run `swanlab login`, or set SWANLAB_MODE=offline in the environment",
    "mlflow": "set MLFLOW_TRACKING_URI in the environment to a server that answers, or to a file as sqlite:///mlflow.db",
}
ATTEMPT = "attempt"  # the scheme of of_this_attempt
SEEN_SECONDS = 5  # in which what one machine writes shows on the others, where a folder is shared


class Signals:
    """Holds Ctrl-C, SIGTERM and SIGHUP back until the end of a step, or of a row where the step is a long one.

    A second one ends the process as usual; but not under torch's launcher, which sends on what the process may have got already,
    and kills after 30 s by itself.
    """

    def __init__(self, ddp_timeout: int):
        self.timeout = timedelta(seconds=ddp_timeout)
        self.cpus: Any = None  # the group of all processes in which they agree, where it is not the one of their gradients

    def __enter__(self) -> "Signals":
        self.received, self.since = 0, 0.0
        self.terminals = [number for number in (1, 2) if os.isatty(number)]
        wanted = [number for number in STOPS if number != HANGUP or signal.getsignal(number) != signal.SIG_IGN]  # as with nohup
        self.before = {number: signal.signal(number, self._note) for number in wanted}
        self.launched, self.heard = "TORCHELASTIC_RUN_ID" in os.environ, False
        if self.launched and os.environ.get("LOCAL_RANK") in ("0", "1"):  # one speaks for all, or another where that one is gone
            reading, writing = os.pipe()
            os.set_blocking(writing, False)
            signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
            Thread(target=self._say_stuck, args=(reading,), daemon=True).start()
        return self

    def _say_stuck(self, reading: int) -> None:
        """Speaks where a signal is not heard: on GPUs a process waits outside Python for one that is gone, until it is killed."""
        with os.fdopen(reading, "rb", buffering=0) as pipe:
            while (got := pipe.read(1)) and got[0] not in STOPS:
                pass
        if got:
            time.sleep(STUCK_SECONDS)
            if not self.heard:
                print_line("told to end, and no row ends: another process of this run seems to be gone; go on with resume=true")

    def _note(self, number: int, frame: Any) -> None:
        self.received, self.since = number, self.since or time.monotonic()
        if not self.launched:
            signal.signal(number, self.before[signal.Signals(number)])
        if number == HANGUP:  # the terminal is gone, and writing to it would end the run before it has saved
            for terminal in self.terminals:
                os.dup2(os.open(os.devnull, os.O_WRONLY), terminal)

    def stop(self, accelerator: Accelerator, midway: bool = False) -> int:
        """The signal that any process got, or 0: the same in all of them, so all have to ask. `midway` through a step one counts
        only after the time that it was given to end."""
        counts = self.received and not (midway and time.monotonic() - self.since < GRACE_SECONDS)
        got = torch.tensor([bool(counts and self.received == number) for number in STOPS]).long()
        if accelerator.num_processes > 1:  # over the CPUs: a look at a GPU waits for all that it has to do
            if self.cpus is None and accelerator.device.type != "cpu":
                self.cpus = torch.distributed.new_group(backend="gloo", timeout=self.timeout)
            torch.distributed.all_reduce(got, group=self.cpus)
        self.heard = bool(self.received)
        return next((int(number) for number, count in zip(STOPS, got.tolist(), strict=True) if count), 0)

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        self.heard = True
        if (writing := signal.set_wakeup_fd(-1)) >= 0:
            os.close(writing)
        # Once one process has ended, the launcher sends SIGTERM to the others: they end by themselves, each with its own exit code.
        ending = self.launched and kind is SystemExit
        for number, handler in self.before.items():
            signal.signal(number, signal.SIG_IGN if ending else handler)


@contextmanager
def no_word_of_workers() -> Iterator[None]:
    """torch raises, in the midst of whatever runs, when a worker is gone; here it waits. For where that would leave something half
    done, or where Python prints it and goes on: in a fork, or at an object's end."""
    if sys.platform == "win32":
        yield
        return
    signal_handling._set_SIGCHLD_handler()  # torch's own, which the first loader would set in the midst of its making
    came: list[tuple[int, Any]] = []
    before = signal.signal(signal.SIGCHLD, lambda *heard: came.append(heard))
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)
    if came and callable(before):
        before(*came[0])


class Worker(get_context().Process):  # type: ignore[misc]
    """A process that decodes pictures. It ignores the signal by which torch ends one that hangs."""

    def run(self) -> None:
        """What goes wrong with a row is handed over in its place. A thread of Python's that hands one over prints a traceback where
        whoever asked for it broke off, as the run does for a worker that is gone, in words."""
        with redirect_stderr(None):
            super().run()

    def terminate(self) -> None:
        """At once; torch has asked it to end before, and waited."""
        self.kill()


class Workers(type(get_context())):  # type: ignore[misc]
    """What starts them, as Python does here."""

    Process = Worker


def begin_worker(worker: int) -> None:
    """For the processes that decode pictures: a terminal sends Ctrl-C to them, too, and the run needs them until its step ends.

    They end with the process that started them: one that was just handing over a row would print a traceback of Python's own.
    """
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
    ForkingPickler.register(torch.Tensor, hand_over)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def hand_over(tensor: torch.Tensor) -> tuple[Any, ...]:
    """How a worker pickles a tensor: as a name in shared memory, or with its bytes where that is full. A container has 64 MiB of it
    if nobody asks for more; torch's own way would lose the row there, and the run wait for it for ever."""
    try:
        return reduce_tensor(tensor.share_memory_())  # type: ignore[no-any-return, no-untyped-call]
    except RuntimeError:
        return from_bytes, (tensor.flatten().view(torch.uint8).numpy(), tensor.dtype, tensor.shape)


def from_bytes(held: NDArray[np.uint8], dtype: torch.dtype, shape: torch.Size) -> torch.Tensor:
    """The tensor that has these bytes."""
    return torch.from_numpy(held).view(dtype).view(shape)


def launch_problem(accelerator: Accelerator, before: Mapping[str, str]) -> Problem | None:
    """What came up that was not asked for; `before` is the environment before accelerate looked at it."""
    if before.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true"):  # which accelerate leaves out on a CPU without a word
        why = "accelerate's FSDP was asked for, which would share out the adapter, too: in no checkpoint would it be whole"
        return Problem("launch", why, "start with configs/ddp.yaml, and set shard_base: true: the base is shared out by FSDP2")
    asked, came, what = int(before.get("WORLD_SIZE", "1")), accelerator.num_processes, None
    deepspeed = before.get("ACCELERATE_USE_DEEPSPEED") == "true"
    command = "accelerate launch --multi_gpu --num_processes N train.py --config FILE"
    fix = f"start with `{command}`, where N is the number of GPUs (configs/ddp.yaml says it, too)"
    if asked != came:
        what = f"{asked} processes were asked for (WORLD_SIZE) and {came} came up"
    elif came == 1 and "WORLD_SIZE" not in before and {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= before.keys():
        # accelerate starts a single one with --cpu, and where no two GPUs are, whatever --num_processes says; that it said more
        # shows in the address that it made up for them to meet at.
        what = "several processes were asked for (accelerate set MASTER_ADDR) and one came up"
    if deepspeed and accelerator.distributed_type != DistributedType.DEEPSPEED:
        what = "DeepSpeed was asked for and did not come up"
    if what and not deepspeed and before.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true"):
        fix = f"for processes on the CPU leave --cpu out: `ACCELERATE_USE_CPU=true {command}`; or give --num_processes 1"
    elif what and not torch.cuda.is_available():
        hidden = f" (CUDA_VISIBLE_DEVICES is '{before['CUDA_VISIBLE_DEVICES']}')" if "CUDA_VISIBLE_DEVICES" in before else ""
        what += f": torch finds no GPU here{hidden}"
        cpu = "on the CPU, without DeepSpeed," if deepspeed else "on the CPU"
        fix = f"mend the driver until `nvidia-smi` lists it; or train {cpu} with `ACCELERATE_USE_CPU=true {command}`"
    return Problem("launch", what, fix) if what else None


def check_gpus() -> None:
    """Raises UserError for more processes than GPUs, which is a traceback of CUDA's otherwise."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if 0 < gpus < here and os.environ.get("ACCELERATE_USE_CPU", "false").lower() not in ("1", "true"):
        what = f"{here} processes were asked for on this machine, and it shows {gpus} GPU{'s' * (gpus > 1)}"
        option = "--nproc_per_node" if by_torch(os.environ) else "--num_processes"
        raise UserError(Problem("launch", what, f"give {option} {gpus}, or look at CUDA_VISIBLE_DEVICES"))


def by_torch(environ: Mapping[str, str]) -> bool:
    """Whether nothing but the variables that torchrun sets says what is launched: accelerate's launcher adds its own to them."""
    return "LOCAL_RANK" in environ and "ACCELERATE_MIXED_PRECISION" not in environ


@contextmanager
def alone(accelerator: Accelerator, config: Config) -> Iterator[None]:
    """Keeps every other run out of output_dir to the end of this one. Raises UserError, in all processes, where one is there."""
    refused: list[Any] = [None]
    lock = None
    if accelerator.is_main_process:
        try:
            lock = held(config.output_dir)
        except UserError as error:
            refused = [error]
    broadcast_object_list(refused)
    if refused[0]:
        raise refused[0]
    try:
        yield
    finally:
        if lock:
            lock.release()


def check_shared(accelerator: Accelerator, config: Config, kept_elsewhere: bool) -> None:
    """Raises UserError, in all processes, where machines would go on from an output_dir that is not the same on all of them: under
    DeepSpeed each process writes its part of a checkpoint there, and with `resume` each reads it. Not so where checkpoints are
    `kept_elsewhere` and brought to each machine before a run. Called while the folder is this run's alone.
    """
    if accelerator.num_processes == int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes)):
        return
    path, written = config.output_dir / LOCK, [""]
    if accelerator.is_main_process:
        written = [path.read_text()]
    broadcast_object_list(written)
    deadline, seen = time.monotonic() + SEEN_SECONDS, ""
    while seen != written[0] and time.monotonic() < deadline:
        with suppress(OSError):
            seen = path.read_text()
        time.sleep(0.1 * (seen != written[0]))
    if all(gather_object([seen == written[0]])):
        return
    place, what = f"output_dir: {config.output_dir}", "is not the same folder on all machines"
    if accelerator.distributed_type == DistributedType.DEEPSPEED or (config.resume and not kept_elsewhere):
        why = "from which they would go on" if config.resume else "each of which would keep a part of every checkpoint"
        raise UserError(Problem(place, f"{what}, {why}", "set it to a folder that all of them share, such as a mount of NFS"))
    if accelerator.is_main_process:
        print_line(
            f"{place} {what}: what this run leaves is on {platform.node()}, and resume=true asks for a folder that all share"
        )


def lost(error: Exception, config: Config, num_processes: int) -> Problem | None:
    """What to say where another process of the run, or one that decodes its pictures, is gone; None for any other error."""
    fix = (
        "see what stands above; if it was killed, mostly for want of memory, give it more or ask for less; then resume=true goes on"
    )
    # torch says so once it learns of the death; before that, what the process was sending breaks off.
    if isinstance(error, EOFError | ConnectionError) or str(error).startswith("DataLoader worker"):
        return Problem("dataloader_num_workers", f"a process that decodes pictures is gone: {error or 'it breaks off'}", fix)
    among = num_processes > 1 and (isinstance(error, torch.distributed.DistError) or "gloo" in str(error).lower())
    if among and ("timed out" in str(error).lower() or "timeout" in str(error).lower()):
        what = (
            f"another process of this run has not answered for {config.ddp_timeout} s: it is gone, or hangs, or the network is cut"
        )
        fix = "see what its machine says; mend that, or raise ddp_timeout if it takes longer; then resume=true goes on"
        return Problem("launch", what, fix)
    if among:
        return Problem("launch", "another process of this run is gone, and what was learnt since the last checkpoint with it", fix)
    return None


def of_this_attempt(url: str, timeout: timedelta) -> Iterator[tuple[Store, int, int]]:
    """Where processes meet, for torch, as env:// says it, but with names of this attempt's own: where torchrun is told a
    --master_addr its store outlives a restart, and in it whoever starts first would find the addresses of those that are gone."""
    for store, rank, world in rendezvous(f"env{url.removeprefix(ATTEMPT)}", timeout=timeout):
        yield PrefixStore(f"{ATTEMPT}-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store), rank, world


register_rendezvous_handler(ATTEMPT, of_this_attempt)  # type: ignore[no-untyped-call]


def start(config: Config) -> Accelerator:
    """The accelerator, in all processes of the run; raises UserError where the launch does not do what was asked."""
    before = dict(os.environ)
    check_gpus()
    find = tower_trains(config.lora_on)  # a row without pictures leaves the tower unused
    # accelerate's launcher tells its processes that there is no GPU, torch's leaves it to them; DeepSpeed wants one.
    on_cpu = by_torch(before) and not torch.accelerator.is_available() and before.get("ACCELERATE_USE_DEEPSPEED") != "true"
    waits = InitProcessGroupKwargs(timeout=timedelta(seconds=config.ddp_timeout), init_method=f"{ATTEMPT}://")
    try:
        accelerator = Accelerator(
            cpu=on_cpu,
            log_with=list(config.report_to) or None,
            project_dir=config.output_dir,
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=find), waits],
        )
    except RuntimeError as error:  # the others have not come
        if problem := lost(error, config, int(before.get("WORLD_SIZE", "1"))):
            raise UserError(problem) from error
        raise
    if problem := launch_problem(accelerator, before):
        raise UserError(problem)
    if config.shard_base and (problem := shard_problem(config, accelerator)):
        raise UserError(problem)
    if plugin := accelerator.state.deepspeed_plugin:
        if plugin.zero_stage == 3 and config.eval_metric != "loss":
            what = "ZeRO-3 shares out weights, and processes that answer other questions would wait for each other's"
            fix = "set eval_metric: loss and score the adapter with `qwenvl-ft eval`, or start with configs/zero2.yaml"
            raise UserError(Problem(f"eval_metric: {config.eval_metric}", what, fix))
        if plugin.zero_stage == 3 and config.quantization != "none":
            what = "ZeRO-3 shares out weights, and would leave the scales of quantized ones whole where it takes them apart"
            fix = "start with configs/ddp.yaml: the base in so few bits fits on each GPU, or set quantization: none"
            raise UserError(Problem(f"quantization: {config.quantization}", what, fix))
        rows = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "gradient_clipping": config.max_grad_norm}
        plugin.deepspeed_config.update(rows)
    if address := address_of(config.output_dir):
        raise UserError(Problem(f"output_dir: {address}", "is no folder", "give one, or train by the command `qwenvl-ft train`"))
    try:
        config.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(Problem(f"output_dir: {config.output_dir}", f"{error.strerror}", "choose another folder")) from error
    return accelerator


def open_trackers(accelerator: Accelerator, config: Config, before: Mapping[str, str]) -> dict[str, str]:
    """Opens what `report_to` names, before the model is loaded: wandb wants a key and its server. Returns the run's id there, by
    tracker, of which those `before` are kept, so that it goes on as the same run; only the main process knows them all."""
    ids = {"wandb": secrets.token_hex(4)} | dict(before)
    settings = {
        key: value if isinstance(value, (int, float, str)) else str(value) for key, value in config.model_dump(mode="json").items()
    }
    projects = (os.environ.get(variable) for tracker, variable in PROJECTS.items() if tracker in config.report_to)
    goes_on = {"name": config.run_name, "id": ids["wandb"], "resume": "allow"}
    of_mlflow = {"run_name": config.run_name, "run_id": ids.get("mlflow")}
    try:
        accelerator.init_trackers(
            next(filter(None, projects), "qwenvl_ft"), None, {"wandb": goes_on, "swanlab": goes_on, "mlflow": of_mlflow}
        )
        for tracker in accelerator.trackers:
            if tracker.name != "mlflow" or "mlflow" not in before:  # which refuses a setting that has changed, such as resume
                tracker.store_init_configuration(settings)
            if tracker.name == "mlflow" and accelerator.is_main_process:
                ids["mlflow"] = tracker.tracker.info.run_id  # it takes no id of ours
    except Exception as error:
        packages = (frame.f_globals.get("__name__", "").split(".")[0] for frame, _ in walk_tb(error.__traceback__))
        if not (name := next((package for package in packages if package in FIXES), "")):
            raise
        raise UserError(Problem(f"report_to: {name}", str(error).splitlines()[0], f"{FIXES[name]}, or report_to=none")) from error
    return ids
