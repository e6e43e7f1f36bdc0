"""A model that is not trained on here is told so, and what is."""

import json
import re

import pytest

from qwenvl_ft.data.families import FAMILIES, NAMES, family_of
from qwenvl_ft.data.targets import find_layers
from qwenvl_ft.errors import UserError
from tests.runs import config


def test_experts_are_asked_of_a_mixture_only(tmp_path):
    """The other way round: LoRA on the language model of a mixture leaves experts and router alone."""
    with pytest.raises(UserError, match="lora_on: experts: data/tiny is no mixture of experts\n  fix: leave experts out"):
        find_layers(config(tmp_path, lora_on=["language", "experts"]))
    for model_type in ("qwen3_vl_moe", "qwen3_5_moe"):
        for layer in ("experts.gate_up_proj", "experts.0.up_proj", "gate", "shared_expert_gate"):
            assert not re.fullmatch(FAMILIES[model_type].language, f"model.language_model.layers.0.mlp.{layer}")


@pytest.mark.parametrize(("text", "listed"), [
    ("self_attn.q_proj", "[self_attn.q_proj]"), ("q_proj, v_proj", "[q_proj, v_proj]"), ("qproj", "[q_proj]; choose among"),
])  # fmt: skip
def test_a_name_without_brackets_is_told_how_to_write_names(text, listed, tmp_path):
    """It was told to choose among layers of which it had named one."""
    with pytest.raises(UserError) as error:
        find_layers(config(tmp_path, lora_targets=text))
    said = f"a text is a regular expression over whole names: for names write a list, {listed}"
    assert error.value.problems[0].fix.startswith(said) and find_layers(config(tmp_path, lora_targets=["q_proj"]))


@pytest.mark.parametrize("model_type", ["qwen2_5_omni", "llava", None])
def test_another_model_is_told_which_families_are_known(model_type, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(UserError) as error:
        family_of(tmp_path)
    assert error.value.problems[0].fix == f"use a model of {', '.join(NAMES)}" and len(NAMES) == len(FAMILIES)
