"""Everything that is printed for a person: problems, plans, drawings, a run's progress. Nothing else prints, or knows rich."""

import io
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from qwenvl_ft.errors import MOST_ALONE, Problem, alike

Drawing = Panel | Table
console = Console(highlight=False)
error_console = Console(stderr=True, highlight=False)


def print_json(value: Any) -> None:
    """One JSON document on standard output, for a program."""
    console.file.write(writable(json.dumps(value, ensure_ascii=False, indent=1)) + "\n")


def writable(text: str) -> str:
    """Half of a surrogate pair, from a broken JSON or a broken file name, as its escape: no stream takes it as it is."""
    return text.encode("utf-8", "backslashreplace").decode()


def print_line(text: str, style: str = "") -> None:
    """One line on standard output."""
    console.print(Text(text, style), soft_wrap=True)


def print_note(*lines: str) -> None:
    """Lines on standard error, beside an answer on standard output."""
    for line in lines:
        error_console.print(Text(line, "yellow"), soft_wrap=True)


def pass_on(text: str) -> None:
    """What another program says, as it is, on standard error."""
    error_console.file.write(writable(text))
    error_console.file.flush()


def print_drawing(drawing: Drawing) -> None:
    """A table or a panel on standard output."""
    console.print(drawing)


def print_problems(problems: Sequence[Problem], every: bool = False, more: str = "") -> None:
    """Where, what and the fix of each kind, or of `every` problem, on standard error; then how many, and how to see `more`."""
    groups = alike(problems, len(problems) if every else MOST_ALONE)
    for group in groups:
        where, what, fix = map(writable, (group.first.where, group.first.what, group.first.fix))
        if group.count > 1:
            where = writable(", ".join(group.places[:MOST_ALONE])) + f" and {group.count - MOST_ALONE:,} more"
            what += ", for one" * group.differ
        error_console.print(Text.assemble((where, "bold"), ": ", what, ("\n  fix: ", "green"), fix), soft_wrap=True)
    count = f"{len(problems):,} problem{'s' * (len(problems) != 1)}"
    if len(groups) < len(problems):
        count += f", {len(groups)} different" + f" ({more})" * bool(more)
    error_console.print(Text(count, "bold red"))


@contextmanager
def counting(what: str, patience_s: float = 2) -> Iterator[Callable[[int, int | None], None]]:
    """A progress bar for work that calls back with (done, total; None if nobody knows it), once it has taken `patience_s` seconds.

    On standard error, so that --json stays clean.
    """
    columns = TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    progress = Progress(*columns, console=error_console, transient=True, disable=not error_console.is_terminal)
    task, began = progress.add_task(what), time.monotonic()

    def tell(done: int, total: int | None) -> None:
        progress.update(task, completed=done, total=total)
        if time.monotonic() - began >= patience_s:
            progress.start()  # which does nothing the second time

    try:
        yield tell
    finally:
        progress.stop()


def save_svg(drawing: Drawing, path: Path) -> None:
    """A drawing as a picture file, for a report or a README."""
    pen = Console(record=True, width=110, file=io.StringIO(), force_terminal=True, highlight=False)
    pen.print(drawing)
    drawn = re.sub(r"@font-face \{.*?\}", "", pen.export_svg(title="qwenvl-ft show"), flags=re.DOTALL)  # no font from the web
    path.write_text(drawn, encoding="utf-8")


def draw_panel(pieces: Sequence[tuple[str, str]], title: str, subtitle: str) -> Drawing:
    """A frame around (text, style) pieces that follow one another."""
    return Panel(Text.assemble(*pieces), title=title, subtitle=subtitle)


def draw_counts(title: str, rows: Sequence[tuple[str, str]]) -> Table:
    """A two-column table of facts."""
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2))
    for name, value in rows:
        table.add_row(name, value)
    return table


def draw_table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table with a line over its columns."""
    table = Table(*head, title=title, title_justify="left", box=SIMPLE_HEAD)
    for row in rows:
        table.add_row(*map(writable, row))
    return table


def draw_files(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """What was read: each meta-file with its containers and records, and how often these count where they are weighed."""
    facts = []
    for part in summary["files"]:
        kinds = ", ".join(kind if number == 1 else f"{number:,} x {kind}" for kind, number in part["containers"].items())
        weighed = f", weighed by {part['weight']:g}: {part['used']:,} good" if part["weight"] != 1 else ""
        facts.append(("file", f"{part['meta']}: {kinds}, {part['records']:,} records{weighed}"))
    return [*facts, ("forms", ", ".join(f"{form} {number:,}" for form, number in summary["forms"].items()))]


def draw_media_position(counts: dict[str, int]) -> list[tuple[str, str]]:
    """A row for `draw_counts`, where records show something: on which side of their text, and how many were moved there."""
    sides = {"first": "before the text", "last": "after it", "mixed": "among it"}
    shown = [f"{side} in {counts[name]:,}" for name, side in sides.items() if counts[name]]
    moved = f"; media_position moved those of {counts['moved']:,}" * (counts["moved"] > 0)
    return [("media", f"{', '.join(shown)} of the records read{moved}")] if shown else []


def draw_checks(checks: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows for `draw_counts`: how much records teach and how long they are, where a model has counted that."""
    names = {"taught_tokens": "taught", "tokens": "lengths"}
    return [(name, checks[key]["shown"]) for key, name in names.items() if key in checks]


