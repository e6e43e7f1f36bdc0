"""What differs between the Qwen-VL families, as data. Everything else is read from the model's own files.

Looked up by `model_type` of config.json, never by a folder's name.
"""

from dataclasses import dataclass
from pathlib import Path

from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.folders.problems import read_model_json

ATTENTION = r"self_attn\.(?:q_proj|k_proj|v_proj|o_proj)"
GATED_MLP = r"mlp\.(?:gate_proj|up_proj|down_proj)"


@dataclass(frozen=True)
class Family:
    """One row of the table. The LoRA targets are regular expressions over whole module names.

    `packs`: several records may share a row. Qwen3.5's linear attention leaks from record to record without a word unless
    flash-linear-attention is installed, so it gets one record a row.
    `rewrites_turns`: the chat template writes an answer differently once it is no longer the last (Qwen3.5 drops the empty
    thought), so a record with three answers becomes three examples, each teaching its last answer.
    """

    language: str
    vision: str
    merger: str
    packs: bool = True
    rewrites_turns: bool = False


LANGUAGE = rf"model\.language_model\.layers\.\d+\.(?:{ATTENTION}|{GATED_MLP})"
QWEN3_VISION = r"model\.visual\.blocks\.\d+\.(?:attn\.(?:qkv|proj)|mlp\.linear_fc[12])"
QWEN2_MERGER = r"model\.visual\.merger\.mlp\.[02]"

FAMILIES = {
    "qwen2_vl": Family(LANGUAGE, r"model\.visual\.blocks\.\d+\.(?:attn\.(?:qkv|proj)|mlp\.fc[12])", QWEN2_MERGER),
    "qwen2_5_vl": Family(LANGUAGE, rf"model\.visual\.blocks\.\d+\.(?:attn\.(?:qkv|proj)|{GATED_MLP})", QWEN2_MERGER),
    "qwen3_vl": Family(LANGUAGE, QWEN3_VISION, r"model\.visual\.(?:merger|deepstack_merger_list\.\d+)\.linear_fc[12]"),
    "qwen3_5": Family(
        rf"model\.language_model\.layers\.\d+\.(?:{ATTENTION}|{GATED_MLP}|linear_attn\.(?:in_proj_qkv|in_proj_z|out_proj))",
        QWEN3_VISION,
        r"model\.visual\.merger\.linear_fc[12]",
        packs=False,
        rewrites_turns=True,
    ),
}


def family_of(model_dir: Path) -> Family:
    """The family of the model in this folder. Raises UserError where there is none or it is not known."""
    config = model_dir / "config.json"
    if not config.is_file():
        if (model_dir / "adapter_config.json").is_file():
            raise UserError(Problem(str(model_dir), "is an adapter, not a model", "give its base, and this folder with --adapter"))
        fix = "download one: qwenvl-ft download Qwen/Qwen2-VL-7B-Instruct --hub modelscope --local-dir DIR"
        raise UserError(Problem(str(model_dir), "holds no config.json, so it is not a model's folder", fix))
    model_type = read_model_json(config).get("model_type")
    if model_type not in FAMILIES:
        raise UserError(
            Problem(str(config), f"model_type {model_type!r} is not one of {', '.join(FAMILIES)}", "use a Qwen-VL model")
        )
    return FAMILIES[model_type]
