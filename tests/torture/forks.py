"""Training runs as forks of one process that has imported everything: a second a run, where `accelerate launch` takes twenty.

A run is one process or two in a process group of its own, with the environment that `accelerate launch` would give them; what
they print goes to a file. Who starts it is its launcher: when one of them fails it ends the others, as torch's agent does.
"""

import atexit
import ctypes
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

ROOT = Path(__file__).parents[2]
LIMIT_S = 120  # a run takes 1 to 20 s
GRACE_S = 10  # what a launcher gives the others to save once one has failed; torch's agent gives 30 s
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
Fault = Callable[[int], object]  # called with the rank, in each process of a run before it trains
libc = ctypes.CDLL(None, use_errno=True)


class Way(NamedTuple):
    """How a run is launched."""

    processes: int = 1
    workers: int = 0
    zero_stage: int = 0

    def environment(self, rank: int, port: int) -> dict[str, str]:
        """What `accelerate launch` sets; for ZeRO what its utils/launch.py makes of configs/zero2.yaml and zero3.yaml."""
        found = {"ACCELERATE_USE_CPU": "true", "ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"}
        if self.processes > 1:
            found |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.processes), "GLOO_SOCKET_IFNAME": "lo",
                      "LOCAL_WORLD_SIZE": str(self.processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
        if self.zero_stage:
            plugin = {"ZERO_STAGE": str(self.zero_stage), "OFFLOAD_OPTIMIZER_DEVICE": "none", "OFFLOAD_PARAM_DEVICE": "none"}
            if self.zero_stage == 3:
                plugin |= {"ZERO3_INIT": "false", "ZERO3_SAVE_16BIT_MODEL": "true"}
            found |= {f"ACCELERATE_DEEPSPEED_{key}": value for key, value in plugin.items()}
            # As tests.deepspeed_on_cpu.py wants it, without which there is no DeepSpeed on a CPU.
            found |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_TORCH_DEVICE": "cpu", "ACCELERATE_USE_CPU": "false"}
        return found


def import_everything() -> None:
    """Into this process, which must stay of one thread: forks of several hang."""
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "HF_HUB_OFFLINE"), "1")
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "DS_ACCELERATOR": "cpu", "NO_COLOR": "1"}
    os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"  # pyarrow's
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  # which its engine imports, and with it torch's compiler
    import pandas  # noqa: F401  # which pyarrow imports at a run's first table
    import torch
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.models.qwen2_vl import modeling_qwen2_vl, processing_qwen2_vl  # noqa: F401

    import qwenvl_ft.cli.main
    import qwenvl_ft.train.loop  # noqa: F401

    get_checkpoint_conversion_mapping("qwen2_vl")  # a thousand patterns, compiled at the first call
    torch.set_num_threads(1)
    if len(os.listdir("/proc/self/task")) > 1:
        raise RuntimeError("importing started a thread, and forks of several threads hang")


class Training:
    """`train` with these settings, under way in forks of this process."""

    def __init__(self, way: Way, settings: dict[str, Any], log: Path, fault: Fault = lambda rank: None):
        self.log, self.hung, self.codes, self.told = log, False, dict[int, int](), False
        config = log.with_suffix(".yaml")
        config.write_text("seed: 42\n")
        arguments = ["train", "--config", str(config), *(f"{key}={json.dumps(value)}" for key, value in settings.items())]
        arguments.append(f"dataloader_num_workers={way.workers}")
        port = _free_port()
        sys.stdout.flush()
        self.pids: list[int] = []
        for rank in range(way.processes):
            leader = self.pids[0] if rank else 0
            pid = os.fork()
            if not pid:
                _train(arguments, way.environment(rank, port), rank, leader, log, fault)
            self.pids.append(pid)
            os.setpgid(pid, leader)

    def kill(self, number: int, rank: int | None = None) -> None:
        """Sends a signal to the whole group, or to one process."""
        try:
            if rank is None:
                self.told = True
                os.killpg(self.pids[0], number)
            elif self.pids[rank] not in self.codes:
                os.kill(self.pids[rank], number)
        except ProcessLookupError:
            pass

    def running(self) -> bool:
        """Whether any process still runs; what has ended is noted in `codes`, -9 for a SIGKILL."""
        for pid in self.pids:
            if pid not in self.codes and (ended := os.waitpid(pid, os.WNOHANG))[0]:
                self.codes[pid] = os.waitstatus_to_exitcode(ended[1])
        return len(self.codes) < len(self.pids)

    def wait(self, seconds: float = LIMIT_S) -> list[int]:
        """The exit codes once all have ended, which they do: `hung` says that they had to be killed."""
        deadline, failed = time.monotonic() + seconds, 0.0
        while self.running():
            if any(self.codes.values()) and not failed:
                failed = time.monotonic()
                # Of those that had theirs already a second one would end whoever is still saving.
                for rank in range(len(self.pids) * (not self.told)):
                    self.kill(signal.SIGTERM, rank)
            if (hung := time.monotonic() > deadline) or (failed and time.monotonic() > failed + GRACE_S):
                self.hung |= hung
                self.kill(signal.SIGKILL)
            time.sleep(0.005)
        return [self.codes[pid] for pid in self.pids]

    def said(self) -> str:
        """What its processes printed."""
        return self.log.read_text(errors="replace")


def _train(arguments: list[str], environment: dict[str, str], rank: int, leader: int, log: Path, fault: Fault) -> NoReturn:
    """Is the command line in this fork, to its exit code."""
    code: Any = 1
    try:
        os.setpgid(0, leader)
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for descriptor, source in ((0, os.open(os.devnull, os.O_RDONLY)), (1, out), (2, out)):
            os.dup2(source, descriptor)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.environ.update(environment)
        os.chdir(ROOT)
        if environment.get("ACCELERATE_USE_DEEPSPEED"):
            import tests.deepspeed_on_cpu  # noqa: F401
        from qwenvl_ft.cli.main import main

        fault(rank)
        main(arguments)
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(bool(stop.code))
    except BaseException:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises anew for each worker that ends, here, too
        traceback.print_exc()
    finally:  # as Python ends: threads, handlers, what is still to be printed
        try:
            threading._shutdown()  # type: ignore[attr-defined]
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


def adopt_orphans() -> None:
    """From now on, what a run leaves running becomes a child of this process."""
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1)


def orphans(seconds: float) -> list[int]:
    """The processes that runs left running for longer than that; they are killed."""
    deadline = time.monotonic() + seconds
    while left := children(os.getpid()):
        if late := time.monotonic() > deadline:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
        for pid in left:
            os.waitpid(pid, 0 if late else os.WNOHANG)
        if late:
            return left
        time.sleep(0.01)
    return []


def children(pid: int) -> list[int]:
    """The processes that this one started."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


GIVEN: set[int] = set()  # ports of this process's runs: of two at once, neither may have bound its own yet


def _free_port() -> int:
    """One below those that the system gives out, and that no other fork of this process tries first."""
    for port in range(10000 + os.getpid() * 7 % 20000, 32000):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in GIVEN:
            GIVEN.add(port)
            return port
    raise RuntimeError("no port is free")