def draw_paid(paid: dict[str, int], tokens: int) -> list[tuple[str, str]]:
    """A row for `draw_counts`, where records share a prefix: what they show, and how much of it is run."""
    if paid["tokens"] == tokens:
        return []
    shown = f"{paid['media_shown']:,} pictures and videos shown, {paid['media']:,} paid for; " * (paid["media_shown"] > 0)
    return [("shared", f"{shown}{paid['tokens']:,} tokens run, {tokens / paid['tokens']:.1f} times fewer")]


def draw_features(bytes: int, not_kept: str | None) -> list[tuple[str, str]]:
    """A row for `draw_counts`, where what the vision tower makes is kept."""
    if not_kept or not bytes:
        return []
    size = f"{bytes / 2**30:,.1f} GiB" if bytes >= 2**29 else f"{bytes / 2**20:,.1f} MiB"
    return [("features", f"of the frozen vision tower: made in the first epoch and kept, {size} in 16 bits")]


def draw_plan(summary: dict[str, Any]) -> Table:
    """What `qwenvl-ft plan` shows."""
    tokens = summary["tokens"]
    facts = [
        *draw_files(summary),
        ("records", f"{summary['records']:,}, {summary['used']:,} used, {len(summary['skipped']):,} problems"),
        (
            "pictures",
            f"{summary['pictures']:,}, {summary['pictures_shrunk']:,} of them made smaller, by max_pixels or rounding",
        ),
        ("tokens", f"{tokens['total']:,} ({tokens['min']:,} to {tokens['max']:,} a record, median {tokens['median']:,})"),
        *draw_media_position(summary["media_position"]),
        *draw_paid(summary["paid"], tokens["total"]),
        *draw_features(**summary["features"]),
        ("taught", f"{summary['taught_tokens']:,} tokens"),
        *(("trains", line) for line in summary["trains"]),
        ("rows", f"{summary['rows']:,} of {summary['row_tokens']:,} tokens, {summary['fill']:.1%} full"),
        ("steps", f"{summary['steps']:,} ({summary['steps_per_epoch']:,} an epoch)"),
    ]
    facts += draw_checks(summary["checks"])
    return draw_counts("Plan", facts + [("note", note) for note in summary["notes"]])


def draw_memory(memory: dict[str, Any]) -> Table:
    """What `qwenvl-ft plan` forecasts for a card."""
    facts = [(name, f"{gib:6.2f} GiB") for name, gib in memory["parts_gib"].items() if gib]
    verdict = "fits" if memory["fits"] else "does not fit"
    facts.append(("in all", f"{memory['gib']:6.2f} GiB of {memory['card_gib']:.1f}: {verdict}"))
    kept = f"activations of {memory['kept']} of {memory['layers']} layers"
    if memory["kept"] != memory["auto_keeps"]:
        kept += f"; gradient_checkpointing: auto would keep those of {memory['auto_keeps']}"
    facts.append(("kept", kept))
    if memory["minutes_an_epoch"]:
        facts.append(("time", f"about {memory['minutes_an_epoch']:,.1f} minutes an epoch at {memory['assumed']}, which is assumed"))
    facts += [("fix", memory["advice"])] if memory["advice"] else []
    return draw_counts(f"Memory on {memory['card']}, simulated: the heaviest row, of {memory['row_tokens']:,} tokens", facts)


class Display:
    """A run's progress: a bar where there is a terminal, a line where one is due everywhere. Quiet on other processes."""

    def __init__(self, total: int, done: int, quiet: bool):
        self.quiet, self.total = quiet, total
        self.began, self.done_before = time.monotonic(), done
        columns = TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
        self.progress = Progress(*columns, console=console, disable=quiet or not console.is_terminal)
        self.task = self.progress.add_task("training", total=total, completed=done)
        self.progress.start()
        self.told: set[Problem] = set()

    def step(self, step: int, facts: dict[str, float]) -> None:
        """`facts`: learning_rate, tokens_per_s, taught_tokens_per_s, epoch; with line_loss, which is the mean since the last line,
        and run_loss, which is that over the run, a line is due."""
        self.progress.update(self.task, completed=step)
        if not self.quiet and "line_loss" in facts:
            left = (time.monotonic() - self.began) / (step - self.done_before) * (self.total - step)
            rates = f"{facts['tokens_per_s']:,.0f} tokens/s ({facts['taught_tokens_per_s']:,.0f} taught)"
            losses = f"loss={facts['line_loss']:.4f} ({facts['run_loss']:.4f} over the run)"
            epoch, rate = f"epoch {facts['epoch']:.2f}", f"lr {facts['learning_rate']:.2e}"
            self.say(f"step {step}/{self.total}  {epoch}  {losses}  {rate}  {rates}  ETA {left:.0f} s")

    def say(self, line: str) -> None:
        """A line beside the bar."""
        if not self.quiet:
            self.progress.console.print(Text(line), soft_wrap=True)

    def skipped(self, problems: Sequence[Problem]) -> None:
        """Says what was left out, each record once in a run."""
        for problem in problems:
            if problem not in self.told:
                self.say(f"skipped {problem.where}: {problem.what}")
        self.told.update(problems)

    def stop(self) -> None:
        """Takes the bar away."""
        self.progress.stop()
