"""Two hosts on one machine: network namespaces joined by a wire that can be cut. What a run on both does there is compared with one
process's, and each fault must end in words, or go on.

    python scripts/two_hosts.py                     # all of it, about ten minutes on two cores
    python scripts/two_hosts.py start --zero 2      # one part, with DeepSpeed on the CPU
    python scripts/two_hosts.py --shard             # with the base shared out by FSDP2

Both hosts run what `qwenvl-ft launch --to torchrun` writes. Needs root, iproute2 and Linux; where no namespace can be made it says so
and ends well.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from safetensors.torch import load_file  # noqa: E402

SETTINGS = {
    "model": ROOT / "data/tiny", "train_data_dir": ROOT / "data/sample/images", "row_tokens": 700, "rows_per_step": 4,
    "learning_rate": 1e-3, "lora_rank": 4, "lora_alpha": 8, "lora_dropout": 0.1, "dtype": "float32", "dataloader_num_workers": 0,
    "gradient_checkpointing": False, "max_steps": 6, "save_steps": 2, "save_total_limit": 100,
}  # fmt: skip
WAITS_S = 10  # ddp_timeout of the runs that lose a host
BOUND_S = 400  # of a run of six steps: seconds where nothing else runs, minutes where much does
# Of a host that is alone: torchrun starts its process three times more, and each time it imports for half a minute where much else
# runs, and gloo tries five times as long as it was told.
END_S = 4 * (5 * WAITS_S + 90)
IN_WORDS = "another process of this run"
SHIM = "import os\nif 'LOCAL_RANK' in os.environ:\n    import tests.deepspeed_on_cpu\n"


class NoNamespaces(Exception):
    """Why two hosts cannot be made here."""


class Hosts:
    """Two network namespaces, 10.77.0.1 and 10.77.0.2, and what runs in them."""

    def __init__(self, folder: Path, zero: int | None = None, shard: bool = False):
        self.folder, self.zero, self.shard = folder, zero, shard
        self.running = list[subprocess.Popen[bytes]]()  # each host's torchrun
        self.names = [f"qft{os.getpid()}-{host}" for host in range(2)]
        records = json.loads((ROOT / "data/sample/train.json").read_text())
        (folder / "few.json").write_text(json.dumps(records[:8]))
        (folder / "sitecustomize.py").write_text(SHIM if zero else "")

    def __enter__(self) -> "Hosts":
        if sys.platform != "linux" or os.geteuid() or not shutil.which("ip"):
            raise NoNamespaces("it takes root and iproute2, on Linux")
        try:
            for name in self.names:
                ip("netns", "add", name)
            ip("link", "add", "v0", "netns", self.names[0], "type", "veth", "peer", "name", "v1", "netns", self.names[1])
            for host, name in enumerate(self.names):
                ip("-n", name, "addr", "add", f"10.77.0.{host + 1}/24", "dev", f"v{host}")
                for device in ("lo", f"v{host}"):
                    ip("-n", name, "link", "set", device, "up")
        except subprocess.CalledProcessError as error:
            self.__exit__()
            raise NoNamespaces(error.stderr.strip()) from None
        return self

    def __exit__(self, *error: object) -> None:
        for host, name in enumerate(self.names):
            self.lose(host)
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    def lose(self, host: int) -> None:
        """Kills all that runs there, as the loss of the machine does."""
        pids = subprocess.run(["ip", "netns", "pids", self.names[host]], capture_output=True, text=True).stdout.split()
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        if self.running:
            self.running[host].wait()

    def wire(self, state: str) -> None:
        """Cuts it with "down", joins it again with "up"."""
        ip("-n", self.names[0], "link", "set", "v0", state)

    def start(self, run: str, before: tuple[str, str] = ("", ""), **settings: object) -> list[subprocess.Popen[bytes]]:
        """Both hosts' part of a run into folder/run; what a host does `before` is a line of its shell."""
        config = self.write(run, **settings, shard_base=self.shard)
        file = self.folder / f"{run}.sh"
        options = [*(["--zero", str(self.zero)] if self.zero else []), "-o", str(file), str(config)]
        subprocess.run([sys.executable, "-m", "qwenvl_ft", "launch", "--to", "torchrun", "--nodes", "2", "--gpus", "1", *options],
                       cwd=ROOT, check=True, capture_output=True, env=environment(self.folder))  # fmt: skip
        self.running = []
        for host, name in enumerate(self.names):
            line = f"{before[host] or 'true'} && exec bash {file} {host} 10.77.0.1"
            log = (self.folder / f"{run}-{host}.log").open("wb")
            self.running.append(subprocess.Popen(
                ["ip", "netns", "exec", name, "bash", "-c", line], cwd=ROOT, stdout=log, stderr=log, start_new_session=True,
                env=environment(self.folder) | {"GLOO_SOCKET_IFNAME": f"v{host}"},
            ))  # fmt: skip
        return self.running

    def write(self, run: str, **settings: object) -> Path:
        """The settings of a run."""
        path = self.folder / f"{run}.yaml"
        values = {**SETTINGS, "train_meta_file": self.folder / "few.json", "output_dir": self.folder / run, **settings}
        path.write_text("".join(f"{key}: {json.dumps(value, default=str)}\n" for key, value in values.items()))
        return path

    def said(self, run: str, host: int) -> str:
        """What a host has printed."""
        return (self.folder / f"{run}-{host}.log").read_text(errors="replace")

    def wait(self, run: str, seconds: float = BOUND_S) -> list[int]:
        """The exit codes of both hosts; raises AssertionError for one that does not end."""
        deadline = time.monotonic() + seconds
        for host, process in enumerate(self.running):
            try:
                process.wait(max(0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                said = "\n".join(f"host {of}: {self.said(run, of)[-3000:]}" for of in range(2))
                raise AssertionError(f"host {host} has not ended after {seconds:.0f} s:\n{said}") from None
        return [process.returncode for process in self.running]

    def until(self, run: str, steps: int) -> None:
        """Waits until so many steps are done."""
        metrics, deadline = self.folder / run / "metrics.jsonl", time.monotonic() + BOUND_S
        while not metrics.is_file() or len(metrics.read_text().splitlines()) < steps:
            assert all(process.poll() is None for process in self.running), self.said(run, 0)[-2000:] + self.said(run, 1)[-2000:]
            assert time.monotonic() < deadline, f"{steps} steps are not done after {BOUND_S} s:\n{self.said(run, 0)[-3000:]}"
            time.sleep(0.02)

    def workers(self, host: int) -> list[int]:
        """The processes that torchrun has started there."""
        pid = self.running[host].pid
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def environment(folder: Path) -> dict[str, str]:
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "PAI_"))}
    places = os.pathsep.join([str(ROOT), str(folder)])
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    on_cpu = {"DS_ACCELERATOR": "cpu", "ACCELERATE_TORCH_DEVICE": "cpu", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    return ours | on_cpu | {"OMP_NUM_THREADS": "1", "PATH": path, "PYTHONPATH": places, "NO_COLOR": "1", "COLUMNS": "200"}


def difference(one: Path, other: Path) -> float:
    """The largest of two adapters' values."""
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    assert a.keys() == b.keys()
    return max((a[key] - b[key]).abs().max().item() for key in a)


def alone(hosts: Hosts) -> Path:
    """The run of one process, once."""
    folder = hosts.folder / "alone"
    if not folder.exists():
        config = hosts.write("alone")
        done = subprocess.run([sys.executable, "-m", "qwenvl_ft", "train", "--config", str(config)], cwd=ROOT, capture_output=True,
                              env=environment(hosts.folder), text=True)  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


def uninterrupted(hosts: Hosts) -> Path:
    """The run of two hosts, once."""
    if not (hosts.folder / "start").exists():
        hosts.start("start")
        assert hosts.wait("start") == [0, 0], hosts.said("start", 0)[-3000:] + hosts.said("start", 1)[-3000:]
    return hosts.folder / "start"


def start(hosts: Hosts) -> str:
    """Both train what one process does."""
    found = difference(alone(hosts), uninterrupted(hosts))
    facts = json.loads((hosts.folder / "start" / "checkpoint-2" / "state.json").read_text())
    assert (facts["processes"], facts["deepspeed"]) == (2, bool(hosts.zero)), facts
    assert found < (1e-4 if hosts.zero else 1e-5), found  # DeepSpeed sums the norm that clips in another order
    return f"equal to one process's adapter to {found:.1e}"


def words(hosts: Hosts, run: str, host: int, since: float) -> str:
    """How long it took until a host said what is wrong, and until it had ended."""
    said = 0.0
    while hosts.running[host].poll() is None:
        said = said or time.monotonic() * (IN_WORDS in hosts.said(run, host))
        assert time.monotonic() < since + END_S, f"host {host} has not ended after {END_S} s:\n{hosts.said(run, host)[-3000:]}"
        time.sleep(0.2)
    assert hosts.running[host].returncode and IN_WORDS in hosts.said(run, host), hosts.said(run, host)[-3000:]
    return f"host {host} said why after {(said or time.monotonic()) - since:.0f} s and had ended after {time.monotonic() - since:.0f} s"


def cut(hosts: Hosts) -> str:
    """The wire is cut in the middle of a step: both processes end, and say why. Host 0's torchrun ends after its last attempt; host
    1's asks host 0 before it starts anything anew, and that is torch's own wait: it is not waited for.
    """
    hosts.start("cut", max_steps=2000, ddp_timeout=WAITS_S)
    hosts.until("cut", 3)
    hosts.wire("down")
    since = time.monotonic()
    try:
        first = words(hosts, "cut", 0, since)
        assert IN_WORDS in hosts.said("cut", 1), hosts.said("cut", 1)[-3000:]
        return f"{first}; host 1 said why, too"
    finally:
        hosts.lose(1)
        hosts.wire("up")


def kill(hosts: Hosts) -> str:
    """Host 1 is gone: host 0 ends, and says why."""
    hosts.start("kill", max_steps=2000, ddp_timeout=WAITS_S)
    hosts.until("kill", 3)
    hosts.lose(1)
    return words(hosts, "kill", 0, time.monotonic())


def restart(hosts: Hosts) -> str:
    """A process of host 1 is killed: torchrun starts both anew, and they end where the uninterrupted run does."""
    whole = uninterrupted(hosts)
    hosts.start("restart", ddp_timeout=BOUND_S)
    hosts.until("restart", 3)
    for worker in hosts.workers(1):
        os.kill(worker, signal.SIGKILL)
    assert hosts.wait("restart", 2 * BOUND_S) == [0, 0], hosts.said("restart", 0)[-4000:] + hosts.said("restart", 1)[-3000:]
    went_on = hosts.said("restart", 0).count("going on from")
    assert went_on == 1, hosts.said("restart", 0)[-3000:]
    found = difference(whole, hosts.folder / "restart")
    assert found == 0, found
    return "went on from its newest whole checkpoint, to the uninterrupted run's bits"


def apart(hosts: Hosts) -> str:
    """output_dir is not the same folder: refused before the first step."""
    (hosts.folder / "apart").mkdir()
    hosts.start("apart", ("", f"mount -t tmpfs tmpfs {hosts.folder}/apart"), ddp_timeout=WAITS_S)
    assert 0 not in hosts.wait("apart", END_S)
    assert "is not the same folder on all machines" in hosts.said("apart", 0), hosts.said("apart", 0)[-3000:]
    assert not list((hosts.folder / "apart").glob("checkpoint-*"))
    return "an output_dir that is not shared is refused before the first step"


def data(hosts: Hosts) -> str:
    """The data lies on host 0 only: host 1 says so, and host 0 does not wait for ever."""
    hosts.start("data", ("", f"mount -t tmpfs tmpfs {ROOT}/data/sample"), ddp_timeout=WAITS_S)
    assert 0 not in hosts.wait("data", END_S)
    assert "train_data_dir" in hosts.said("data", 1) and "is not there" in hosts.said("data", 1), hosts.said("data", 1)[-3000:]
    assert IN_WORDS in hosts.said("data", 0), hosts.said("data", 0)[-3000:]
    return "host 1 named what it lacks, and host 0 ended in words"


def places(hosts: Hosts) -> str:
    """Host 1 has its data elsewhere, with other times, and its own cache: that is the same run."""
    whole = uninterrupted(hosts)
    elsewhere = hosts.folder / "elsewhere"
    shutil.copytree(ROOT / "data/sample/images", elsewhere)
    for path in elsewhere.iterdir():
        os.utime(path, (1e9, 1e9))
    images = f"{ROOT}/data/sample/images"
    later = f"mount --bind {elsewhere} {images} && export XDG_CACHE_HOME={hosts.folder}/cache"
    hosts.start("places", ("", later))
    assert hosts.wait("places") == [0, 0], hosts.said("places", 1)[-3000:]
    found = difference(whole, hosts.folder / "places")
    assert found == 0, found
    return "files of other times and a cache of its own change no bit"


CASES: dict[str, Callable[[Hosts], str]] = {
    "start": start, "places": places, "apart": apart, "data": data, "kill": kill, "cut": cut, "restart": restart,
}  # fmt: skip


def main() -> int:
    reader = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    reader.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; all, unless some are given")
    reader.add_argument("--zero", type=int, choices=(2,), help="with DeepSpeed, ZeRO of this stage")
    reader.add_argument("--shard", action="store_true", help="with shard_base: true")
    given = reader.parse_args()
    if unknown := set(given.cases) - CASES.keys():
        reader.error(f"no such case: {', '.join(sorted(unknown))}")
    failed = 0
    with tempfile.TemporaryDirectory(prefix="two-hosts-") as folder:
        try:
            with Hosts(Path(folder), given.zero, given.shard) as hosts:
                for name in given.cases or CASES:
                    began = time.monotonic()
                    try:
                        result = CASES[name](hosts)
                    except AssertionError as error:
                        failed, result = failed + 1, f"FAILED: {error}"
                        hosts.lose(0), hosts.lose(1)
                    print(f"{name:8} {result} ({time.monotonic() - began:.0f} s)", flush=True)
        except NoNamespaces as why:
            print(f"skipped: no two hosts can be made here: {why}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
