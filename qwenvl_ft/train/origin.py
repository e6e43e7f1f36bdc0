"""Where a run begins, which all its processes agree on: at a checkpoint that is of the same run, with an adapter's weights, or
afresh."""

import hashlib
import json
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from accelerate.utils import gather_object

from qwenvl_ft.config import Config
from qwenvl_ft.console import print_line
from qwenvl_ft.data.numbers import blocks
from qwenvl_ft.data.packed import GONE, FileState
from qwenvl_ft.data.packing import PackedRows
from qwenvl_ft.data.prepare import Prepared, schedule
from qwenvl_ft.data.table import Scripts
from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.folders.adapter import base_fingerprint
from qwenvl_ft.folders.hashes import TICK_NS, digests
from qwenvl_ft.folders.model import read_model_json
from qwenvl_ft.folders.runs import PICTURE_HASHES, PROCESSORS, checkpoints, earlier, newest
from qwenvl_ft.folders.whole import short_hash, write_json

CONTENTS = "contents.json"  # beside a table
SIZING = ("video_fps", "video_max_frames", "video_max_pixels")  # settings that say for themselves that grids change
STATE = "state.json"  # in a checkpoint: its step, how it was launched, and the fingerprint of its run
LENGTH = ("num_train_epochs", "max_steps")  # settings that may grow when a run goes on
FORM = 5  # of a checkpoint: raised with every change to what is in it, or to which rows a step takes


class Origin(NamedTuple):
    """At the checkpoint `resume`, or with the adapter `weights`, or afresh; `same` is what makes it the same run."""

    same: dict[str, str]
    resume: Path | None
    weights: Path | None


def agree(config: Config, prepared: Prepared, held_out: Prepared | None) -> Origin:
    """The origin, of all processes. Raises UserError where they differ: each node may have its own cache, and its own copy of the
    files."""
    same = fingerprint(prepared, held_out, config)
    if len(set(gather_object([short_hash(same)]))) > 1:
        what, fix = "its processes read different records, pictures or settings", "give all machines the same files"
        raise UserError(Problem("launch", what, fix))
    resume = find_resume(config, same, prepared)
    weights = None if resume else find_weights(config)
    if len(found := set(gather_object([begins.name if (begins := resume or weights) else "the beginning"]))) > 1:
        what, fix = f"its processes would go on from {' and '.join(sorted(found))}", "give all machines the same checkpoints"
        raise UserError(Problem("launch", what, fix))
    return Origin(same, resume, weights)


def find_resume(config: Config, same: dict[str, str], prepared: Prepared) -> Path | None:
    """The checkpoint to go on from. Raises UserError if there is one that was not asked for, or that is of another run."""
    if config.resume == "weights":
        return None
    if not config.resume:
        if found := checkpoints(config.output_dir):
            raise UserError(Problem(str(config.output_dir), f"already holds {found[-1].name}",
                                    "set resume=true to go on from it, or choose another output_dir"))  # fmt: skip
        return None
    folder, skipped = newest(config.output_dir)
    if not folder and (before := earlier(config.output_dir)):
        raise UserError(Problem(str(config.output_dir), f"holds no checkpoint yet, and {before[-1].name} of an earlier run",
                                "set resume=weights to begin with its weights again"))  # fmt: skip
    for reason in skipped:
        print_line(f"passed over {reason}", "yellow")
    if folder:
        before = json.loads((folder / STATE).read_text())
        if before.get("form") != FORM:
            what = "was written by another version of this tool, which saved other things and whose steps took other rows"
            raise UserError(Problem(str(folder), what, "finish the run with that version, or choose another output_dir"))
        if (steps := len(schedule(prepared, config))) > (planned := steps_of(before, prepared, config)):
            print_line(
                f"{folder.name} is of a run of {planned:,} steps and this is one of {steps:,}: so is the schedule of its rate"
            )
            before["same"] |= {key: same[key] for key in LENGTH}
        if changed := differences(before, same, prepared):
            fix = "set it back, or choose another output_dir"
            raise UserError(*(Problem(str(folder), what, fix) for what in changed))
    return folder


def steps_of(state: dict[str, Any], prepared: Prepared, config: Config) -> int:
    """How many steps the run of a checkpoint was to have."""
    epochs, most = (None if state["same"][key] == "None" else int(state["same"][key]) for key in LENGTH)
    return len(schedule(prepared, config.model_copy(update={"num_train_epochs": epochs, "max_steps": most})))


def find_weights(config: Config) -> Path | None:
    """The adapter whose weights a run begins with that goes on from no checkpoint; None for a fresh one.

    Raises UserError for `resume: weights` where no checkpoint is.
    """
    if config.resume != "weights":
        return config.init_adapter
    for folder in (config.output_dir, *reversed(earlier(config.output_dir))):
        found, skipped = newest(folder)
        for reason in skipped:
            print_line(f"passed over {reason}", "yellow")
        if found:
            return found
    what = "holds no checkpoint to take weights from"
    raise UserError(Problem(str(config.output_dir), what, "set resume=false, or init_adapter to the folder of an adapter"))


