"""Loads a base model and its processor, and hangs LoRA on it: fresh for training, or as an adapter's folder has it."""

import re
from collections.abc import Collection, Mapping, Sequence
from copy import copy
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper
from torch import nn
from torch.nn import functional
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, AutoProcessor, GenerationConfig
from transformers.integrations.deepspeed import deepspeed_config, is_deepspeed_zero3_enabled
from transformers.utils.import_utils import is_flash_attn_2_available

from qwenvl_ft.data.chat import Chat
from qwenvl_ft.data.families import Family, family_of
from qwenvl_ft.data.reading import Reading
from qwenvl_ft.data.targets import INSIDE, MERGERS
from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.folders.adapter import FUSED, OLD_KEYS
from qwenvl_ft.folders.model import read_config
from qwenvl_ft.folders.runs import processor_folder
from qwenvl_ft.model.attention import use_varlen
from qwenvl_ft.model.head import LossHead
from qwenvl_ft.model.last_layer import LastLayer
from qwenvl_ft.model.linear_attention import keep_apart
from qwenvl_ft.model.lora import multiply_in_dtype_of_input
from qwenvl_ft.model.quantized import multiply_dequantized, settings_of
from qwenvl_ft.model.waits import put_unasked
from qwenvl_ft.values import Own, Quantization, Tower


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
        same = copy(conv)
        same.__class__ = cls
        return cast(PatchEmbedding, same)


def dtype_here() -> str:
    """bfloat16 where a GPU has it, float32 elsewhere."""
    return "bfloat16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False) else "float32"


def load_base(
    model_dir: Path, dtype: str, attention: str = "auto", packed: bool = False, device: torch.device | None = None,
    quantization: Quantization = "none",
) -> Any:  # fmt: skip
    """The model of any family, in `dtype` (auto, bfloat16, float32), on the CPU or read straight to a device.

    auto is bfloat16 where a GPU has it and float32 elsewhere; attention auto is flash_attention_2 where it is installed, else
    varlen for rows that are `packed`, else sdpa. With `quantization` its layers are quantized as they are read, and what is left
    is in `dtype`, as is what they multiply. Raises UserError for an attention that is not installed.
    """
    if (model_type := read_config(model_dir).get("model_type")) not in CONFIG_MAPPING:  # its layers may be known here all the same
        what = f"model_type {model_type!r} is not known to transformers {transformers.__version__}"
        raise UserError(Problem(str(model_dir / "config.json"), what, "install the version that its makers name"))
    if dtype == "auto":
        dtype = dtype_here()
    if attention == "auto":
        flash = torch.cuda.is_available() and dtype == "bfloat16" and is_flash_attn_2_available()
        attention = "flash_attention_2" if flash else "varlen" if packed else "sdpa"
    if is_deepspeed_zero3_enabled():  # shares weights out as they are read, and in the dtype that its own settings name
        deepspeed_config().update(bf16={"enabled": dtype == "bfloat16"})
    bits = settings_of(quantization, family_of(model_dir)) if quantization != "none" else None
    if bits:
        device = device or torch.device("cpu")  # left to itself it takes a GPU
    try:
        # Of generation_config.json counts what infer/decoding.py reads; transformers warns of the temperature 0 that is vLLM's.
        model = AutoModelForImageTextToText.from_pretrained(
            model_dir, dtype=getattr(torch, dtype), generation_config=GenerationConfig(),
            attn_implementation="sdpa" if attention == "varlen" else attention, device_map={"": device} if device else None,
            quantization_config=bits,
        )  # fmt: skip
    except ImportError as error:  # raised before the weights are read
        what = str(error).strip().splitlines()[0]
        fix = "set attn_implementation=auto, which takes what is installed"
        raise UserError(Problem(f"attn_implementation: {attention}", f"cannot run here: {what}", fix)) from error
    if bits:
        multiply_dequantized(model)
    return refit(model, attention)


