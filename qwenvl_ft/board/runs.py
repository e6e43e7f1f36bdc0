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
from threading import Lock
from typing import Any, TypeVar

from qwenvl_ft.config import read_yaml
from qwenvl_ft.errors import UserError
from qwenvl_ft.folders.runs import NAME
from qwenvl_ft.folders.whole import holder

LAST_STEPS = 20  # whose mean pace is the ETA's
LOG_BYTES = 16_000  # of a log's end
MOST_BYTES = 256 << 20  # of the files that are kept as they were read: far more than a page reads one after the other
WHOLE = ("step", "loss", "taught_tokens")  # which every step has
NUMBERS = (*WHOLE, "run_loss", "eval_loss", "tokens_per_s", "taught_tokens_per_s", "learning_rate", "epoch", "peak_memory_gib")
Lines = tuple[dict[str, Any], ...]
T = TypeVar("T")


@dataclass(frozen=True)
class Run:
    """A run as it is now. `holder`: (process, machine) of who trains into it; `odd`: how many lines of metrics.jsonl are no
    steps, and how many keys of plan.json are not what they should be; they are left out."""

    name: str
    folder: Path
    settings: dict[str, Any]
    lines: Lines
    plan: dict[str, Any]
    results: dict[str, Any]
    holder: tuple[int, str] | None
    changed: float
    odd: tuple[int, int]

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
        self.num_bytes = 0
        self.lock = Lock()  # of the two above: pages are made side by side

    def of(self, path: Path, read: Callable[[Path], T], otherwise: T) -> T:
        """What a file holds; `otherwise` where it is not there or cannot be read."""
        try:
            state = path.stat()
            stamp, key = (state.st_size, state.st_mtime_ns), (read.__qualname__, path)
            with self.lock:
                kept = self.values.get(key)
            if kept and kept[0] == stamp:
                return kept[1]  # type: ignore[no-any-return]
            found = read(path)
            with self.lock:
                self.let_go(key)  # the newest stands last
                while self.values and self.num_bytes + stamp[0] > MOST_BYTES:
                    self.let_go(next(iter(self.values)))
                self.values[key] = stamp, found
                self.num_bytes += stamp[0]
            return found
        except (OSError, ValueError, UserError):
            return otherwise

    def let_go(self, key: tuple[str, Path]) -> None:
        """Forgets a file."""
        if key in self.values:
            self.num_bytes -= self.values.pop(key)[0][0]


def read_lines(path: Path) -> Lines:
    """The objects of a JSON-lines file that is being written: a line that is half there is left for the next time."""
    return tuple(value for value in map(_object, path.read_text(encoding="utf-8", errors="replace").splitlines()) if value)


def _object(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def read_object(path: Path) -> dict[str, Any]:
    """An object in a JSON file; an empty one for whatever else is there."""
    return _object(path.read_text(encoding="utf-8")) or {}


def read_settings(path: Path) -> dict[str, Any]:
    """What a run's config.yaml says."""
    return read_yaml(path)[0]


def is_number(value: Any) -> bool:
    """Whether a value of a JSON file can be counted and drawn with: neither NaN nor infinite, nor of hundreds of digits."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e300 < value < 1e300


def read_metrics(path: Path) -> tuple[Lines, int]:
    """The steps of metrics.jsonl, and how many of its whole lines are none."""
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = [line for line in text[: text.rfind("\n") + 1].splitlines() if line.strip()]
    found = tuple(value for value in map(_object, lines) if value and _is_step(value))
    return found, len(lines) - len(found)


def _is_step(line: dict[str, Any]) -> bool:
    return line.keys() >= set(WHOLE) and all(is_number(line[key]) for key in NUMBERS if key in line)


def read_plan(path: Path) -> tuple[dict[str, Any], int]:
    """plan.json without the keys that are not what they should be, and how many those are; a file that is no object is one."""
    plan = _object(path.read_text(encoding="utf-8", errors="replace"))
    if plan is None:
        return {}, 1
    fits: dict[str, Callable[[Any], bool]] = {"steps": is_number, "notes": lambda value: isinstance(value, list)}
    good = {key: value for key, value in plan.items() if key not in fits or fits[key](value)}
    return good, len(plan) - len(good)


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
    no_lines: Lines = ()
    no_plan: dict[str, Any] = {}
    lines, odd_lines = kept.of(metrics, read_metrics, (no_lines, 0))
    plan, odd_keys = kept.of(folder / "plan.json", read_plan, (no_plan, 0))
    return Run(
        name, folder, kept.of(folder / "config.yaml", read_settings, {}), lines, plan,
        kept.of(folder / "all_results.json", read_object, {}), holder(folder), changed, (odd_lines, odd_keys),
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
