"""What one process holds of a run: its rows, its model and optimizer, how its gradients join the others'; its checkpoints."""

import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from qwenvl_ft.config import Config
from qwenvl_ft.data.families import feature_width
from qwenvl_ft.data.features import Features
from qwenvl_ft.data.kept import code_of
from qwenvl_ft.data.packing import deal
from qwenvl_ft.data.prepare import Prepared, no_room, not_kept
from qwenvl_ft.data.rows import FEATURES, MAY_KEEP, Built, Row, Rows, with_features
from qwenvl_ft.data.targets import only_tower_trains, tower_trains
from qwenvl_ft.errors import NonFiniteLoss, Problem, UserError
from qwenvl_ft.folders.adapter import base_fingerprint
from qwenvl_ft.folders.cache import features_folder
from qwenvl_ft.folders.model import ADAPTER_WEIGHTS
from qwenvl_ft.folders.runs import PICTURE_HASHES, rotate
from qwenvl_ft.folders.whole import short_hash, write_whole
from qwenvl_ft.model.attention import attention_of
from qwenvl_ft.model.load import trainable
from qwenvl_ft.model.loss import Keep, summed_loss
from qwenvl_ft.model.pissa import State, as_plain, plain_settings
from qwenvl_ft.train.best import Best
from qwenvl_ft.train.launch import Workers, begin_worker, no_word_of_workers
from qwenvl_ft.train.origin import FORM, SIZING, STATE, Origin, contents, rows_hash, version_of
from qwenvl_ft.train.output_dir import Metrics, read_metrics

PARTS = ".parts"  # in a run's folder, while it saves: what each process adds to the checkpoint
OnSaved = Callable[[Path], None]
CLOCK_NS = 20_000_000  # by which a file system's clock may lag behind
MADE_BY = ("torch", "transformers", "torchvision", "pillow", "av")  # what of a medium becomes features


class Run:
    """What a step, an evaluation and a checkpoint need, together."""

    def __init__(
        self, config: Config, accelerator: Accelerator, origin: Origin, prepared: Prepared, held_out: Prepared | None,
        processor: Any, bare: Any, optimizer: Any, pissa_start: State, on_saved: OnSaved | None = None,
    ):  # fmt: skip
        # accelerate's unwrap_model would give it back, too, but imports DeepSpeed in every run where that is installed.
        self.bare, self.bf16, self.pissa_start = bare, bare.dtype == torch.bfloat16, pissa_start
        self.model, self.optimizer = accelerator.prepare(bare, optimizer)
        self.config, self.accelerator, self.origin, self.on_saved = config, accelerator, origin, on_saved
        self.prepared, self.held_out, self.processor = prepared, held_out, processor
        self.deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
        # What has had no gradient so far; DeepSpeed's engine keeps them to itself.
        self.untouched = {} if self.deepspeed else trainable(self.bare)
        self.metrics: Metrics | None = None  # the main process has them
        self.tracker_ids: dict[str, str] = {}
        self.done = 0  # the steps before it goes on
        self.activations: dict[str, int] | None = None  # of how many layers they are kept, where that was measured
        self.keeps_activations = config.gradient_checkpointing is False  # of some layers at least
        lines = read_metrics(origin.resume) if origin.resume else []
        self.best = Best(lines, config.early_stopping_patience, config.eval_metric)
        self.features: dict[bool, Features] = {}  # of the rows that train, and of those that are held out
        self.partitions = zero_partitions(self.model) if self.deepspeed else []
        self.tower_trains = tower_trains(config.lora_on)
        shared_out = self.deepspeed and (self.tower_trains or self.model.zero_optimization_stage() == 3)
        self.always_look = shared_out or only_tower_trains(config.lora_on)  # a loss that nothing trains by cannot go backward

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

    def loss(self, row: Row, keep: Keep | None = None) -> torch.Tensor:
        """Summed loss of one row, on this process's device. For `keep` see vision_features."""
        return summed_loss(self.model, self.bare, row, self.tower_trains, keep, self.accelerator.device)

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
        return as_plain(state, self.pissa_start)

    def adapter_settings(self) -> LoraConfig:
        """PEFT's settings that go with it."""
        lora: LoraConfig = self.bare.peft_config["default"]
        return plain_settings(lora) if self.pissa_start else lora

    def save(self, step: int) -> None:
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
                "records": self.prepared.num_records, "row_tokens": self.prepared.plan.row_tokens, "same": self.origin.same,
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

    def load(self, folder: Path) -> None:
        """Puts the optimizer back to where the checkpoint was, which is after the step `done`."""
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
        self.done = int(facts["step"])


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