def refit(model: Any, attention: str) -> Any:
    """A loaded model with this project's own patch embedding, last layer, LM head and, where it is varlen, attention."""
    # cuDNN makes a plan for every size that it has not met, about a second each forward and back, and torch 2.11 prefers it on
    # Hopper; rows and pictures have hundreds of sizes. It gave NaN with some masks, too, before cuDNN 9.26.
    torch.backends.cuda.enable_cudnn_sdp(False)
    patch_embed = model.model.visual.patch_embed
    patch_embed.proj = PatchEmbedding.like(patch_embed.proj)
    model.lm_head = LossHead.like(model.lm_head)
    LastLayer(model.get_decoder().layers)
    keep_apart(model)
    if attention == "varlen":
        use_varlen(model)
        put_unasked(model)
    return model


def open_processor(model_dir: Path, adapter: Path | None = None) -> Any:
    """The processor for answering: the adapter's own, if it has one (an adapter of another tool has none), else the base's."""
    processor = AutoProcessor.from_pretrained(processor_folder(model_dir, adapter))
    processor.tokenizer.padding_side = "left"  # is not saved with a tokenizer; answers start at the right edge
    return processor


def limited(processor: Any, chat: Chat, reading: Reading | None = None) -> Any:
    """The processor, held to the limits that the plan was made with, and to how its videos are drawn if that is given; saved with
    it, they are what is served."""
    pictures, videos = processor.image_processor, processor.video_processor
    pictures.size = {"shortest_edge": chat.limits.min_pixels, "longest_edge": chat.limits.max_pixels}
    videos.size = {"shortest_edge": chat.video_limits.min_pixels, "longest_edge": chat.video_limits.max_pixels}
    videos.max_video_tokens = chat.video_limits.max_video_tokens
    videos.cap_pixels_per_frame = True  # as qwen_vl_utils does; unset, it is a warning and no bound
    if reading:
        videos.fps, videos.max_frames = reading.video_fps, reading.video_max_frames
    return processor


def add_lora(model: Any, family: Family, on: Collection[Tower], rank: int, alpha: float, dropout: float, seed: int,
             own: Mapping[Tower, Own] = MappingProxyType({}), layers: Sequence[str] = (),
             use_rslora: bool = False, use_dora: bool = False) -> Any:  # fmt: skip
    """The model with fresh LoRA weights, drawn from `seed`, on the named towers (language, experts, vision, merger): on the
    family's layers there, or on those that are named. A tower may have a rank and an alpha of its `own`, or be trained in full:
    then a copy of it, in float32, is part of the adapter.
    """
    torch.manual_seed(seed)
    with_lora = [tower for tower in on if not (tower in own and own[tower].full)]
    copied = [name for name, _ in model.named_modules() if re.fullmatch(MERGERS, name)] if len(with_lora) < len(on) else None
    ranks = {tower: (tower in own and own[tower].rank) or rank for tower in on}
    alphas = {tower: (tower in own and own[tower].alpha) or alpha for tower in on}
    # What stands in the adapter's settings for all is the language model's: so vLLM, which knows no patterns, counts it right. Or
    # the experts', of whose pattern PEFT 0.21 says that it was ignored, though it was not; vLLM takes no such adapter.
    first = min(with_lora, key=list(INSIDE).index)
    lora = LoraConfig(
        r=ranks[first], lora_dropout=dropout, use_rslora=use_rslora, use_dora=use_dora, task_type="CAUSAL_LM",
        lora_alpha=alphas[first],  # type: ignore[arg-type]  # PEFT takes a fraction, too
        target_modules=list(layers) or "|".join(f"(?:{getattr(family, tower)})" for tower in with_lora if tower != "experts") or [],
        target_parameters=[f"mlp.experts.{name}" for name in FUSED] if "experts" in on else None,
        rank_pattern={INSIDE[tower]: ranks[tower] for tower in with_lora if ranks[tower] != ranks[first]},
        alpha_pattern={INSIDE[tower]: alphas[tower] for tower in with_lora if alphas[tower] != alphas[first]},
        modules_to_save=copied,
    )  # fmt: skip
    adapted = get_peft_model(model, lora)
    for module in adapted.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.modules_to_save.float()  # a step at these rates is less than bfloat16 can tell apart
            for copy_of in module.modules_to_save.values():
                multiply_in_dtype_of_input(copy_of)
    return adapted


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
