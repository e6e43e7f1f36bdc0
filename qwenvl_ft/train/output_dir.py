"""What a run leaves in its output_dir: a plain PEFT adapter that carries all that is needed to use it elsewhere."""

import json
import shlex
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from ruamel.yaml import YAML
from safetensors.torch import save_file

from qwenvl_ft.config import Config
from qwenvl_ft.console import print_line, print_problems
from qwenvl_ft.data.prepare import Prepared, schedule
from qwenvl_ft.errors import Problem
from qwenvl_ft.evaluate.card import write_card
from qwenvl_ft.folders.adapter import BASE, DTYPE, QUANTIZATION, base_fingerprint
from qwenvl_ft.folders.model import ADAPTER_WEIGHTS
from qwenvl_ft.folders.objects import address_of, as_written
from qwenvl_ft.folders.whole import INCOMING, MANIFEST, write_json, write_lines, write_whole
from qwenvl_ft.model.load import dtype_here
from qwenvl_ft.train.best import Best
from qwenvl_ft.train.curves import draw_losses, mean_loss

METRICS_FILE, CURVES = "metrics.jsonl", "loss.svg"


def write_settings(config: Config, prepared: Prepared, processor: Any) -> None:
    """Writes what belongs to every adapter of the run, before its first step: processor (with the limits that training
    uses), settings with whole paths, plan, and which base it is."""
    out = config.output_dir
    settings = {key: whole(value) for key, value in config.model_dump().items()}
    # First of all the file that says whose folder this is: check_output_dir looks for it after a kill at any moment.
    with (out / ".config.yaml").open("w", encoding="utf-8") as file:
        YAML().dump(settings, file)
    (out / ".config.yaml").replace(out / "config.yaml")
    write_json(out / "plan.json", prepared.summary(config))
    write_lines(out / "packed.jsonl", map(json.dumps, prepared.plan.rows))
    dtype = dtype_here() if config.dtype == "auto" else config.dtype
    held = {QUANTIZATION: config.quantization, DTYPE: dtype} if config.quantization != "none" else {}
    write_json(out / BASE, base_fingerprint(config.model) | held)

    def write(folder: Path) -> None:
        processor.save_pretrained(folder)

    write_aside(out, "processor", write, but=MANIFEST)


def whole(value: Any) -> Any:
    """A setting with whole paths, also those within it."""
    if isinstance(value, list):
        return [whole(part) for part in value]
    if isinstance(value, dict):
        return {key: whole(part) for key, part in value.items()}
    return address_of(value) or str(value.resolve()) if isinstance(value, Path) else value


def write_aside(out: Path, name: str, write: Callable[[Path], None], but: str = "") -> None:
    """Calls `write` with a folder of that name, then moves its files to `out`, weights last and `but` one: a kill or a full disk
    leaves no half file under a name that is read."""
    aside = out / INCOMING / name
    write_whole(aside, write)
    for path in sorted(aside.iterdir(), key=lambda path: path.name == ADAPTER_WEIGHTS):
        if path.name != but:
            path.replace(out / path.name)
    shutil.rmtree(out / INCOMING)  # with the folder that is empty now


def write_results(
    config: Config, prepared: Prepared, lora: LoraConfig, state: dict[str, torch.Tensor], processor: Any,
    lines: Sequence[dict[str, Any]], peaks: dict[str, float], activations: dict[str, int] | None = None,
) -> None:  # fmt: skip
    """Writes the adapter and the results of the run whose metrics are `lines`, with the `peaks` of its learning rates; prints what
    to do next. `activations`: of how many layers they were kept.

    Adapter and processor are written aside, listed in a manifest that goes with them, and moved, the weights last: until
    those are there the folder is no adapter, or one that its manifest refuses.
    """
    out = config.output_dir

    def write(folder: Path) -> None:
        lora.base_model_name_or_path = str(config.model)
        lora.inference_mode = True
        lora.save_pretrained(str(folder))
        save_file(state, folder / ADAPTER_WEIGHTS, {"format": "pt"})
        processor.save_pretrained(folder)

    write_aside(out, "final", write)
    evaluations = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    broken = {problem["where"]: problem for line in lines for problem in line.get("skipped", [])}
    skipped = [*(problem.facts for problem in prepared.problems), *broken.values()]
    results = {"steps": len(lines), "train_loss": lines[-1]["run_loss"], "learning_rates": peaks, "eval_losses": evaluations,
               "skipped": skipped}  # fmt: skip
    judged = Best(lines, metric=config.eval_metric)
    if config.eval_metric != "loss":
        results[judged.key] = judged.values
    best = judged.step if config.keep_best else 0
    if best:
        results["best"] = {"step": best, judged.key: judged.values[best], "checkpoint": f"checkpoint-{best}"}
    if len(lines) < (planned := len(schedule(prepared, config))):
        results["stopped_early"] = {"step": len(lines), "of": planned}
    write_json(out / "all_results.json", results | ({"activations": activations} if activations else {}))
    if broken:
        print_line(f"\nSkipped, as on_bad_record says: {len(broken)} records whose pictures break while they are decoded", "yellow")
        print_problems([Problem(**problem) for problem in broken.values()])
    write_card(out, config.model)
    print_next(config)
    if 0 < best < len(lines):
        which = f"The {'lowest' if judged.lower_is_better else 'highest'} {judged.key}, {judged.values[best]:.4f},"
        print_line(f"{which} is that of step {best}: for --adapter {out / f'checkpoint-{best}'}")


