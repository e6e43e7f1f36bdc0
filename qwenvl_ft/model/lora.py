"""Hangs LoRA on a base model: fresh for training, or as an adapter's folder has it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from qwenvl_ft.data.families import Family
from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.folders.adapter import OLD_KEYS


def add_lora(model: Any, family: Family, on: Sequence[str], rank: int, alpha: float, dropout: float, seed: int) -> Any:
    """The model with fresh LoRA weights, drawn from `seed`, on the named towers (language, vision, merger)."""
    torch.manual_seed(seed)
    targets = "|".join(f"(?:{getattr(family, tower)})" for tower in on)
    lora = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT takes fractions, too
        lora_dropout=dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, lora)


def trainable(model: Any) -> dict[str, nn.Parameter]:
    """The parameters that train, by name, in the model's order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def add_adapter(model: Any, folder: Path, name: str, model_dir: Path) -> Any:
    """The model with one more adapter. Raises UserError for one that does not fit."""
    try:
        if isinstance(model, PeftModel):
            model.load_adapter(folder, name, key_mapping=OLD_KEYS)
            return model
        return PeftModel.from_pretrained(model, folder, adapter_name=name, key_mapping=OLD_KEYS)
    except (RuntimeError, ValueError) as error:
        what = f"does not fit the base {model_dir}"
        raise UserError(Problem(str(folder), what, "give the base that it was trained on")) from error
