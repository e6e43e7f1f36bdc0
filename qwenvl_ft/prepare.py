"""From a config to everything that is known before a GPU is touched: records, scripts, rows, and what was left out and why."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from qwenvl_ft.chat import IGNORE, Chat, Script, open_chat
from qwenvl_ft.config import Config
from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.geometry import read_model_json, resized
from qwenvl_ft.merge import read_header
from qwenvl_ft.meta import Media, Record, num_records, read_meta
from qwenvl_ft.plan import Plan, pack, steps

OnRecord = Callable[[int, int], None]
SAMPLE_BYTES = 4096
BASE = "base_model.json"  # in an adapter's folder: the fingerprint of the base that it was trained on


@dataclass(frozen=True)
class Prepared:
    """One meta-file made ready. `problems` are the records left out of `plan`, each with its reason."""

    num_records: int
    records: list[Record]
    scripts: list[Script]
    plan: Plan
    problems: list[Problem]
    chat: Chat

    def taught_tokens(self, row: int) -> int:
        """How many tokens a row teaches: what the loss divides by, summed over a step's rows."""
        return sum(sum(label != IGNORE for label in self.scripts[index].labels) for index in self.plan.rows[row])

    def places(self, row: int) -> str:
        """The records of a row, for a message."""
        return ", ".join(self.scripts[index].where for index in self.plan.rows[row])

    def summary(self, config: Config) -> dict[str, Any]:
        """What `qwenvl-ft plan --json` prints and `plan.json` keeps; tokens are those of the packed records."""
        used = [index for row in self.plan.rows for index in row]
        pictures = {picture for record in self.records for picture in record.pictures}
        return {
            "records": self.num_records,
            "used": len({self.scripts[index].where for index in used}),
            "skipped": [vars(problem) for problem in self.problems],
            "pictures": len(pictures),
            "pictures_shrunk": sum(shrunk(picture, self.chat) for picture in pictures),
            "tokens": token_counts([self.scripts[index].length for index in used]),
            "taught_tokens": sum(self.taught_tokens(row) for row in range(len(self.plan.rows))),
            "rows": len(self.plan.rows),
            "row_tokens": self.plan.row_tokens,
            "fill": round(self.plan.fill, 4),
            "steps_per_epoch": len(steps(len(self.plan.rows), config.rows_per_step, config.seed, 0)),
            "steps": len(schedule(self, config)),
        }


def prepare(config: Config, evaluation: bool = False, on_record: OnRecord = lambda done, total: None) -> Prepared:
    """Reads, writes and packs the training records, or the evaluation records.

    Raises UserError with every problem, unless `on_bad_record` is skip and something is left to train on.
    """
    meta_file = config.eval_meta_file if evaluation and config.eval_meta_file else config.train_meta_file
    data_dir = config.eval_data_dir if evaluation and config.eval_data_dir else config.train_data_dir
    chat = open_chat(config.model, config.min_pixels, config.max_pixels)
    records, problems = read_meta(meta_file, data_dir, on_record)
    total = num_records(meta_file, records, problems)
    scripts = write_scripts(chat, records, problems)
    plan = pack([script.length for script in scripts], config.row_tokens, share=chat.family.packs)
    for index in plan.too_long:
        fix = "raise row_tokens, lower max_pixels, or shorten the record"
        problems.append(Problem(scripts[index].where, f"{scripts[index].length} tokens, a row holds {config.row_tokens}", fix))
    if problems and (config.on_bad_record == "error" or not plan.rows):
        if config.on_bad_record == "error" and plan.rows:
            problems.append(Problem("on_bad_record", f"is error, and {len(problems)} problems were found",
                                    "mend them, or set on_bad_record: skip to train without these records"))  # fmt: skip
        raise UserError(*problems)
    return Prepared(total, records, scripts, plan, problems, chat)


def write_scripts(chat: Chat, records: Sequence[Record], problems: list[Problem]) -> list[Script]:
    """The examples of all records; what the template refuses is added to `problems`."""
    scripts: list[Script] = []
    for record in records:
        try:
            scripts += chat.write_scripts(record)
        except UserError as error:
            problems += [Problem(record.where, problem.what, problem.fix) for problem in error.problems]
    return scripts


def schedule(prepared: Prepared, config: Config) -> list[tuple[int, list[int]]]:
    """(epoch, rows) of every optimizer step of the run, the same whatever the number of processes."""
    found: list[tuple[int, list[int]]] = []
    epoch = 0
    while epoch < config.num_train_epochs if config.max_steps is None else len(found) < config.max_steps:
        found += [(epoch, rows) for rows in steps(len(prepared.plan.rows), config.rows_per_step, config.seed, epoch)]
        epoch += 1
    return found[: config.max_steps]


def token_counts(lengths: Sequence[int]) -> dict[str, int]:
    """min, median, max and total, as the commands print them."""
    if not lengths:
        return {"min": 0, "median": 0, "max": 0, "total": 0}
    return {"min": min(lengths), "median": int(median(lengths)), "max": max(lengths), "total": sum(lengths)}


def shrunk(picture: Media, chat: Chat) -> bool:
    """Whether `max_pixels` makes the picture smaller than rounding to whole units would."""
    height, width = resized(picture.height, picture.width, chat.limits)
    return height * width < (picture.height - chat.limits.unit_px) * (picture.width - chat.limits.unit_px)


def fingerprint(prepared: Prepared, config: Config) -> dict[str, str]:
    """What a checkpoint must agree on before a run goes on from it, each as a short hash or text."""
    pictures = sorted(
        {(str(picture.path), picture.height, picture.width) for record in prepared.records for picture in record.pictures}
    )
    same = "lora_on lora_rank lora_alpha lora_dropout rows_per_step learning_rate lr_scheduler_type warmup_ratio weight_decay "
    same += "max_grad_norm seed dtype num_train_epochs max_steps"
    settings = {key: str(getattr(config, key)) for key in same.split()}
    return {
        **settings,
        "base model": _hash(base_fingerprint(config.model)),
        "training records": _hash([script.ids for script in prepared.scripts]),
        "pictures": _hash(pictures),
        "packed rows": _hash(prepared.plan.rows),
    }


def base_fingerprint(model_dir: Path) -> dict[str, Any]:
    """Names a base model without reading it whole: its config, and the header and some of every tensor of its safetensors.

    Of every tensor, because a merge changes only some. Raises UserError for a file that is not whole.
    """
    config = read_model_json(model_dir / "config.json")
    config.pop("transformers_version", None)
    files = {}
    for path in sorted(model_dir.glob("*.safetensors")):
        head, tensors = read_header(path)
        digest, start = hashlib.sha256(head), len(head)
        with path.open("rb") as file:
            for tensor in tensors:
                file.seek(start + max(0, tensor.num_bytes // 2 - SAMPLE_BYTES))
                digest.update(file.read(min(SAMPLE_BYTES, tensor.num_bytes)))
                start += tensor.num_bytes
        files[path.name] = [path.stat().st_size, digest.hexdigest()]
    return {"config": _hash(config), "weights": files}


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
