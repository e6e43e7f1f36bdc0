"""Runs tasks of lmms-eval, as it is installed in an environment of its own, on a model behind an OpenAI-compatible address.

lmms-eval ends with status 0 after an error, and scores what it writes in place of a failed request as if the model had said it.
So its figures count only where it has left a file of results, with an answer to every question and a failure to none.
"""

import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from qwenvl_ft.data.records import Record, Turn
from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.evaluate.hosted import Busy, Stopped, open_hosted, read_address
from qwenvl_ft.evaluate.table import range_shown

# Its own pins let a filelock of 4 in, with which 0.7.3 runs no task: it imports what is private there.
INSTALL = "python -m venv ENV && ENV/bin/pip install lmms-eval==0.7.3 'filelock<4'"
FAILED = "[LMMS_EVAL_REQUEST_FAILED"  # begins what stands in an answer's place
OTHERWISE_ASKED = ("o1", "o3", "o4", "gpt-5")  # names with these in them
ANSWER_WITHIN_S = 600  # of OpenAI's client, which asks
ANSWER_TOKENS = 1 << 20  # a task says itself how long its answers may be
STOP_SECONDS = 30
TAIL_LINES = 10
Z = 1.96  # standard errors on either side hold 95 %
COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class Served(NamedTuple):
    """Where a model answers, by which name, and the key for it, which may be empty; whether the server is one of ours."""

    url: str
    model: str
    key: str
    own: bool


# ---- the model ----


@contextmanager
def serving(model: Path, adapter: Path | None, num_concurrent: int, settings: Sequence[str], log: Path) -> Iterator[Served]:
    """`serve` in a process of its own on a free port of loopback, up until the end, however that comes but by SIGKILL.

    `settings` are more of its arguments. Raises UserError, with the end of its `log`, where it does not come up.
    """
    names = ["--name", "base", "--adapter", f"served={adapter}"] if adapter else ["--name", "served"]
    command = [
        sys.executable, "-m", "qwenvl_ft", "serve", str(model), *names, *settings, "--port", "0",
        "--max-batch", str(num_concurrent), "--timeout", str(ANSWER_WITHIN_S), "--max-answer-tokens", str(ANSWER_TOKENS),
    ]  # fmt: skip
    with log.open("w") as out, _running(subprocess.Popen(command, stdout=out, stderr=out)) as process:
        while process.poll() is None:
            if (match := re.search(r" at (http://\S+/v1) ", log.read_text(errors="replace"))) and _answers(match[1]):
                yield Served(match[1], "served", "", True)
                return
            time.sleep(0.2)
    raise UserError(Problem(f"serve {model}", f"did not start: {_tail(log)}", f"mend that; all that it said is in {log}"))


def _answers(url: str) -> bool:
    with suppress(httpx.HTTPError):  # it has said its address before it listens there
        return httpx.get(f"{url}/models", trust_env=False).is_success
    return False


def check_served(spec: str) -> Served:
    """A model behind an address, as `compare` takes it, that has answered to its name. Raises UserError where it does not."""
    url, key, _ = read_address(spec)
    hosted = open_hosted(spec)
    try:
        said = hosted.ask(Record("a first question", (Turn("user", ("Hi",)),)), 1)
        error = said.error
    except (Busy, Stopped) as refusal:
        error = str(refusal)
    if error:
        raise UserError(Problem(hosted.name, f"does not answer: {error}", "start it, or write its own name of the model behind #"))
    return Served(url, hosted.name.removeprefix(f"{url}#"), key, False)


@contextmanager
def _running(process: "subprocess.Popen[bytes]") -> Iterator["subprocess.Popen[bytes]"]:
    """The process, stopped at the end, also where SIGTERM or SIGHUP end this one."""

    def stop(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    numbers = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) == signal.SIG_DFL]
    try:
        for number in numbers:
            signal.signal(number, stop)
        yield process
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


# ---- lmms-eval ----


def find_program(given: str) -> str:
    """The path of lmms-eval's command. Raises UserError where it is not there."""
    if program := shutil.which(given):
        return program
    what = "is not installed here" if given == "lmms-eval" else "is no command"
    fix = f"it wants an environment of its own: {INSTALL}; then --lmms-eval ENV/bin/lmms-eval, or export LMMS_EVAL"
    raise UserError(Problem(given, what, fix))


