"""From which checkpoint a run goes on, and whether it is still the same run."""

import json
from pathlib import Path
from typing import Any

from qwenvl_ft.config import Config
from qwenvl_ft.console import print_line
from qwenvl_ft.data.prepare import Prepared
from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.folders.adapter import base_fingerprint
from qwenvl_ft.folders.runs import checkpoints, newest
from qwenvl_ft.folders.whole import short_hash

STATE = "state.json"  # in a checkpoint: its step, how it was launched, and the fingerprint of its run


def find_resume(config: Config, same: dict[str, str], prepared: Prepared) -> Path | None:
    """The checkpoint to go on from. Raises UserError if there is one that was not asked for, or that is of another run."""
    if not config.resume:
        if found := checkpoints(config.output_dir):
            raise UserError(Problem(str(config.output_dir), f"already holds {found[-1].name}",
                                    "set resume=true to go on from it, or choose another output_dir"))  # fmt: skip
        return None
    folder, skipped = newest(config.output_dir)
    for reason in skipped:
        print_line(f"passed over {reason}", "yellow")
    if folder:
        before = json.loads((folder / STATE).read_text())["same"]
        plan = config.output_dir / "plan.json"
        changed = differences(before, same, json.loads(plan.read_text()) if plan.is_file() else {}, prepared)
        if changed:
            fix = "set it back, or choose another output_dir"
            raise UserError(*(Problem(str(folder), what, fix) for what in changed))
    return folder


def fingerprint(prepared: Prepared, config: Config) -> dict[str, str]:
    """What a checkpoint must agree on before a run goes on from it, each as a short hash or text."""
    pictures = sorted(
        {(str(picture.source), picture.height, picture.width) for record in prepared.records for picture in record.pictures}
    )
    same = "lora_on lora_rank lora_alpha lora_dropout rows_per_step learning_rate lr_scheduler_type warmup_ratio weight_decay "
    same += "max_grad_norm seed dtype num_train_epochs max_steps"
    settings = {key: str(getattr(config, key)) for key in same.split()}
    return {
        **settings,
        "base model": short_hash(base_fingerprint(config.model)),
        "training records": short_hash([script.ids for script in prepared.scripts]),
        "pictures": short_hash(pictures),
        "packed rows": short_hash(prepared.plan.rows),
    }


def differences(before: dict[str, str], now: dict[str, str], plan: dict[str, Any], prepared: Prepared) -> list[str]:
    """What two fingerprints differ in, in words and each cause once: other records have other pictures and rows, too.

    `plan` is the summary of the run before, as far as it is known.
    """
    changed = [key for key, value in now.items() if before.get(key) != value]
    said = [f"{key} was {before.get(key)} and is now {now[key]}" for key in changed if key in Config.model_fields]
    if "base model" in changed:
        said.append("the base model changed: its config.json or its weights")
    if "training records" in changed:
        was, count = plan.get("records", prepared.num_records), prepared.num_records
        said.append("the training records changed" + (f": {was:,} before, {count:,} now" if was != count else ""))
    elif "pictures" in changed:
        said.append("the pictures changed: their folder, names or sizes")
    elif "packed rows" in changed:
        was, room = plan.get("row_tokens", prepared.plan.row_tokens), prepared.plan.row_tokens
        if was != room:
            said.append(f"row_tokens was {was} and is now {room}")
        else:
            said.append("the rows are packed in another way: min_pixels or max_pixels changed")
    return said
