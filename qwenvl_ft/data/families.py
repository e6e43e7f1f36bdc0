"""What differs between the Qwen-VL families, as data. Everything else is read from the model's own files.

Looked up by `model_type` of config.json, never by a folder's name.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.folders.model import read_config

ATTENTION = r"self_attn\.(?:q_proj|k_proj|v_proj|o_proj)"
# How boxes are written: Qwen2-VL's tokens with thousandths of the picture's sides, or JSON with these, or with px of the picture as
# it was resized.
BoxForm = Literal["tokens", "thousand", "pixels"]
GATED_MLP = r"mlp\.(?:gate_proj|up_proj|down_proj)"
SHARED_MLP = r"mlp\.(?:shared_expert\.)?(?:gate_proj|up_proj|down_proj)"  # which every token passes


@dataclass(frozen=True)
class Family:
    """One row of the table. The LoRA targets are regular expressions over whole module names; `boxes` is how it writes boxes.

    `linear_attention`: some layers keep a state in place of keys and values, which can be neither padded nor cut: questions are
    answered one by one.
    `experts`: some layers hold a mixture of experts, of which a token passes a few; the targets leave them and their router out.
    `clock`: how the model knows when a step of a video is shown: its steps follow each other on the time axis by ones, or by
    seconds, or the seconds are written before each.
    """

    language: str
    vision: str
    merger: str
    boxes: BoxForm
    linear_attention: bool = False
    experts: bool = False
    clock: Literal["steps", "seconds", "written"] = "steps"


LANGUAGE = rf"model\.language_model\.layers\.\d+\.(?:{ATTENTION}|{GATED_MLP})"
LINEAR_ATTENTION = r"linear_attn\.(?:in_proj_qkv|in_proj_z|out_proj)"
QWEN3_5_LANGUAGE = rf"model\.language_model\.layers\.\d+\.(?:{ATTENTION}|{SHARED_MLP}|{LINEAR_ATTENTION})"
QWEN3_5_MERGER = r"model\.visual\.merger\.linear_fc[12]"
QWEN3_VISION = r"model\.visual\.blocks\.\d+\.(?:attn\.(?:qkv|proj)|mlp\.linear_fc[12])"
QWEN3_MERGER = r"model\.visual\.(?:merger|deepstack_merger_list\.\d+)\.linear_fc[12]"
QWEN2_MERGER = r"model\.visual\.merger\.mlp\.[02]"

FAMILIES = {
    "qwen2_vl": Family(LANGUAGE, r"model\.visual\.blocks\.\d+\.(?:attn\.(?:qkv|proj)|mlp\.fc[12])", QWEN2_MERGER, "tokens"),
    "qwen2_5_vl": Family(
        LANGUAGE, rf"model\.visual\.blocks\.\d+\.(?:attn\.(?:qkv|proj)|{GATED_MLP})", QWEN2_MERGER, "pixels", clock="seconds"
    ),
    "qwen3_vl": Family(LANGUAGE, QWEN3_VISION, QWEN3_MERGER, "thousand", clock="written"),
    "qwen3_vl_moe": Family(LANGUAGE, QWEN3_VISION, QWEN3_MERGER, "thousand", experts=True, clock="written"),
    "qwen3_5": Family(QWEN3_5_LANGUAGE, QWEN3_VISION, QWEN3_5_MERGER, "thousand", linear_attention=True, clock="written"),
    "qwen3_5_moe": Family(
        QWEN3_5_LANGUAGE, QWEN3_VISION, QWEN3_5_MERGER, "thousand", linear_attention=True, experts=True, clock="written"
    ),
}
# As people call these; Qwen3.6 and Qwen3.8 are of the last two types.
NAMES = ("Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL", "Qwen3-VL-MoE", "Qwen3.5", "Qwen3.5-MoE")


def family_of(model_dir: Path) -> Family:
    """The family of the model in this folder. Raises UserError where there is none or it is not known."""
    model_type = read_config(model_dir).get("model_type")
    if model_type not in FAMILIES:
        what = f"model_type {model_type!r} is not one of {', '.join(FAMILIES)}"
        raise UserError(Problem(str(model_dir / "config.json"), what, f"use a model of {', '.join(NAMES)}"))
    return FAMILIES[model_type]


def feature_width(model_dir: Path) -> int:
    """How many numbers the vision tower hands over for a token: the language model's width, once more for each of the layers that
    Qwen3-VL's deepstack feeds."""
    config = read_config(model_dir)
    width: int = config.get("text_config", config)["hidden_size"]
    return width * (1 + len(config["vision_config"].get("deepstack_visual_indexes") or ()))
