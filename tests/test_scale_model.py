"""scripts/scale_model.py counts on paper: its counts against the models themselves, and what must follow from them."""

import argparse
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForImageTextToText

from qwenvl_ft.data.families import FAMILIES
from qwenvl_ft.model.load import add_lora, trainable
from tests.runs import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
from real_shapes import SHAPES, config_of
from scale_model import DDP, MODELS, SHARDED, step_of


@pytest.mark.parametrize("name", [name for name in MODELS if name in SHAPES])
def test_parameters_are_the_models_own(name):
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config_of(name, toy=False))
        counted = sum(of.numel() for of in model.parameters())
        adapted = add_lora(model, FAMILIES[SHAPES[name][0]], ["language"], 16, 32, 0.0, 0)
    assert MODELS[name].parameters == pytest.approx(counted, rel=0.01)
    assert MODELS[name].lora(16) == sum(of.numel() for of in trainable(adapted).values())


def test_more_cards_cost_more_each_and_sharing_costs_exchange_and_saves_memory():
    given = argparse.Namespace(
        cards_per_node=8, tflops=989.0, mfu=0.45, node_gb_s=400.0, network_gb_s=45.0, latency_us=10.0, rows=1, row_tokens=4096,
        record_tokens=1024, picture_share=0.7, taught_share=0.1, rank=16, spread=0.03, recompute=True,
    )  # fmt: skip
    steps = {(method, n): step_of(MODELS["Qwen2-VL-7B"], method, n, given) for method in (DDP, SHARDED) for n in (1, 8, 64, 1024)}
    for method in (DDP, SHARDED):
        seconds = [steps[method, n].seconds for n in (1, 8, 64, 1024)]
        assert seconds == sorted(seconds) and steps[method, 1].exchange == 0 and steps[method, 1].efficiency == 1
    assert steps[SHARDED, 64].exchange > steps[DDP, 64].exchange and steps[SHARDED, 64].gib < 0.25 * steps[DDP, 64].gib
    given.recompute = False
    assert step_of(MODELS["Qwen2-VL-7B"], DDP, 8, given).gib > steps[DDP, 8].gib


def test_what_is_assumed_stands_beside_the_table(tmp_path):
    svg = tmp_path / "scale.svg"
    command = [sys.executable, ROOT / "scripts/scale_model.py", "--models", "Qwen2-VL-2B", "--cards", "1", "16", "--mfu", "0.3",
               "--svg", svg]  # fmt: skip
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "mfu=0.3" in said.splitlines()[0] and said.count("| Qwen2-VL-2B |") == 4
    assert svg.read_text().count("<polyline") == 2
