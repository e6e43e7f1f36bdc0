"""What one process holds of a run: its rows, its model and optimizer, how its gradients join the others'; its checkpoints, and
from which of them a run goes on, if it is still the same run."""

import json
import math
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from qwenvl_ft.config import Config
from qwenvl_ft.console import print_line
from qwenvl_ft.data.prepare import Prepared
from qwenvl_ft.data.rows import Built, Rows
from qwenvl_ft.errors import NonFiniteLoss, Problem, UserError
from qwenvl_ft.folders.adapter import base_fingerprint
from qwenvl_ft.folders.model import ADAPTER_WEIGHTS
from qwenvl_ft.folders.runs import checkpoints, newest, rotate
from qwenvl_ft.folders.whole import INCOMING, short_hash, write_whole
from qwenvl_ft.model.load import trainable
from qwenvl_ft.train.launch import ignore_signals

OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"  # in a checkpoint: its step, how it was launched, and the fingerprint of its run


class Run:
    """What a step, an evaluation and a checkpoint need, together."""

    def __init__(self, config: Config, accelerator: Accelerator, model: Any, optimizer: Any, prepared: Prepared,
                 image_processor: Any, bf16: bool):  # fmt: skip
        self.config, self.accelerator, self.model, self.optimizer = config, accelerator, model, optimizer
        self.prepared, self.image_processor, self.bf16 = prepared, image_processor, bf16
        self.bare = accelerator.unwrap_model(model)
        self.deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
        self.tower_trains = bool({"vision", "merger"} & set(config.lora_on))
        self.always_look = self.deepspeed and (self.tower_trains or model.zero_optimization_stage() == 3)
        blind = [row for row, members in enumerate(prepared.plan.rows) if not any(prepared.scripts[at].pictures for at in members)]
        if self.always_look and blind and prepared.chat.family.linear_attention:
            raise UserError(Problem(prepared.places(blind[0]), "has no picture; DeepSpeed would wait for ever for the vision tower",
                                    "use configs/ddp.yaml, or train on records with pictures only"))  # fmt: skip

    def mine(self, rows: list[int]) -> list[int | None]:
        """This process's rows of a step; None where another has one more, so that all make the same number of passes."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        own: list[int | None] = list(rows[rank::world])
        return own + [None] * (math.ceil(len(rows) / world) - len(own))

    def rows_of(self, prepared: Prepared) -> Rows:
        """The rows of a plan as tensors."""
        return Rows(prepared.scripts, prepared.plan.rows, prepared.chat, self.image_processor, self.always_look,
                    skip=self.config.on_bad_record == "skip")  # fmt: skip

    def loader(self, steps: list[tuple[int, list[int]]]) -> DataLoader[Built | UserError]:
        """This process's rows in the order of the steps, built ahead by the workers."""
        order = [0 if row is None else row for _, rows in steps for row in self.mine(rows)]
        build, workers = self.rows_of(self.prepared).built_or_problems, self.config.dataloader_num_workers
        # A list does for a Dataset, whatever its type says.
        return DataLoader(order, batch_size=None, num_workers=workers, collate_fn=build,  # type: ignore[arg-type]
                          worker_init_fn=ignore_signals)  # fmt: skip

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Adds the gradients of one row; the processes exchange theirs with the last row of a step."""
        if self.deepspeed:
            self.accelerator.deepspeed_engine_wrapped.backward(loss, sync_gradients=last)
        else:
            with nullcontext() if last else self.accelerator.no_sync(self.model):
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
        return state

    def save(self, step: int, same: dict[str, str]) -> None:
        """Writes checkpoint-N whole, then takes the oldest away."""
        folder = self.config.output_dir / f"checkpoint-{step}"
        state = self.adapter_state()

        def write(incoming: Path) -> None:
            save_file(state, incoming / ADAPTER_WEIGHTS, {"format": "pt"})
            self.bare.peft_config["default"].save_pretrained(incoming)
            if self.deepspeed:
                parts.rename(incoming / "deepspeed")
            else:
                moments = self.optimizer.state_dict()["state"]
                flat = {f"{number}.{key}": value for number, entry in moments.items() for key, value in entry.items()}
                save_file({key: value.detach().cpu().contiguous() for key, value in flat.items()}, incoming / OPTIMIZER)
            facts = {"step": step, "processes": self.accelerator.num_processes, "deepspeed": self.deepspeed, "same": same}
            (incoming / STATE).write_text(json.dumps(facts, indent=1) + "\n")

        parts = self.config.output_dir / INCOMING / "deepspeed"
        if self.deepspeed:  # its engine's own files, one for each process, beside ours
            if self.accelerator.is_main_process:
                shutil.rmtree(parts, ignore_errors=True)  # of a run that was cut off here
            self.accelerator.wait_for_everyone()
            self.model.save_checkpoint(str(parts), tag="engine", exclude_frozen_parameters=True)
            self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            write_whole(folder, write)
            rotate(self.config.output_dir, self.config.save_total_limit)
        self.accelerator.wait_for_everyone()

    def load(self, folder: Path) -> int:
        """Puts optimizer (and DeepSpeed's engine) back to where the checkpoint was; returns its step."""
        facts = json.loads((folder / STATE).read_text())
        if facts["deepspeed"] != self.deepspeed or (self.deepspeed and facts["processes"] != self.accelerator.num_processes):
            was = f"{facts['processes']} processes {'with' if facts['deepspeed'] else 'without'} DeepSpeed"
            raise UserError(Problem(str(folder), f"was written by {was}", "start again the same way, or into another output_dir"))
        if self.deepspeed:
            self.model.load_checkpoint(str(folder / "deepspeed"), tag="engine", load_module_strict=False)
        else:
            entries: dict[int, dict[str, torch.Tensor]] = {}
            for name, tensor in load_file(folder / OPTIMIZER).items():
                number, key = name.split(".", 1)
                entries.setdefault(int(number), {})[key] = tensor
            self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": entries})
        return int(facts["step"])


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
        if changed := differences(before, same, json.loads(plan.read_text()) if plan.is_file() else {}, prepared):
            fix = "set it back, or choose another output_dir"
            raise UserError(*(Problem(str(folder), what, fix) for what in changed))
    return folder


def fingerprint(prepared: Prepared, config: Config) -> dict[str, str]:
    """What a checkpoint must agree on before a run goes on from it, each as a short hash or text."""
    pictures = {(str(of.source), of.height, of.width) for record in prepared.records for of in record.pictures}
    same = "lora_on lora_rank lora_alpha lora_dropout rows_per_step learning_rate lr_scheduler_type warmup_ratio weight_decay "
    same += "max_grad_norm seed dtype num_train_epochs max_steps"
    settings = {key: str(getattr(config, key)) for key in same.split()}
    return {
        **settings,
        "base model": short_hash(base_fingerprint(config.model)),
        "training records": short_hash([script.ids for script in prepared.scripts]),
        "pictures": short_hash(sorted(pictures)),
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
        repacked = "the rows are packed in another way: min_pixels or max_pixels changed"
        said.append(f"row_tokens was {was} and is now {room}" if was != room else repacked)
    return said
