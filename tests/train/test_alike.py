"""A model of a type that no table knows: trained as the family whose layers it has if it proves to be alike, else refused."""

import json

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from qwenvl_ft.data.families import family_of
from qwenvl_ft.errors import UserError
from tests.runs import run
from tests.tiny import make_family
from tests.train.test_tuning import merges_as_pefts


class CopyConfig(Qwen3_5MoeConfig):
    model_type = "copy_of_qwen3_5_moe"


class Copy(Qwen3_5MoeForConditionalGeneration):
    config_class = CopyConfig


class LeakyConfig(Qwen3VLConfig):
    model_type = "leaky_copy_of_qwen3_vl"


class Leaky(Qwen3VLForConditionalGeneration):
    """A record sees the one before it in its row."""

    config_class = LeakyConfig

    def forward(self, input_ids=None, **named):
        found = super().forward(input_ids, **named)
        found.logits = found.logits * (1 + input_ids[0, 1:50].sum() % 7)
        return found


class DimConfig(Qwen3VLConfig):
    model_type = "dim_copy_of_qwen3_vl"


class Dim(Qwen3VLForConditionalGeneration):
    """It does something to what its tower sees."""

    config_class = DimConfig

    def get_image_features(self, *given, **named):
        found = super().get_image_features(*given, **named)
        found.pooler_output = [of * 0.9 for of in found.pooler_output]
        return found


for of_config, of_model in ((CopyConfig, Copy), (LeakyConfig, Leaky), (DimConfig, Dim)):
    AutoConfig.register(of_config.model_type, of_config)
    AutoModelForImageTextToText.register(of_config, of_model)


def renamed(folder, model_type, like):
    """A tiny model of the family `like`, that says another type."""
    config = json.loads((make_family(like, folder, light=True) / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": model_type}))
    return folder


def another(model, folder):
    """The same under a name that nobody knows, its weights where they are."""
    config = json.loads((model / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "another"}))
    (folder / "model.safetensors").symlink_to(model / "model.safetensors")


def test_a_copy_under_another_name_is_its_family_and_trains_and_merges(tmp_path, capsys):
    model = renamed(tmp_path / "model", "copy_of_qwen3_5_moe", "qwen3_5_moe")
    assert family_of(model).like == "qwen3_5_moe"
    trained = run(tmp_path, model=model, lora_on=["language", "experts"], max_steps=1, max_pixels=16 * 32 * 32)
    assert any(".experts." in name for name in trained)
    assert "its layers are those of qwen3_5_moe, and it proved to be alike" in " ".join(capsys.readouterr().out.split())
    merges_as_pefts(tmp_path / "run", tmp_path / "merged", model)


def test_one_that_is_not_alike_is_refused_with_the_property_that_it_lacks(tmp_path):
    model = renamed(tmp_path / "model", "leaky_copy_of_qwen3_vl", "qwen3_vl")
    with pytest.raises(UserError, match=r"its layers are those of qwen3_vl, but the loss of a record with a video is .* alone and"):
        run(tmp_path, model=model, max_steps=1, max_pixels=16 * 32 * 32)
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()


def test_one_whose_features_are_not_its_towers_is_refused(tmp_path):
    model = renamed(tmp_path / "model", "dim_copy_of_qwen3_vl", "qwen3_vl")
    with pytest.raises(UserError, match="but the image features of a prompt with a picture differ from transformers'"):
        run(tmp_path, model=model, max_steps=1, max_pixels=16 * 32 * 32)


def test_one_with_another_layer_is_refused_by_it_and_one_that_transformers_does_not_know_too(tmp_path):
    from safetensors.torch import load_file, save_file

    model = renamed(tmp_path / "model", "qwen9_vl", "qwen3_vl")
    with pytest.raises(UserError, match="model_type 'qwen9_vl' is not known to transformers 5"):
        run(tmp_path, model=model, max_steps=1, max_pixels=16 * 32 * 32)
    weights = load_file(model / "model.safetensors")
    save_file(weights | {"model.language_model.layers.0.ple.weight": torch.ones(2, 2)}, model / "model.safetensors")
    with pytest.raises(UserError, match=r"is not like qwen3_vl, by model.language_model.layers.0.ple to begin with"):
        family_of(model)


def test_no_family_is_taken_for_another(family_model, tmp_path):
    another(family_model, tmp_path)
    assert family_of(tmp_path).like == json.loads((family_model / "config.json").read_text())["model_type"]
