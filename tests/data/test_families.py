"""A model that is not trained on here is told so, and what is."""

import json

import pytest

from qwenvl_ft.data.families import FAMILIES, NAMES, family_of
from qwenvl_ft.errors import UserError


@pytest.mark.parametrize("model_type", ["qwen3_vl_moe", "qwen3_5_moe"])
def test_a_mixture_of_experts_is_told_that_it_is_not_trained_yet(model_type, tmp_path):
    """Qwen3-VL-30B-A3B was told to use a Qwen-VL model, which it is."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(UserError) as error:
        family_of(tmp_path)
    (problem,) = error.value.problems
    assert problem.fix.startswith("mixtures of experts are not trained here yet: use a model of Qwen2-VL, Qwen2.5-VL")


@pytest.mark.parametrize("model_type", ["qwen2_5_omni", "llava", None])
def test_another_model_is_told_which_families_are_known(model_type, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(UserError) as error:
        family_of(tmp_path)
    assert error.value.problems[0].fix == f"use a model of {', '.join(NAMES)}" and len(NAMES) == len(FAMILIES)
