"""What of a model trains, and how: each setting against PEFT and plain torch, and the merge of what it trains."""

import json
import re

import pytest
import torch
from torch import nn

from qwenvl_ft.data.families import family_of
from qwenvl_ft.data.targets import find_layers, tower_of
from qwenvl_ft.errors import UserError
from qwenvl_ft.export.merge import export
from tests.conftest import TINY
from tests.runs import config, metrics, run

TOWERS = {
    "language": {"rank": 4},
    "vision": {"rank": 2, "alpha": 3, "learning_rate": 2e-2},
    "merger": {"rank": 6, "learning_rate": 5e-3},
}


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    """A run with LoRA of its own on each tower."""
    folder = tmp_path_factory.mktemp("towers")
    run(folder, lora_on=TOWERS, learning_rate=1e-2, warmup_ratio=0.0)
    return folder / "run"


def loaded(adapter, base=TINY):
    """Base and adapter, by PEFT alone."""
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    return PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32), adapter)


def lora_layers(model):
    from peft.tuners.lora import LoraLayer

    prefix = "base_model.model."
    return {name.removeprefix(prefix): layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}


def merges_as_pefts(adapter, folder, base=TINY):
    """Exports, proven, and compares every weight with PEFT's own merge."""
    from transformers import AutoModelForImageTextToText

    (proof,) = export(adapter, folder, base, 1, lambda done, total: None)
    wanted = loaded(adapter, base).merge_and_unload().state_dict()
    ours = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).state_dict()
    assert wanted.keys() == ours.keys() and all(wanted[key].allclose(ours[key], atol=1e-5) for key in wanted)
    assert proof["difference"] <= 1e-3 * proof["largest"]
    return proof


def test_each_tower_has_its_own_rank_and_alpha_and_peft_reads_them(towers, tmp_path):
    scales = {"language": (4, 8 / 4), "vision": (2, 3 / 2), "merger": (6, 8 / 6)}
    layers = lora_layers(loaded(towers))
    assert {tower_of(name) for name in layers} == TOWERS.keys()
    for name, layer in layers.items():
        assert (layer.r["default"], layer.scaling["default"]) == scales[tower_of(name)], name
    merges_as_pefts(towers, tmp_path / "merged")


def test_each_tower_has_its_own_rate_at_every_step_and_in_the_results(towers):
    for line in metrics(towers):
        assert line["learning_rate_vision"] == pytest.approx(2 * line["learning_rate"])
        assert line["learning_rate_merger"] == pytest.approx(line["learning_rate"] / 2)
    results = json.loads((towers / "all_results.json").read_text())
    assert results["learning_rates"] == {"learning_rate": 1e-2, "learning_rate_vision": 2e-2, "learning_rate_merger": 5e-3}
    assert json.loads((towers / "plan.json").read_text())["trains"][1] == "LoRA on vision, rank 2, alpha 3, learning rate 0.02"


def test_a_first_step_moves_each_weight_by_the_rate_of_its_tower(tmp_path):
    """AdamW's first step is the rate itself, up or down, whatever the gradient: what B is after it, which began at zero."""
    trained = run(tmp_path, lora_on=TOWERS, learning_rate=1e-2, warmup_ratio=0.0, max_steps=1, lr_scheduler_type="constant")
    rates = {"language": 1e-2, "vision": 2e-2, "merger": 5e-3}
    for name, tensor in trained.items():
        if "lora_B" in name:
            assert tensor.abs().median() == pytest.approx(rates[tower_of(name)], rel=1e-3), name


def test_layers_are_chosen_by_name_or_by_a_regular_expression_in_the_towers_that_train(tmp_path):
    def layers(**settings):
        return find_layers(config(tmp_path, **settings))

    both = ["language", "vision"]
    assert {name.rsplit(".", 2)[-1] for name in layers(lora_targets=["q_proj", "mlp.up_proj"])} == {"q_proj", "up_proj"}
    only_first = layers(lora_targets=r"model\.language_model\.layers\.0\..*_proj")
    assert len(only_first) == 7 and all(".layers.0." in name for name in only_first)
    trained = run(tmp_path, lora_targets=["q_proj", "attn.qkv"], lora_on=both, max_steps=1)
    assert {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in trained} == {"q_proj", "qkv"}
    assert lora_layers(loaded(tmp_path / "run")).keys() == set(layers(lora_targets=["q_proj", "attn.qkv"], lora_on=both))


@pytest.mark.parametrize(("settings", "said"), [
    ({"lora_targets": ["q_proj", "qproj"]}, r"lora_targets: qproj: names no layer of language\n  fix: choose among .*self_attn.q_proj"),
    ({"lora_targets": ["attn.qkv"]}, "names no layer of language\n  fix: add vision to lora_on, or choose among"),
    ({"lora_targets": ["norm"]}, "model.language_model.norm is no linear layer"),
    ({"lora_targets": ["embed_tokens"]}, "embed_tokens is no linear layer"),
    ({"lora_targets": ["patch_embed.proj"], "lora_on": ["vision"]}, "patch_embed.proj is no linear layer"),
    ({"lora_targets": "q_proj"}, "lora_targets: q_proj: names no layer"),
])  # fmt: skip
def test_what_matches_nothing_or_is_no_linear_layer_is_said_before_torch_with_what_there_is(settings, said, tmp_path, monkeypatch):
    from qwenvl_ft.train import loop

    monkeypatch.setattr(loop, "load_base", None)
    with pytest.raises(UserError, match=said):
        run(tmp_path, **settings)


def test_the_linear_layers_of_every_family_are_those_of_its_modules(family_model, tmp_path):
    """The headers of files say what is linear by its axes alone."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(family_model)
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)} - {"lm_head"}
    everywhere = ["language", "vision", "merger"]
    found = find_layers(config(tmp_path, model=family_model, lora_targets="all-linear", lora_on=everywhere))
    assert set(found) == linear
    family = family_of(family_model)
    for tower in everywhere:
        chosen = {name for name in linear if re.fullmatch(getattr(family, tower), name)}
        assert chosen and {tower_of(name) for name in chosen} == {tower}
