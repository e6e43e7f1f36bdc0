"""What differs between the Qwen-VL families, as data. Everything else is read from the model's own files.

Looked up by `model_type` of config.json, never by a folder's name.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.folders.adapter import module_of, read_header
from qwenvl_ft.folders.model import read_config, weight_files

TABLES = ("embed_tokens", "pos_embed", ".mlp.gate")  # which have two axes as a linear layer has; the last one chooses experts
EXPERTS = ".mlp.experts."
SMALL = (
    "in_proj_a",
    "in_proj_b",
    "shared_expert_gate",
)  # linear layers of one number for each head or token, which are not targets
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
    `like`: of a model_type that is not in the table, the one in it that has its layers; training tries first whether it is alike.
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
    like: str = ""


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
    """The family of the model in this folder: by its model_type, or by its layers, if these are those of a known one.

    Raises UserError where there is none, or it has a layer that no known family has.
    """
    config = read_config(model_dir)
    model_type = config.get("model_type")
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    layers = layers_of(model_dir) if {"vision_config", "image_token_id"} <= config.keys() else {}
    beyond = {name: [*_beyond(layers, family)] for name, family in FAMILIES.items()} if layers else {}
    like = min(beyond, key=lambda name: len(beyond[name]), default="")
    if like and not beyond[like]:
        return replace(FAMILIES[like], like=like)
    what = f"model_type {model_type!r} is not one of {', '.join(FAMILIES)}"
    what += f", and is not like {like}, by {beyond[like][0]} to begin with" if like else ""
    raise UserError(Problem(str(model_dir / "config.json"), what, f"use a model of {', '.join(NAMES)}"))


def shapes_of(model_dir: Path) -> dict[str, list[int]]:
    """The shapes of a model's weights, by the modules that have them, as transformers 5 names these; of experts, whose weights may
    have no module, by their own names. By the headers of its files: nothing where it has none."""
    return {
        module_of(of.key): of.shape
        for path in weight_files(model_dir) for of in read_header(path)[1] if of.key.endswith(".weight") or EXPERTS in of.key
    }  # fmt: skip


def layers_of(model_dir: Path) -> dict[str, bool]:
    """The modules of a model that have a weight, see shapes_of, and whether it has the two axes of a linear layer's."""
    shapes = shapes_of(model_dir)
    return {name: len(shape) == 2 and not name.endswith(TABLES) and EXPERTS not in name for name, shape in shapes.items()}


def _beyond(layers: Mapping[str, bool], family: Family) -> Iterator[str]:
    """What of a model's layers this family has not, and what it has and they lack."""
    towers = {"language": family.language, "vision": family.vision, "merger": family.merger}
    for mark, has in {".linear_attn.": family.linear_attention, EXPERTS: family.experts}.items():
        found = [name for name in layers if mark in name]
        if has != bool(found):
            yield found[0] if found else f"the lack of {mark.strip('.')}"
    yield from (
        f"the lack of {tower} layers"
        for tower, of in towers.items()
        if not any(re.fullmatch(of, name) for name in layers if layers[name])
    )
    yield from (
        name for name, linear in layers.items()
        if linear and name != "lm_head" and not name.endswith(SMALL) and not re.fullmatch("|".join(towers.values()), name)
    )  # fmt: skip


def feature_width(model_dir: Path) -> int:
    """How many numbers the vision tower hands over for a token: the language model's width, once more for each of the layers that
    Qwen3-VL's deepstack feeds."""
    config = read_config(model_dir)
    width: int = config.get("text_config", config)["hidden_size"]
    return width * (1 + len(config["vision_config"].get("deepstack_visual_indexes") or ()))