def fingerprint(prepared: Prepared, held_out: Prepared | None, config: Config) -> dict[str, str]:
    """What a checkpoint must agree on before a run goes on from it, each as a short hash or text: all that training reads.

    Hashes pictures and base, each file once. Raises UserError for a file that is gone.
    """
    same = "lora_on lora_targets lora_rank lora_alpha lora_dropout use_rslora use_dora loraplus_lr_ratio "
    same += "init_lora_weights init_adapter rows_per_step learning_rate lr_scheduler_type warmup_ratio "
    same += "weight_decay max_grad_norm seed dtype quantization num_train_epochs max_steps thinking "
    same += "media_position video_fps video_max_frames video_max_pixels"
    settings = {key: str(getattr(config, key)) for key in same.split()}
    seen = [read_model_json(path) for name in PROCESSORS if (path := config.model / name).is_file()]

    def records(part: Prepared) -> list[str]:
        return [part.scripts.facts["hashes"][name] for name in ("ids", "taught")]

    def names(part: Prepared) -> list[str]:
        return [part.scripts.facts["hashes"][name] for name in ("media", "digests")]

    def grids(part: Prepared) -> str:
        return str(part.scripts.facts["hashes"]["grids"])

    def content(part: Prepared) -> str:
        return contents(part.scripts, config.output_dir / PICTURE_HASHES)

    return {
        **settings,
        "base model": short_hash(base_fingerprint(config.model)),
        "processor": short_hash([found.get("image_processor", found) for found in seen]),
        "training records": short_hash(records(prepared)),
        "pictures": short_hash(names(prepared)),
        "contents": short_hash(content(prepared)),
        "packed rows": rows_hash(prepared.plan.rows),
        "shared prefixes": "auto" if prepared.shares else "off",
        "grids": grids(prepared),
        **({"asked": f"{config.eval_samples} {config.eval_max_new_tokens}"} if config.eval_metric != "loss" else {}),
        **({"held out": short_hash([records(held_out), names(held_out), grids(held_out), content(held_out)])} if held_out else {}),
    }


def version_of(package: str) -> str:
    """Nothing for one that is not there, and so makes nothing."""
    with suppress(PackageNotFoundError):
        return version(package)
    return ""


def rows_hash(rows: PackedRows) -> str:
    """Names which records share which row, and which of them their prefix."""
    digest = hashlib.sha256(rows.starts.data)
    for _, members in blocks(rows.members):
        digest.update(members.data)
    return digest.hexdigest()[:16]


def contents(scripts: Scripts, cache: Path) -> str:
    """Names what is in the files that hold the media of a table. It is kept beside the table, for as long as the files are said to
    be as they were: by their sizes and both times. Raises UserError for a file that is gone.
    """
    now, newest_ns = hashlib.sha256(), 0
    for state in map(FileState.of, (of.path for of in scripts.files if of.num_bytes != GONE)):
        now.update(repr(state).encode("utf-8", "surrogateescape"))
        newest_ns = max(newest_ns, state.mtime_ns, state.ctime_ns)
    kept = scripts.folder / CONTENTS
    with suppress(OSError, ValueError):
        files, found = json.loads(kept.read_text())
        if files == now.hexdigest():
            return str(found)
    paths = [path for of in scripts.files if of.num_bytes != GONE and not (path := Path(of.path)).is_dir()]
    hashes = digests(dict.fromkeys(paths), cache, "hashing pictures")
    found = short_hash([hashes[path] for path in hashes])
    if time.time_ns() - newest_ns > TICK_NS:
        with suppress(OSError):
            write_json(kept, [now.hexdigest(), found])
    return found


def differences(before: dict[str, Any], now: dict[str, str], prepared: Prepared) -> list[str]:
    """What the run of a checkpoint, as its state says, and this run differ in: in words, and each cause once.

    Other records have other pictures and rows, too. An evaluation may come, or be left out, but not change.
    """
    # A key that came after the checkpoint had its default then.
    was = {key: str(of.default) for key, of in Config.model_fields.items()} | before["same"]
    changed = [key for key, value in now.items() if key in was and was[key] != value]
    said = [f"{key} was {was[key]} and is now {now[key]}" for key in changed if key in Config.model_fields]
    if "base model" in changed:
        said.append("the base model changed: its config.json or its weights")
    if "processor" in changed:
        said.append("the base model's processor changed: its settings of pictures")
    if {"thinking", "media_position"} & set(changed):  # which write all records otherwise
        changed = [key for key in changed if key not in ("training records", "packed rows", "grids", "shared prefixes", "held out")]
    if "training records" in changed:
        count, records = before["records"], prepared.num_records
        said.append("the training records changed" + (f": {count:,} before, {records:,} now" if count != records else ""))
    elif "pictures" in changed:
        said.append("the pictures changed: their folder, names or sizes")
    elif "packed rows" in changed or ("grids" in changed and not {"processor", *SIZING} & set(changed)):
        tokens, room = before["row_tokens"], prepared.plan.row_tokens
        if tokens != room:
            said.append(f"row_tokens was {tokens} and is now {room}")
        elif "shared prefixes" not in changed or "grids" in changed:
            said.append("pictures are seen in other sizes: min_pixels or max_pixels changed")
        elif "lora_dropout" not in changed:  # which is said, and is why
            now_is = f"share_prefix was {was['shared prefixes']} and is now {now['shared prefixes']}"
            said.append(f"{now_is}, by itself or by attn_implementation")
    elif "contents" in changed:
        said.append("the pictures changed: what is in them, under the same names and in the same sizes")
    if "asked" in changed:
        said.append("eval_samples or eval_max_new_tokens changed, so scores could not be compared")
    if "held out" in changed:
        said.append("the records or pictures of the evaluation changed, so its losses could not be compared")
    return said
