"""Merges an adapter into its base, shard by shard, and proves that the result says what base and adapter said.

    merged = base + (alpha / rank) * B @ A, summed in float32, cast back to the base's dtype, under the base's own key names

Only the tensors that the adapter touches are computed; the rest are copied as they are.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from qwenvl_ft import checkpoint
from qwenvl_ft.config import load_config
from qwenvl_ft.engine import Engine, check_adapter
from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.geometry import read_model_json
from qwenvl_ft.meta import Turn, read_meta
from qwenvl_ft.prepare import base_fingerprint
from qwenvl_ft.results import BASE

LORA_KEY = re.compile(r"base_model\.model\.(.+)\.lora_(A|B)\.weight$")
NOT_COPIED = ("processor_config.json", "preprocessor_config.json", "model.safetensors.index.json")
LIMIT = {"float32": 1e-3, "float16": 0.02, "bfloat16": 0.1}  # of the largest logit: what rounding the weights can explain


def export(adapter: Path, out: Path, model_dir: Path | None, on_shard: Callable[[int, int], None]) -> Path:
    """Writes the merged model to `out` and returns the base's folder. `out` loads with `from_pretrained` and nothing else.

    `model_dir` defaults to the base that the adapter names. Raises UserError, and leaves no `out`, if the base is not the one
    that was trained on or an adapter tensor has no home in it.
    """
    check_adapter(adapter)
    settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    base = model_dir or Path(settings["base_model_name_or_path"])
    if not (base / "config.json").is_file():
        raise UserError(Problem(str(base), "is not a model's folder", "give the base with --model DIR"))
    if out.exists():
        raise UserError(Problem(str(out), "exists already", "choose another --out, or delete it"))
    if (adapter / BASE).is_file() and json.loads((adapter / BASE).read_text()) != base_fingerprint(base):
        raise UserError(Problem(str(base), "is not the base that this adapter was trained on", "give that base with --model DIR"))
    deltas = Deltas(adapter, settings)
    out.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.write_whole(out, lambda folder: _write(folder, adapter, base, deltas, on_shard))
    return base


class Deltas:
    """What the adapter adds to each weight of the base, by the base's own key."""

    def __init__(self, adapter: Path, settings: dict[str, Any]):
        self.where = adapter / "adapter_model.safetensors"
        unknown = [
            key for key in ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "lora_bias") if settings.get(key)
        ]
        if settings.get("bias", "none") != "none" or unknown or settings["peft_type"] != "LORA":
            raise UserError(Problem(str(adapter), f"is no plain LoRA adapter ({', '.join(unknown) or settings['peft_type']})",
                                    "merge it with the tool that trained it"))  # fmt: skip
        rank = settings["r"]
        self.scale = settings["lora_alpha"] / (rank**0.5 if settings.get("use_rslora") else rank)
        self.pairs: dict[str, dict[str, torch.Tensor]] = {}
        with safe_open(self.where, "pt") as file:
            for key in file.keys():  # noqa: SIM118 - a safetensors file is no dict
                match = LORA_KEY.match(key)
                if not match:
                    raise UserError(
                        Problem(f"{self.where}: {key}", "is not a LoRA tensor that can be merged", "train it again with this tool")
                    )
                self.pairs.setdefault(match[1], {})[match[2]] = file.get_tensor(key)
        self.left = set(self.pairs)

    def add_to(self, key: str, weight: torch.Tensor) -> torch.Tensor:
        """The merged weight; the weight itself if the adapter does not touch it."""
        module = module_of(key)
        if module not in self.pairs:
            return weight
        pair = self.pairs[module]
        delta = pair["B"].float() @ pair["A"].float() * self.scale
        if delta.shape != weight.shape:
            raise UserError(Problem(f"{self.where}: {module}", f"has shape {tuple(delta.shape)}, the base {tuple(weight.shape)}",
                                    "give the right base with --model DIR"))  # fmt: skip
        self.left.discard(module)
        return (weight.float() + delta).to(weight.dtype)


