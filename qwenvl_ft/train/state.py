"""What one process holds of a run: its rows, its model and optimizer, how its gradients join the others'; its checkpoints, and
from which of them a run goes on, if it is still the same run."""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from qwenvl_ft.config import Config
from qwenvl_ft.console import print_line
from qwenvl_ft.data.families import feature_width
from qwenvl_ft.data.features import Features
from qwenvl_ft.data.kept import code_of
from qwenvl_ft.data.numbers import blocks
from qwenvl_ft.data.packed import GONE, FileState
from qwenvl_ft.data.packing import PackedRows, deal
from qwenvl_ft.data.prepare import Prepared, no_room, not_kept, schedule
from qwenvl_ft.data.rows import FEATURES, MAY_KEEP, Built, Row, Rows, with_features
from qwenvl_ft.data.table import Scripts
from qwenvl_ft.data.targets import tower_trains
from qwenvl_ft.errors import NonFiniteLoss, Problem, UserError
from qwenvl_ft.folders.adapter import base_fingerprint
from qwenvl_ft.folders.cache import features_folder
from qwenvl_ft.folders.hashes import TICK_NS, digests
from qwenvl_ft.folders.model import ADAPTER_WEIGHTS, read_model_json
from qwenvl_ft.folders.runs import PICTURE_HASHES, PROCESSORS, checkpoints, earlier, newest, rotate
from qwenvl_ft.folders.whole import short_hash, write_json, write_whole
from qwenvl_ft.model.attention import attention_of
from qwenvl_ft.model.load import trainable
from qwenvl_ft.model.loss import Keep
from qwenvl_ft.model.pissa import State, as_plain, plain_settings
from qwenvl_ft.train.best import Best
from qwenvl_ft.train.launch import Workers, begin_worker, no_word_of_workers
from qwenvl_ft.train.output_dir import Metrics

PARTS = ".parts"  # in a run's folder, while it saves: what each process adds to the checkpoint
CONTENTS = "contents.json"  # beside a table
SIZING = ("video_fps", "video_max_frames", "video_max_pixels")  # settings that say for themselves that grids change
STATE = "state.json"  # in a checkpoint: its step, how it was launched, and the fingerprint of its run
OnSaved = Callable[[Path], None]
CLOCK_NS = 20_000_000  # by which a file system's clock may lag behind
MADE_BY = ("torch", "transformers", "torchvision", "pillow", "av")  # what of a medium becomes features
LENGTH = ("num_train_epochs", "max_steps")  # settings that may grow when a run goes on
FORM = 5  # of a checkpoint: raised with every change to what is in it, or to which rows a step takes


