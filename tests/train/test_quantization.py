"""A base in 4 or 8 bits beside LoRA, against bitsandbytes, transformers and PEFT themselves."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from qwenvl_ft.config import load_config
from qwenvl_ft.data import quantization
from qwenvl_ft.data.families import family_of
from qwenvl_ft.data.meta_file import read_records
from qwenvl_ft.data.prepare import make_ready
from qwenvl_ft.data.quantization import bytes_per_weight, is_quantized
from qwenvl_ft.errors import UserError
from qwenvl_ft.export.merge import export
from qwenvl_ft.folders.adapter import quantization_of
from qwenvl_ft.folders.runs import checkpoints
from qwenvl_ft.infer.engine import Engine
from qwenvl_ft.model.load import load_base
from qwenvl_ft.model.lora import fuse_lora
from qwenvl_ft.model.quantized import QuantizedLinear, settings_of
from tests.conftest import SAMPLE, TINY
from tests.runs import config, few_records, run, same
from tests.tiny import make_family

bits = pytest.importorskip("bitsandbytes")
KINDS = ["nf4", "int8"]
SHORT = {
    "max_steps": 2,
    "save_steps": 1,
    "rows_per_step": 1,
    "learning_rate": 1e-2,
    "warmup_ratio": 0.0,
    "max_pixels": 64 * 28 * 28,
}


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    return few_records(tmp_path_factory.mktemp("records"), 3)


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def model_dir(request, tmp_path_factory):
    return make_family(request.param, tmp_path_factory.mktemp("light") / request.param, light=True)


def theirs(folder, kind):
    """The base as transformers and bitsandbytes hold it, with the latter's own layers. It trains, which on a CPU keeps these to the
    dtype that they are given."""
    from transformers import AutoModelForImageTextToText

    said = settings_of(kind, family_of(folder))
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, quantization_config=said, device_map="cpu")
    return model.train()


def weight_of(layer):
    """What bitsandbytes says that its weight stands for."""
    if isinstance(layer, bits.nn.Linear8bitLt):
        return bits.functional.int8_vectorwise_dequant(
            layer.weight.data, layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB
        )
    return bits.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_to_the_same_bits_answers_as_pefts_and_merges_into_what_it_was_trained_on(kind, model_dir, few, tmp_path):
    settings = {**SHORT, "model": model_dir, "train_meta_file": few, "quantization": kind}
    ours = run(tmp_path, **settings)
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    assert same(ours, run(tmp_path, **settings, resume=True))
    assert quantization_of(tmp_path / "run") == kind == quantization_of(checkpoints(tmp_path / "run")[0])

    engine = Engine.open(model_dir, tmp_path / "run", quantization=kind)
    question = read_records(few, SAMPLE / "images")[0][1].turns[:1]
    model = PeftModel.from_pretrained(theirs(model_dir, kind), tmp_path / "run").train()
    with torch.inference_mode():
        inputs = engine.inputs([question])
        found, wanted = (of(**inputs).logits for of in (engine.model, model))
        assert found.allclose(wanted, atol=1e-4 * wanted.abs().max())
        told = (of.generate(**inputs, max_new_tokens=3, do_sample=False) for of in (engine.model, model))
        assert torch.equal(*told)

    (proof,) = export(tmp_path / "run", tmp_path / "merged", None, 1, lambda done, total: None)
    assert 20 * proof["difference"] < min(proof["unrounded"], 0.02 * proof["largest"])
    merged = load_base(tmp_path / "merged", "float32").state_dict()
    for name, layer in model.base_model.model.named_modules():
        if isinstance(layer, bits.nn.Linear4bit | bits.nn.Linear8bitLt):
            lora = model.base_model.model.get_submodule(name.removesuffix(".base_layer"))
            sum_of_both = weight_of(layer) + lora.get_delta_weight("default")
            assert merged[f"{name.removesuffix('.base_layer')}.weight"].allclose(sum_of_both, atol=1e-5), name