def print_next(config: Config) -> None:
    """The exact commands that use what was trained; the last lines of a run."""
    base, adapter = shlex.quote(str(config.model)), shlex.quote(str(config.output_dir))
    meta = config.eval_meta_file or config.train_meta_file
    data = config.held_out_dir if config.eval_meta_file else config.train_data_dir
    print_line(f"\nThe adapter is in {config.output_dir}. Next:", "bold")
    print_line(f'  qwenvl-ft ask {base} --adapter {adapter} --image PICTURE "QUESTION"')
    seen = "" if config.eval_meta_file else "  # the training records: how it does on others it does not say"
    meta, data = (meta, data) if isinstance(meta, Path) else (meta[0].file, meta[0].data_dir or data)
    where = f" --data-dir {shlex.quote(as_written(data))}" if data else ""
    if config.columns or config.format or config.on_bad_record == "skip":  # without which the same file is not read alike
        where += f" --config {adapter}/config.yaml"
    print_line(f"  qwenvl-ft eval {base} {shlex.quote(as_written(meta))}{where} --adapter {adapter}{seen}")
    print_line(f"  qwenvl-ft export --adapter {adapter} --out {shlex.quote(str(config.output_dir) + '-merged')}")


def read_metrics(checkpoint: Path) -> list[dict[str, Any]]:
    """The lines of every step up to a checkpoint's."""
    return [json.loads(line) for line in (checkpoint / METRICS_FILE).read_text(encoding="utf-8").splitlines()]


def was_evaluated(checkpoint: Path, metric: str) -> bool:
    """Whether the evaluation of its step was done, by this metric, and not given up for a signal."""
    return f"eval_{metric}" in read_metrics(checkpoint)[-1]


class Metrics:
    """metrics.jsonl: a line for every step. Each checkpoint has a copy, so that a run that goes on knows all losses before it,
    whatever has become of the file.

    `loss` is the step's own, `run_loss` the mean over the run and, where a line of progress is due, `line_loss` that since the
    last one: all per taught token.
    """

    def __init__(self, output_dir: Path, resume: Path | None, every: int, num_steps: int):
        self.output_dir, self.every, self.num_steps = output_dir, every, num_steps
        self.lines: list[dict[str, Any]] = read_metrics(resume) if resume else []
        self.taught = sum(line["taught_tokens"] for line in self.lines)
        self.write(output_dir)
        self.file = (output_dir / METRICS_FILE).open("a", encoding="utf-8")

    def write(self, folder: Path) -> None:
        """The lines so far into a folder's file."""
        text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in self.lines)
        (folder / METRICS_FILE).write_text(text, encoding="utf-8")

    def add(self, step: int, facts: dict[str, float], skipped: Sequence[Problem] = ()) -> dict[str, float]:
        """Writes the step's line; returns what it says, means included, but for the records that broke. `facts` has `loss`,
        `taught_tokens` and whatever else."""
        before = self.lines[-1]["run_loss"] * self.taught if self.lines else 0.0
        self.taught += int(facts["taught_tokens"])
        facts = facts | {"run_loss": (before + facts["loss"] * facts["taught_tokens"]) / max(1, self.taught)}
        if step == 1 or step % self.every == 0 or step == self.num_steps:
            since = next((at for at in range(len(self.lines), 0, -1) if "line_loss" in self.lines[at - 1]), 0)
            facts["line_loss"] = mean_loss([*self.lines[since:], facts])
        self.lines.append({"step": step, **facts} | ({"skipped": [of.facts for of in skipped]} if skipped else {}))
        self.file.write(json.dumps(self.lines[-1], allow_nan=False) + "\n")
        self.file.flush()
        return facts

    def amend(self, scores: dict[str, float], skipped: Sequence[Problem]) -> None:
        """Adds to the last line the evaluation that it lacks."""
        broken = [*self.lines[-1].get("skipped", []), *(of.facts for of in skipped)]
        self.lines[-1] |= scores | ({"skipped": broken} if broken else {})
        self.write(self.output_dir)

    def save(self, folder: Path) -> None:
        """Puts a copy into a checkpoint, and the curves into the run's folder."""
        self.write(folder)
        aside = self.output_dir / f".{CURVES}"
        aside.write_text(draw_losses(self.lines), encoding="utf-8")
        aside.replace(self.output_dir / CURVES)

    def close(self) -> None:
        """No step comes any more."""
        self.file.close()
