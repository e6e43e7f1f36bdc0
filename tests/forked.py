"""Training in two processes without a launcher: forks of one process that has imported everything, kept for all tests.

`accelerate launch` of two imports torch three times, which costs more than ten times what a run of four steps does.
"""

import ctypes
import json
import os
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

from tests.runs import BASE, ROOT, few_records
from tests.torture.forks import Training, Way, import_everything, libc


class Forks:
    """That process, from the first run that is asked of it."""

    def __init__(self):
        self.process = None

    def train(
        self, folder: Path, zero_stage: int = 0, fault: tuple = ("tests.forked", "no_fault"), **settings
    ) -> tuple[list[int], str]:
        """A run into folder/run with DDP, or with DeepSpeed: its exit codes, and what it said.

        `fault`: a module, a function in it, its arguments; what it returns is called in each process before it trains.
        """
        self.process = self.process or subprocess.Popen(
            [sys.executable, "-m", "tests.forked"], cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        values = {**BASE, "train_meta_file": few_records(folder), "output_dir": folder / "run", **settings}
        way = Way(2, values.pop("dataloader_num_workers"), zero_stage)
        self.process.stdin.write(json.dumps([way, values, folder / "log", fault], default=str) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline()), (folder / "log").read_text()

    def stop(self) -> None:
        """By an empty line: the end of the pipe comes only once every fork of this process, such as a loader's worker, has gone."""
        if self.process:
            self.process.communicate("\n")


def train_two(forks: Forks, folder: Path, zero_stage: int = 0, **settings) -> Path:
    """A run in two processes that ends well; its folder."""
    codes, said = forks.train(folder, zero_stage, **settings)
    assert codes == [0, 0], said[-4000:]
    return folder / "run"


def no_fault():
    return lambda rank: None


def launched_by_torch():
    """The process has the variables that torchrun sets, and none of accelerate's."""

    def start(rank: int) -> None:
        for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
            del os.environ[name]

    return start


def hanging(who: int, from_the_start: bool):
    """This process never comes, or stands still in its first step."""

    def start(rank: int) -> None:
        from qwenvl_ft.train import loop

        if rank == who and from_the_start:
            time.sleep(600)
        if rank == who:
            loop.train_step = lambda *of: time.sleep(600)

    return start


def on_another_machine(who: int, folder: str):
    """Each process is on a machine of its own, and this one has another folder for its output_dir."""

    def start(rank: int) -> None:
        from qwenvl_ft.train import loop

        os.environ["LOCAL_WORLD_SIZE"] = "1"
        stock = loop.check_shared
        if rank == who:
            loop.check_shared = lambda accelerator, config, kept_elsewhere: stock(
                accelerator, config.model_copy(update={"output_dir": Path(folder)}), kept_elsewhere
            )

    return start


def on_hosts(names: list[str], cut: bool):
    """Each process is in one of these network namespaces, as scripts/two_hosts.py makes them; the wire is cut in the second step."""

    def start(rank: int) -> None:
        from qwenvl_ft.train import loop

        with open(f"/run/netns/{names[rank]}") as namespace:
            assert libc.setns(namespace.fileno(), 0) == 0, os.strerror(ctypes.get_errno())
        os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "10.77.0.1", "GLOO_SOCKET_IFNAME": f"v{rank}"}
        stock, steps = loop.train_step, iter(range(100))

        def train_step(*of):
            if cut and next(steps) == 1 and rank == 0:
                subprocess.run(["ip", "link", "set", "v0", "down"], check=True)
            return stock(*of)

        loop.train_step = train_step

    return start


def reading_others(who: int):
    """The training records of this process are others than those of the rest."""

    def start(rank: int) -> None:
        from qwenvl_ft.train import origin

        stock = origin.fingerprint
        origin.fingerprint = lambda *of: stock(*of) | ({"training records": "others"} if rank == who else {})

    return start


def with_memory_of(*free: int):
    """So many bytes are free for each process."""

    def start(rank: int) -> None:
        from qwenvl_ft.train import activations

        activations.free_bytes = lambda device, processes: free[rank]

    return start


def keeping(layers: int):
    """The activations of so many layers are kept."""

    def start(rank: int) -> None:
        from qwenvl_ft.train import activations

        activations.gather_object = lambda own: [layers]

    return start


def main() -> None:
    """Reads what to train, a line of JSON each, and answers with the exit codes."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import_everything()
    while line := sys.stdin.readline().strip():
        way, settings, log, fault = json.loads(line)
        module, name, *arguments = fault
        training = Training(Way(*way), settings, Path(log), getattr(import_module(module), name)(*arguments))
        print(json.dumps(training.wait()), file=answers, flush=True)


if __name__ == "__main__":
    main()