class Run:
    """What a step, an evaluation and a checkpoint need, together."""

    def __init__(self, config: Config, accelerator: Accelerator, model: Any, optimizer: Any, prepared: Prepared,
                 processor: Any, bf16: bool, on_saved: OnSaved | None = None,
                 beginning: State | None = None):  # fmt: skip
        self.config, self.accelerator, self.model, self.optimizer = config, accelerator, model, optimizer
        self.prepared, self.processor, self.bf16, self.on_saved = prepared, processor, bf16, on_saved
        self.bare = accelerator.unwrap_model(model)
        self.beginning = beginning or {}  # of PiSSA
        self.deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
        # What has had no gradient so far; DeepSpeed's engine keeps them to itself.
        self.untouched = {} if self.deepspeed else trainable(self.bare)
        self.metrics: Metrics | None = None  # the main process has them
        self.keeps_activations = config.gradient_checkpointing is False  # of some layers at least
        self.best, self.tracker_ids = Best([]), dict[str, str]()
        self.features: dict[bool, Features] = {}  # of the rows that train, and of those that are held out
        self.partitions = zero_partitions(model) if self.deepspeed else []
        self.tower_trains = tower_trains(config.lora_on)
        self.always_look = self.deepspeed and (self.tower_trains or model.zero_optimization_stage() == 3)

    def mine(self, rows: Sequence[int], of: Prepared) -> list[int | None]:
        """This process's rows of a step, with about as much work as the others have; None where another has one more, so that all
        make the same number of passes."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        return deal(rows, [of.cost(row) for row in rows] if world > 1 else [], world)[rank]

    def keep_features(self, part: Prepared, again: bool) -> str | None:
        """Has what the vision tower makes of these rows kept, if they are run `again`; says where, or why it is not. Not where
        processes share out the tower's weights: all run it, or none.

        It is kept under the name of everything that it is made from, so another run finds it.
        """
        num_tokens, width = int(part.media_tokens.sum()), feature_width(self.config.model)
        if not num_tokens or self.always_look or not_kept(self.config, again):
            return None
        dtype, since_ns = torch.bfloat16 if self.bf16 else torch.float32, time.time_ns() - CLOCK_NS
        processors = [of.to_json_string() for of in (self.processor.image_processor, self.processor.video_processor)]
        made_from = [
            base_fingerprint(self.config.model), *processors, *(getattr(self.config, key) for key in SIZING),
            rows_hash(part.plan.rows), *(part.scripts.facts["hashes"][name] for name in ("media", "digests", "grids")),
            contents(part.scripts, self.config.output_dir / PICTURE_HASHES),
            str(dtype), torch.cuda.get_device_name() if self.accelerator.device.type == "cuda" else "", attention_of(self.bare),
            *map(version_of, MADE_BY), *(code_of(Path(__file__).parents[1] / room) for room in ("data", "model")),
        ]  # fmt: skip
        folder = features_folder() / short_hash(made_from)
        if not folder.exists() and (why := no_room(num_tokens * width * dtype.itemsize)):
            return f"is not kept: {why}"
        try:
            kept = Features(folder, len(part.plan.rows), width, dtype, since_ns)
            num_kept = kept.num_kept()
        except OSError as error:
            return f"is not kept: {error.filename or folder} cannot be written ({error.strerror})"
        self.features[part is self.prepared] = kept
        return f"is kept: {num_kept:,} of {int((part.media_tokens > 0).sum()):,} rows are in {folder}"

    def looked_at(self, part: Prepared, row: int | None, tensors: Row, problems: Sequence[Problem]) -> tuple[Row, Keep | None]:
        """The row, with features that are kept since a worker built it; and what keeps those that are not, but nothing keeps those
        of a blank picture in place of a broken one, or of one that changed."""
        kept = self.features.get(part is self.prepared)
        if kept is None or row is None or problems or FEATURES in tensors:
            return tensors, None
        if (features := kept.read(row)) is not None:
            return with_features(tensors, features, part.chat.limits.merge_size), None
        return tensors, partial(kept.write, row) if tensors[MAY_KEEP] else None

    def rows_of(self, prepared: Prepared) -> Rows:
        """The rows of a plan as tensors."""
        return Rows(prepared.scripts, prepared.plan.rows, prepared.chat, self.processor, self.always_look,
                    skip=self.config.on_bad_record == "skip", features=self.features.get(prepared is self.prepared))  # fmt: skip

    def loader(self, rows: Iterable[int | None], of: Prepared) -> DataLoader[Built | UserError]:
        """These rows, built ahead by the workers; for a GPU in memory that it copies from while it works."""
        order = (row or 0 for row in rows)
        build, workers = self.rows_of(of).built_or_problems, self.config.dataloader_num_workers
        every = range(len(of.plan.rows))
        # A range does for a Dataset and a generator for a Sampler, whatever their types say.
        return DataLoader(every, sampler=order, batch_size=None, num_workers=workers, collate_fn=build,  # type: ignore[arg-type]
                          worker_init_fn=begin_worker, multiprocessing_context=Workers() if workers else None,
                          pin_memory=self.accelerator.device.type == "cuda")  # fmt: skip

    @contextmanager
    def built(self, rows: Iterable[int | None], of: Prepared) -> Iterator[Iterator[Built | UserError]]:
        """These rows, from workers that end with the block. They ignore signals, and a process whose workers run on never ends;
        left to the iterator's own end, that comes when nothing holds it any more, no traceback either.
        """
        loader: Any = None
        try:
            with no_word_of_workers():
                loader = iter(self.loader(rows, of))
            yield loader
        finally:
            if loader is not None and self.config.dataloader_num_workers:
                with no_word_of_workers():
                    loader._shutdown_workers()

    def exchange(self, last: bool) -> AbstractContextManager[None]:
        """Forward and backward of one row; the processes exchange their gradients with the last row of a step, and only then."""
        return nullcontext() if last or self.deepspeed else self.accelerator.no_sync(self.model)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Adds the gradients of one row, within `exchange`."""
        if self.deepspeed:
            self.accelerator.deepspeed_engine_wrapped.backward(loss, sync_gradients=last)
        else:
            self.accelerator.backward(loss)

    def adapter_state(self) -> dict[str, torch.Tensor]:
        """The adapter's tensors under PEFT's own names, on the CPU; under ZeRO-3 each process has a part of them.

        Raises NonFiniteLoss rather than give away what is spoilt.
        """
        gathered: Any = nullcontext()
        if self.deepspeed and self.model.zero_optimization_stage() == 3:
            import deepspeed

            gathered = deepspeed.zero.GatheredParameters(list(trainable(self.bare).values()))
        with gathered:
            state = {name: tensor.detach().cpu().clone() for name, tensor in get_peft_model_state_dict(self.bare).items()}
        if broken := [name for name, tensor in state.items() if not tensor.isfinite().all()]:
            if not self.accelerator.is_local_main_process:
                raise SystemExit(1)  # every process has these weights, and one of them says so
            what = f"{len(broken)} of the adapter's {len(state)} tensors hold NaN or infinity and are not saved, {broken[0]} first"
            raise NonFiniteLoss(Problem(str(self.config.output_dir), what, "lower learning_rate"))
        return as_plain(state, self.beginning)

    def adapter_settings(self) -> LoraConfig:
        """PEFT's settings that go with it."""
        lora: LoraConfig = self.bare.peft_config["default"]
        return plain_settings(lora) if self.beginning else lora

    def save(self, step: int, same: dict[str, str]) -> None:
        """Writes checkpoint-N whole, then takes the oldest away."""
        folder = self.config.output_dir / f"checkpoint-{step}"
        state = self.adapter_state()

        def write(incoming: Path) -> None:
            save_file(state, incoming / ADAPTER_WEIGHTS, {"format": "pt"})
            self.adapter_settings().save_pretrained(str(incoming))
            if self.metrics:
                self.metrics.save(incoming)
            for part in sorted(parts.iterdir()):
                part.rename(incoming / part.name)
            facts = {
                "form": FORM, "step": step, "processes": self.accelerator.num_processes, "deepspeed": self.deepspeed,
                "records": self.prepared.num_records, "row_tokens": self.prepared.plan.row_tokens, "same": same,
                **self.tracker_ids,
            }  # fmt: skip
            (incoming / STATE).write_text(json.dumps(facts, indent=1) + "\n")

        parts = self.config.output_dir / PARTS
        if self.accelerator.is_main_process:
            shutil.rmtree(parts, ignore_errors=True)  # of a run that was cut off here
            parts.mkdir()
        self.accelerator.wait_for_everyone()
        if self.deepspeed or self.accelerator.is_main_process:
            save_file(self.moments(), parts / self.moments_name())
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            write_whole(folder, write)
            parts.rmdir()
            spared = f"checkpoint-{self.best.step}" if self.config.keep_best else ""
            rotate(self.config.output_dir, self.config.save_total_limit, spared)
            if self.on_saved:
                self.on_saved(folder)
        self.accelerator.wait_for_everyone()

    def moments_name(self) -> str:
        """The file of the optimizer's state in a checkpoint; under DeepSpeed each process has its own."""
        return f"optimizer-{self.accelerator.process_index}.safetensors" if self.deepspeed else "optimizer.safetensors"

    def moments(self) -> dict[str, torch.Tensor]:
        """The optimizer's state, on the CPU; under DeepSpeed this process's part, with the float32 weights that it belongs to."""
        if self.deepspeed:
            inner = self.model.optimizer.optimizer.state
            entries = {number: {**inner[part], "weights": part} for number, part in enumerate(self.partitions)}
        else:
            entries = self.optimizer.state_dict()["state"]
        flat = {f"{number}.{key}": value for number, entry in entries.items() for key, value in entry.items()}
        return {key: torch.as_tensor(value).detach().cpu().clone().contiguous() for key, value in flat.items()}

    def load(self, folder: Path) -> int:
        """Puts the optimizer back to where the checkpoint was; returns its step."""
        facts = json.loads((folder / STATE).read_text())
        if facts["deepspeed"] != self.deepspeed or (self.deepspeed and facts["processes"] != self.accelerator.num_processes):
            was = f"{facts['processes']} processes {'with' if facts['deepspeed'] else 'without'} DeepSpeed"
            raise UserError(Problem(str(folder), f"was written by {was}", "start again the same way, or into another output_dir"))
        entries: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in load_file(folder / self.moments_name()).items():
            number, key = name.split(".", 1)
            entries.setdefault(int(number), {})[key] = tensor
        if not self.deepspeed:
            self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": entries})
        for at, part in enumerate(self.partitions):
            part.data.copy_(entries[at].pop("weights"))
            # DeepSpeed's optimizer for the CPU counts its steps in an int, torch's in a float32 on the CPU.
            self.model.optimizer.optimizer.state[part] = {
                key: value.to(part.device) if value.dim() else value if value.is_floating_point() else int(value)
                for key, value in entries[at].items()
            }
        return int(facts["step"])


