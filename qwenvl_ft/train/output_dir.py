"""What a run leaves in its output_dir: a plain PEFT adapter that carries all that is needed to use it elsewhere."""

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import torch
from ruamel.yaml import YAML
from safetensors.torch import save_file

from qwenvl_ft.config import Config
from qwenvl_ft.console import print_line, print_problems
from qwenvl_ft.data.prepare import Prepared
from qwenvl_ft.errors import Problem
from qwenvl_ft.folders.adapter import BASE, base_fingerprint
from qwenvl_ft.folders.model import ADAPTER_WEIGHTS
from qwenvl_ft.folders.whole import INCOMING, MANIFEST, write_json, write_whole

METRICS = "metrics.jsonl"
PLAN = "plan.json"


def write_settings(config: Config, prepared: Prepared, processor: Any) -> None:
    """Writes what belongs to every adapter of the run, before its first step: processor (with the limits that training
    uses), settings with whole paths, plan, and which base it is."""
    out = config.output_dir
    settings = {key: str(value.resolve()) if isinstance(value, Path) else value for key, value in config.model_dump().items()}
    # First of all the file that says whose folder this is: check_output_dir looks for it after a kill at any moment.
    with (out / "config.yaml").open("w", encoding="utf-8") as file:
        YAML().dump(settings, file)
    write_json(out / PLAN, prepared.summary(config) | {"packed": prepared.plan.rows})
    write_json(out / BASE, base_fingerprint(config.model))
    processor.save_pretrained(out)


def write_results(config: Config, model: Any, state: dict[str, torch.Tensor]) -> None:
    """Writes the adapter and the run's results; prints what to do next.

    The adapter is written aside and moved, its weights last.
    """
    out = config.output_dir
    aside = out / INCOMING / "final"

    def write(folder: Path) -> None:
        lora = model.peft_config["default"]
        lora.base_model_name_or_path = str(config.model)
        lora.inference_mode = True
        lora.save_pretrained(folder)
        save_file(state, folder / ADAPTER_WEIGHTS, {"format": "pt"})

    write_whole(aside, write)
    (aside / MANIFEST).unlink()
    for path in sorted(aside.iterdir(), key=lambda path: path.name.startswith("adapter_model")):
        path.replace(out / path.name)
    shutil.rmtree(out / INCOMING)  # with the folder that is empty now
    metrics = [json.loads(line) for line in (out / METRICS).read_text().splitlines()]
    evaluations = {line["step"]: line["eval_loss"] for line in metrics if "eval_loss" in line}
    broken = {problem["where"]: problem for line in metrics for problem in line.get("skipped", [])}
    skipped = [*json.loads((out / PLAN).read_text())["skipped"], *broken.values()]
    results = {"steps": len(metrics), "train_loss": metrics[-1]["loss"], "eval_losses": evaluations, "skipped": skipped}
    write_json(out / "all_results.json", results)
    if broken:
        print_line(f"\nSkipped, as on_bad_record says: {len(broken)} records whose pictures break while they are decoded", "yellow")
        print_problems([Problem(**problem) for problem in broken.values()])
    print_next(config)


def print_next(config: Config) -> None:
    """The exact commands that use what was trained; the last lines of a run."""
    base, adapter = shlex.quote(str(config.model)), shlex.quote(str(config.output_dir))
    meta = config.eval_meta_file or config.train_meta_file
    data = (config.eval_data_dir if config.eval_meta_file else None) or config.train_data_dir
    print_line(f"\nThe adapter is in {config.output_dir}. Next:", "bold")
    print_line(f'  qwenvl-ft ask {base} --adapter {adapter} --image PICTURE "QUESTION"')
    seen = "" if config.eval_meta_file else "  # the training records: how it does on others it does not say"
    print_line(f"  qwenvl-ft eval {base} {shlex.quote(str(meta))} --data-dir {shlex.quote(str(data))} --adapter {adapter}{seen}")
    print_line(f"  qwenvl-ft export --adapter {adapter} --out {shlex.quote(str(config.output_dir) + '-merged')}")


def open_metrics(output_dir: Path, done: int) -> Any:
    """The metrics file to append to; lines of steps after `done` are of a run that was cut off and are taken out."""
    path = output_dir / METRICS
    lines = path.read_text().splitlines() if path.is_file() and done else []
    path.write_text("".join(line + "\n" for line in lines if line.endswith("}") and json.loads(line)["step"] <= done))
    return path.open("a")