def module_of(key: str) -> str:
    """The module that a checkpoint's key belongs to, as transformers 5 names it. Released Qwen2-VL and Qwen2.5-VL
    checkpoints have `visual.` and `model.` at the top where the model has `model.visual.` and `model.language_model.`."""
    module = key.removesuffix(".weight")
    if module.startswith("visual."):
        return "model." + module
    if module.startswith("model.") and not module.startswith(("model.visual.", "model.language_model.")):
        return "model.language_model." + module.removeprefix("model.")
    return module


def _write(folder: Path, adapter: Path, base: Path, deltas: Deltas, on_shard: Callable[[int, int], None]) -> None:
    shards = sorted(base.glob("*.safetensors"))
    if not shards:
        raise UserError(Problem(str(base), "holds no safetensors", "download the model in its safetensors form"))
    for done, shard in enumerate(shards, start=1):
        with safe_open(shard, "pt") as file:
            metadata = file.metadata() or {"format": "pt"}
            merged = {key: deltas.add_to(key, file.get_tensor(key)) for key in file.keys()}  # noqa: SIM118
        save_file(merged, folder / shard.name, metadata)
        on_shard(done, len(shards))
    if deltas.left:
        raise UserError(*(
            Problem(f"{deltas.where}: {module}", f"has no home in {base}", "give the right base with --model DIR")
            for module in sorted(deltas.left)
        ))  # fmt: skip
    for path in base.iterdir():
        copied = path.suffix in (".json", ".jinja", ".txt", ".model") and path.name not in NOT_COPIED
        if path.is_file() and (copied or path.name == "model.safetensors.index.json"):
            shutil.copy(path, folder / path.name)
    processor = next(source for source in (adapter, base) if any((source / name).is_file() for name in NOT_COPIED[:2]))
    for name in (*NOT_COPIED[:2], "chat_template.jinja", "tokenizer.json", "tokenizer_config.json"):
        if (processor / name).is_file():
            shutil.copy(processor / name, folder / name)  # the adapter's: with the limits that training used


def prove_on_training_record(merged: Path, base: Path, adapter: Path) -> tuple[float, float, str]:
    """`prove` on the first record that the run trained on, and its place; on a plain question where that is gone."""
    settings = adapter / "config.yaml"
    if settings.is_file():
        config = load_config(settings)
        records = read_meta(config.train_meta_file, config.train_data_dir)[0] if config.train_meta_file.is_file() else []
        if records:
            return *prove(merged, base, adapter, records[0].turns), records[0].where
    return *prove(merged, base, adapter, (Turn("user", ("What is this?",)),)), "a plain question"


def prove(merged: Path, base: Path, adapter: Path, turns: tuple[Turn, ...]) -> tuple[float, float]:
    """(largest difference of a logit, largest logit) between the merged model and base + adapter on one real conversation.

    Raises UserError if the difference is more than rounding can explain; the merged folder then gets the name `*.differs`.
    """
    wanted, got = _logits(base, adapter, turns), _logits(merged, None, turns)
    difference, largest = (wanted - got).abs().max().item(), wanted.abs().max().item()
    config = read_model_json(merged / "config.json")
    stored = config.get("dtype") or config.get("torch_dtype") or "float32"
    if not difference <= LIMIT.get(stored, LIMIT["float32"]) * largest:
        merged.rename(merged.with_name(merged.name + ".differs"))
        raise UserError(Problem(str(merged), f"differs from base and adapter by {difference:.3g} (largest logit {largest:.3g})",
                                "it was renamed to *.differs; report this with its adapter_config.json"))  # fmt: skip
    return difference, largest


def _logits(model_dir: Path, adapter: Path | None, turns: tuple[Turn, ...]) -> torch.Tensor:
    engine = Engine.open(model_dir, adapter)
    with torch.inference_mode():
        return engine.model(**engine.inputs([turns])).logits.float().cpu()