def run_suite(
    program: str, tasks: str, served: Served, out: Path, include_path: Path | None, limit: int | None, num_concurrent: int,
    say: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    """The figures of lmms-eval's `tasks`: those of `read_figures`. Its files go to `out`; `say` gets what it prints, without keys.

    `limit` takes the first questions of each task. Raises UserError where it fails, and where any request did.
    """
    arguments = f"model={served.model},base_url={served.url},num_concurrent={num_concurrent}"
    arguments += ",httpx_trust_env=False" * served.own  # no proxy leads to this machine
    command = [
        program, "--model", "openai", "--model_args", arguments, "--tasks", tasks, "--output_path", str(out), "--log_samples",
    ]  # fmt: skip
    command += ["--include_path", str(include_path)] if include_path else []
    command += ["--limit", str(limit)] if limit else []
    log, before = out / "lmms-eval.log", set(out.rglob("*_results.json"))
    with log.open("w", encoding="utf-8") as file:

        def heard(text: str) -> None:
            file.write(text)
            say(text)

        status = _run(command, _environment(served), heard)
    results = [path for path in out.rglob("*_results.json") if path not in before]
    if status or len(results) != 1:
        what = f"failed (exit status {status}, {len(results)} files of results): {_tail(log)}"
        fix = f"mend that; it is known to run by {INSTALL}; all that it said is in {log}"
        raise UserError(Problem(f"lmms-eval {tasks}", what, fix))
    return read_figures(results[0])


def _environment(served: Served) -> dict[str, str]:
    """What lmms-eval finds: the server's key, which is not written on a command line, and the hub's token where it is not printed.

    A key of the user's goes to no server but the one that they named it for. Tasks with a judge need it beside a server of ours.
    """
    found = dict(os.environ)
    if served.key or not served.own:
        found["OPENAI_API_KEY"] = served.key or "none"
    else:
        found.setdefault("OPENAI_API_KEY", "none")  # without one the client does not start
    if token := found.pop("HF_TOKEN", ""):  # lmms-eval prints it, but the hub's client reads the older name, too
        found["HUGGING_FACE_HUB_TOKEN"] = token
    return found


def _run(command: Sequence[str], environment: dict[str, str], say: Callable[[str], None]) -> int:
    """The exit status of a command; `say` gets what it prints, as it comes, without colours and keys."""
    secrets = [environment[name] for name in ("OPENAI_API_KEY", "HUGGING_FACE_HUB_TOKEN") if len(environment.get(name, "")) > 4]
    with _running(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)) as process:
        assert process.stdout
        # A bar begins with a carriage return, which ends a line here, and goes on as it is.
        with io.TextIOWrapper(process.stdout, encoding="utf-8", errors="replace", newline="") as lines:
            for line in lines:
                for secret in secrets:
                    line = line.replace(secret, "...")
                say(COLOUR.sub("", line))
        return process.wait()


def _tail(log: Path) -> str:
    """The last lines of a log."""
    lines = [line for line in COLOUR.sub("", log.read_text(encoding="utf-8", errors="replace")).splitlines() if line.strip()]
    return "\n".join(["", *lines[-TAIL_LINES:]]) if lines else "it said nothing"


# ---- its figures ----


def read_figures(results: Path) -> dict[str, Any]:
    """`rows` of each task and metric: questions, the value as the task has it, None where that is no number, and the ends of the
    95 % interval by lmms-eval's own standard error, None where it gives none; `answers` in all, `empty_answers`; the file.

    Raises UserError where a question has no answer, or a failed request in its place.
    """
    found = json.loads(results.read_text(encoding="utf-8"))
    counts = {task: int(number["effective"]) for task, number in found["n-samples"].items()}
    samples: list[dict[str, Any]] = []
    for task, count in counts.items():
        path = results.with_name(results.name.replace("_results.json", f"_samples_{task}.jsonl"))
        own = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
        if (kept := len({sample["doc_id"] for sample in own})) != count:
            what = f"has {kept:,} of {count:,} answers"
            raise UserError(Problem(str(path), what, "look into lmms-eval.log beside it; without them no figure can be trusted"))
        samples += own
    # What stands in an answer's place is in `resps` where a filter has changed it.
    failed = [text for sample in samples for text in [str(sample.get("resps", sample["filtered_resps"]))] if FAILED in text]
    if failed:
        what = f"{len(failed):,} of {len(samples):,} requests failed, so its figures are none: {failed[0]}"
        fix = (
            "mend that; where a request costs more than is let in, start `qwenvl-ft serve` with other bounds, and give its address"
        )
        raise UserError(Problem(str(results), what, fix))
    empty = sum(not "".join(sample["filtered_resps"]).strip() for sample in samples)  # a text, or a list of texts
    rows = [_row(task, metric, values, counts.get(task)) for task, values in found["results"].items() for metric in values
            if "," in metric and "_stderr" not in metric]  # fmt: skip
    return {"rows": rows, "answers": len(samples), "empty_answers": empty, "results": str(results)}


def _row(task: str, key: str, values: dict[str, Any], questions: int | None) -> dict[str, Any]:
    """A figure; `key` is metric,filter."""
    metric, _, chosen = key.partition(",")
    value, error = (_number(values.get(name)) for name in (key, f"{metric}_stderr,{chosen}"))
    # Where all is right, or all wrong, its standard error is 0, and says nothing.
    low, high = (value - Z * error, value + Z * error) if value is not None and error else (None, None)
    name = metric if chosen == "none" else key
    return {"task": task, "metric": name, "questions": questions, "value": value, "low": low, "high": high}


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def suite_table(figures: dict[str, Any]) -> tuple[str, list[str], list[list[str]]]:
    """(title, head, rows) of the figures for a reader."""
    rows = [
        [row["task"], row["metric"], "" if row["questions"] is None else f"{row['questions']:,}", range_shown(row, False)]
        for row in figures["rows"]
    ]
    return f"{figures['answers']:,} answers", ["task", "metric", "questions", "score (95 %)"], rows
