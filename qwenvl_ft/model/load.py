"""Loads a base model and hangs LoRA on it."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional
from transformers import AutoModelForImageTextToText
from transformers.utils import is_flash_attn_2_available

from qwenvl_ft.data.families import Family
from qwenvl_ft.errors import Problem, UserError


class PatchEmbedding(nn.Conv3d):
    """A convolution whose kernel is its stride, run as the one matmul that it is.

    The stock convolution is 10 to 20 times slower with some builds of torch, on the CPU among them.
    """

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """(P, channels, time, height, width) of one patch each -> (P, embedding, 1, 1, 1)."""
        out = functional.linear(patches.flatten(1), self.weight.flatten(1), self.bias)
        return out[:, :, None, None, None]

    @classmethod
    def like(cls, conv: nn.Conv3d) -> "PatchEmbedding":
        """Shares the weights of `conv`, so state dicts keep their keys."""
        with torch.device("meta"):
            same = cls(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, bias=conv.bias is not None)
        same.weight, same.bias = conv.weight, conv.bias
        return same


def load_base(model_dir: Path, dtype: str, attention: str = "auto") -> Any:
    """The model of any family, on the CPU, in `dtype` (auto, bfloat16, float32).

    auto is bfloat16 where a GPU has it and float32 elsewhere; attention auto is flash_attention_2 where it is installed.
    Raises UserError for an attention that is not installed.
    """
    gpu = torch.cuda.is_available()
    if dtype == "auto":
        dtype = "bfloat16" if gpu and torch.cuda.is_bf16_supported() else "float32"
    if attention == "auto":
        attention = "flash_attention_2" if gpu and dtype == "bfloat16" and is_flash_attn_2_available() else "sdpa"
    try:
        model = AutoModelForImageTextToText.from_pretrained(model_dir, dtype=getattr(torch, dtype), attn_implementation=attention)
    except ImportError as error:  # raised before the weights are read
        what = str(error).strip().splitlines()[0]
        fix = "set attn_implementation=auto, which takes what is installed"
        raise UserError(Problem(f"attn_implementation: {attention}", f"cannot run here: {what}", fix)) from error
    patch_embed = model.model.visual.patch_embed
    patch_embed.proj = PatchEmbedding.like(patch_embed.proj)
    return model


def add_lora(model: Any, family: Family, on: list[str], rank: int, alpha: float, dropout: float, seed: int) -> Any:
    """The model with fresh LoRA weights, drawn from `seed`, on the named towers (language, vision, merger)."""
    torch.manual_seed(seed)
    targets = "|".join(f"(?:{getattr(family, tower)})" for tower in on)
    lora = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, task_type="CAUSAL_LM")
    return get_peft_model(model, lora)


def trainable(model: Any) -> dict[str, nn.Parameter]:
    """The parameters that train, by name, in the model's order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
