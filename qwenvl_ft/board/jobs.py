"""Starts, stops and goes on with runs, by the commands that a terminal would take. They live on when the board ends."""

import os
import platform
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from qwenvl_ft.board.runs import Run
from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.folders.whole import writing

PROGRAM = (sys.executable, "-m", "qwenvl_ft")


def train_command(config: Path, resume: bool = False) -> list[str]:
    """What is run, behind the program's name."""
    return ["train", "--config", str(config), *(["resume=true"] if resume else [])]


def shown(command: list[str]) -> str:
    """A command as a terminal takes it."""
    return shlex.join(["qwenvl-ft", *command])


@dataclass(frozen=True)
class Job:
    """What the board started and what has no folder yet, or failed: for the list of runs."""

    name: str
    state: str


@dataclass
class Jobs:
    """The processes that this board started, by the name of their run."""

    root: Path
    program: tuple[str, ...] = PROGRAM
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, name: str, command: list[str]) -> None:
        """Runs a command whose run is `name`. Raises UserError where one of that name is running."""
        if self.alive(name):
            raise UserError(Problem(name, "is running already", "stop it first"))
        log = self.root / f"{name}.log"
        with writing(log), log.open("ab") as file:
            file.write(f"$ {shown(command)}\n".encode())
            file.flush()
            # In a session of its own: Ctrl-C in the board's terminal is not for the run.
            self.processes[name] = subprocess.Popen(
                [*self.program, *command], stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )

    def alive(self, name: str) -> bool:
        """Whether a process that was started here still runs."""
        process = self.processes.get(name)
        return process is not None and process.poll() is None

    def state(self, name: str, run: Run | None) -> str:
        """A run's state, or that of one which has no folder yet: starting, failed; nothing where there is neither."""
        if run and run.holder:
            return "running"
        if self.alive(name):
            return "starting"
        process = self.processes.get(name)
        if process and process.returncode == 1:  # a signal that was heard ends with 128 more than its number
            return "failed"
        return run.state if run else "stopped" if process else ""

    def stop(self, name: str, run: Run | None) -> None:
        """Asks the run to end, as Ctrl-C would. Raises UserError where none runs, or not on this machine."""
        if run and run.holder:
            process, machine = run.holder
            if machine != platform.node():
                raise UserError(Problem(name, f"runs on {machine}", f"end process {process} there"))
            os.kill(process, signal.SIGTERM)
        elif self.alive(name):
            self.processes[name].terminate()
        else:
            raise UserError(Problem(name, "is not running", "go on with it, or start another"))
