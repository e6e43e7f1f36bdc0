"""The runs below a folder, as their files have them: nothing is kept but what a file's size and time say is still the same.

A run is a folder with config.yaml and one of plan.json and metrics.jsonl; its name is its path below the folder. One that the board
started and that has written nothing yet is a config beside its place, first.yaml for first/, and a log, first.log.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from qwenvl_ft.config import read_yaml
from qwenvl_ft.errors import UserError
from qwenvl_ft.folders.runs import NAME
from qwenvl_ft.folders.whole import holder

LAST_STEPS = 20  # whose mean pace is the ETA's
LOG_BYTES = 16_000  # of a log's end
MOST_FILES = 64  # that are kept as they were read
Lines = tuple[dict[str, Any], ...]
T = TypeVar("T")


@dataclass(frozen=True)
class Run:
    """A run as it is now. `holder`: (process, machine) of who trains into it."""

    name: str
    folder: Path
    settings: dict[str, Any]
    lines: Lines
    plan: dict[str, Any]
    results: dict[str, Any]
    holder: tuple[int, str] | None
    changed: float

    @property
    def state(self) -> str:
        """running, finished, or stopped: before its last step, for whatever reason."""
        if self.holder:
            return "running"
        ended = "stopped_early" in self.results or (self.steps and self.step >= self.steps)
        return "finished" if self.results and ended else "stopped"

    @property
    def step(self) -> int:
        """The last one that was done."""
        return int(self.lines[-1].get("step", 0)) if self.lines else 0

    @property
    def steps(self) -> int:
        """As many as there are to be; 0 where the plan does not say it."""
        return int(self.plan.get("steps", 0))

    @property
    def seconds_left(self) -> float | None:
        """Until the last step, at the pace of the last few; None where nothing runs."""
        paces = [line["taught_tokens"] / line["taught_tokens_per_s"] for line in self.lines[-LAST_STEPS:]
                 if line.get("taught_tokens_per_s")]  # fmt: skip
        return sum(paces) / len(paces) * (self.steps - self.step) if paces and self.state == "running" else None

    def last(self, key: str) -> float | None:
        """The newest value of a key of metrics.jsonl."""
        return next((line[key] for line in reversed(self.lines) if key in line), None)

    @property
    def log(self) -> Path:
        """Where a run that the board starts prints to."""
        return self.folder.with_name(f"{self.folder.name}.log")


class Kept:
    """What `read` makes of files, as long as they stay as they are."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, Path], tuple[tuple[int, int], Any]] = {}

    def of(self, path: Path, read: Callable[[Path], T], otherwise: T) -> T:
        """What a file holds; `otherwise` where it is not there or cannot be read."""
        try:
            state = path.stat()
            stamp, key = (state.st_size, state.st_mtime_ns), (read.__qualname__, path)
            if key not in self.values or self.values[key][0] != stamp:
                found = stamp, read(path)
                self.values.pop(key, None)  # the newest stands last
                while len(self.values) >= MOST_FILES:
                    self.values.pop(next(iter(self.values)), None)
                self.values[key] = found
                return found[1]
            return self.values[key][1]  # type: ignore[no-any-return]
        except (OSError, ValueError, UserError, KeyError):  # KeyError: another request let go of it
            return otherwise


def read_lines(path: Path) -> Lines:
    """The objects of a JSON-lines file that is being written: a line that is half there is left for the next time."""
    return tuple(value for value in map(_object, path.read_text(encoding="utf-8", errors="replace").splitlines()) if value)


def _object(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def read_object(path: Path) -> dict[str, Any]:
    """An object in a JSON file; an empty one for whatever else is there."""
    return _object(path.read_text(encoding="utf-8")) or {}


def read_settings(path: Path) -> dict[str, Any]:
    """What a run's config.yaml says."""
    return read_yaml(path)[0]


def read_metrics(path: Path) -> Lines:
    """The steps of metrics.jsonl that are whole."""
    wanted = ("step", "loss", "taught_tokens")
    return tuple(line for line in read_lines(path) if all(isinstance(line.get(key), int | float) for key in wanted))


def folders(root: Path) -> Iterator[tuple[str, Path]]:
    """(name, folder) of the runs below a folder, two floors down at most: a sweep has its runs in a folder of its own."""
    for path in sorted({*root.glob("*/config.yaml"), *root.glob("*/*/config.yaml")}):
        folder = path.parent
        is_run = (folder / "plan.json").is_file() or (folder / "metrics.jsonl").is_file()
        if is_run and not NAME.search(folder.name) and not folder.name.startswith("."):
            yield folder.relative_to(root).as_posix(), folder


def read_run(name: str, folder: Path, kept: Kept) -> Run:
    """A run from its folder."""
    metrics = folder / "metrics.jsonl"
    changed = max((path.stat().st_mtime for path in (metrics, folder / "config.yaml") if path.is_file()), default=time.time())
    return Run(
        name, folder, kept.of(folder / "config.yaml", read_settings, {}), kept.of(metrics, read_metrics, ()),
        kept.of(folder / "plan.json", read_object, {}), kept.of(folder / "all_results.json", read_object, {}),
        holder(folder), changed,
    )  # fmt: skip


def differences(runs: Sequence[Run]) -> list[tuple[str, list[Any]]]:
    """(key, the value of each run) of the settings in which runs differ."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    rows = [(key, [run.settings.get(key) for run in runs]) for key in keys]
    return [(key, values) for key, values in rows if any(value != values[0] for value in values)]


def log_end(path: Path) -> str:
    """The last lines of a log; nothing where there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - LOG_BYTES))
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""


@lru_cache(maxsize=1)
def defaults() -> dict[str, Any]:
    """Every key of a config that has a default, with it."""
    from qwenvl_ft.config import Config

    return {key: of.get_default() for key, of in Config.model_fields.items() if not of.is_required()}
