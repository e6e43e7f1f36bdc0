"""What goes wrong inside a run: each function gives what a fork calls, with its rank, before it trains.

File operations are seen by an audit hook, so nothing of the run is written for it; what safetensors and torch write themselves
passes unseen between two operations.
"""

import errno
import os
import resource
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.torture.forks import Fault

# Operations, and where their arguments hold the folder that a path is relative to.
OPERATIONS = {"open": None, "os.mkdir": 2, "os.rename": 2, "os.remove": 1, "os.rmdir": 1, "os.link": 2, "os.chmod": 2}
STAGES = ("rotate", "write_results", "save")  # functions that an operation may be part of; any other is part of the start


def on_operation(folder: Path, act: Callable[[str, str, Any], object]) -> None:
    """Calls `act(operation, path, arguments)` before each operation of this process on what is in `folder`."""
    me, inside = os.getpid(), str(folder) + os.sep

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in OPERATIONS and os.getpid() == me and isinstance(args[0], str | os.PathLike):
            path, at = os.fspath(args[0]), OPERATIONS[event]
            if at and args[at] >= 0:
                path = os.path.join(os.readlink(f"/proc/self/fd/{args[at]}"), path)
            if path.startswith(inside):
                act(event, path.removeprefix(inside), args)

    sys.addaudithook(hook)


def writes(event: str, args: Any) -> bool:
    """Whether the operation wants room on the disk."""
    return event in ("os.mkdir", "os.rename") or (event == "open" and bool(args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)))


def noting(folder: Path, log: Path) -> Fault:
    """No fault: writes down each operation, what it is part of, and whether it writes."""

    def start(rank: int) -> None:
        file = os.open(log.with_suffix(f".{rank}"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)

        def note(event: str, path: str, args: Any) -> None:
            frame, within = sys._getframe().f_back, set()
            while frame:
                within.add(frame.f_code.co_name)
                frame = frame.f_back
            stage = next((stage for stage in STAGES if stage in within), "start")
            os.write(file, f"{stage}\t{event}\t{path}\t{int(writes(event, args))}\n".encode())

        on_operation(folder, note)

    return start


def dying(folder: Path, number: int, who: int = 0, group: bool = True, opened: bool = False) -> Fault:
    """A SIGKILL before the operation; `opened`: if it opens a file for writing, when the file has been made and is empty."""

    def start(rank: int) -> None:
        left = number

        def die(event: str, path: str, args: Any) -> None:
            nonlocal left
            left -= 1
            if left == -1:
                if opened and event == "open" and writes(event, args):
                    os.close(os.open(args[0], args[2]))
                os.kill(0 if group else os.getpid(), signal.SIGKILL)

        if rank == who:
            on_operation(folder, die)

    return start


def keeping_features(cache: Path, number: int = -1, share: float = 0.0) -> Fault:
    """What the vision tower makes is kept in `cache`, empty or as it is; a SIGKILL when of the row of this number, counted from 0, so
    much is written, and no entry in the index."""

    def start(rank: int) -> None:
        os.environ["XDG_CACHE_HOME"] = str(cache)
        from qwenvl_ft.data.features import Features

        left, stock = number, Features._write

        def write(self: Features, row: int, held: bytes) -> None:
            nonlocal left
            left -= 1
            if left == -1 and rank == 0:
                self.part = self.part or self._new_part()
                with self.part.open("ab") as part:
                    part.write(held[: int(share * len(held))])
                os.kill(0, signal.SIGKILL)
            stock(self, row, held)

        Features._write = write  # type: ignore[method-assign]

    return start


def full_disk(folder: Path, number: int) -> Fault:
    """From this writing operation on, no more room."""

    def start(rank: int) -> None:
        done = 0

        def refuse(event: str, path: str, args: Any) -> None:
            nonlocal done
            if writes(event, args):
                done += 1
                if done > number:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / path))

        on_operation(folder, refuse)

    return start


def limited_files(limit: int) -> Fault:
    """No file may grow beyond this: the system answers EFBIG, since Python ignores SIGXFSZ."""
    return lambda rank: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def spoiling(what: str, number: int, who: int) -> Fault:
    """A NaN in the loss, the gradient or the evaluation of a row, the process's `number`-th; or in the weights, after a step."""

    def start(rank: int) -> None:
        import torch

        from qwenvl_ft.train.state import Run

        loss_of, step, rows = Run.loss, torch.optim.AdamW.step, Counter[bool]()

        def spoilt(*args: Any) -> Any:
            loss: Any = loss_of(*args)
            learns = torch.is_grad_enabled()
            rows[learns] += 1
            if rank == who and rows[learns] == number and learns == (what != "evaluation"):
                if what == "gradient":
                    loss.register_hook(lambda gradient: gradient * float("nan"))
                elif what != "weights":
                    return loss * float("nan")
            return loss

        def spoilt_step(self: Any, *args: Any) -> Any:
            done = step(self, *args)
            if what == "weights" and rows[True] >= number:
                self.param_groups[0]["params"][0].data.view(-1)[0] = float("nan")
            return done

        setattr(Run, "loss", spoilt)  # noqa: B010
        setattr(torch.optim.AdamW, "step", spoilt_step)  # noqa: B010

    return start