def zero_partitions(engine: Any) -> list[torch.Tensor]:
    """This process's share of what trains, flat and in float32: where DeepSpeed's ZeRO keeps its optimizer's state.

    DeepSpeed's own checkpoints are pickles, which run code when they are read. Raises UserError for a setting of it that
    keeps more than this.
    """
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    zero = engine.optimizer
    if isinstance(zero, DeepSpeedZeroOptimizer) and not engine.fp16_enabled():
        return list(zero.single_partition_of_fp32_groups)
    if isinstance(zero, DeepSpeedZeroOptimizer_Stage3) and not engine.fp16_enabled() and not zero.swap_optimizer:
        return list(zero.fp32_partitioned_groups_flat)
    what = f"its {type(zero).__name__} keeps more than a checkpoint here holds"
    raise UserError(Problem("DeepSpeed", what, "use ZeRO 2 or 3 as in configs/zero2.yaml, without fp16 and without NVMe"))


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
        "shared beginnings": "auto" if prepared.shares else "off",
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
    """Names which records share which row, and which of them their beginning."""
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
        changed = [
            key for key in changed if key not in ("training records", "packed rows", "grids", "shared beginnings", "held out")
        ]
    if "training records" in changed:
        count, records = before["records"], prepared.num_records
        said.append("the training records changed" + (f": {count:,} before, {records:,} now" if count != records else ""))
    elif "pictures" in changed:
        said.append("the pictures changed: their folder, names or sizes")
    elif "packed rows" in changed or ("grids" in changed and not {"processor", *SIZING} & set(changed)):
        tokens, room = before["row_tokens"], prepared.plan.row_tokens
        if tokens != room:
            said.append(f"row_tokens was {tokens} and is now {room}")
        elif "shared beginnings" not in changed or "grids" in changed:
            said.append("pictures are seen in other sizes: min_pixels or max_pixels changed")
        elif "lora_dropout" not in changed:  # which is said, and is why
            now_is = f"share_prefix was {was['shared beginnings']} and is now {now['shared beginnings']}"
            said.append(f"{now_is}, by itself or by attn_implementation")
    elif "contents" in changed:
        said.append("the pictures changed: what is in them, under the same names and in the same sizes")
    if "asked" in changed:
        said.append("eval_samples or eval_max_new_tokens changed, so scores could not be compared")
    if "held out" in changed:
        said.append("the records or pictures of the evaluation changed, so its losses could not be compared")
    return said
