"""A base in 4 or 8 bits beside LoRA, against bitsandbytes, transformers and PEFT themselves; test_quantization.py runs them."""

import json
import shutil
from types import SimpleNamespace

import bitsandbytes as bits
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import nn

from qwenvl_ft.cli.main import main
from qwenvl_ft.data import quantization
from qwenvl_ft.data.families import family_of
from qwenvl_ft.data.meta_file import read_records
from qwenvl_ft.data.prepare import make_ready, prepare
from qwenvl_ft.data.quantization import bytes_per_weight, is_quantized
from qwenvl_ft.data.rows import Rows
from qwenvl_ft.errors import UserError
from qwenvl_ft.export.merge import Deltas, export
from qwenvl_ft.folders.adapter import quantization_of
from qwenvl_ft.folders.runs import checkpoints
from qwenvl_ft.hub.doctor import examine
from qwenvl_ft.infer.engine import Engine
from qwenvl_ft.model.load import limited, load_base, refit, trainable
from qwenvl_ft.model.lora import fuse_lora
from qwenvl_ft.model.loss import summed_loss
from qwenvl_ft.model.quantized import QuantizedLinear, settings_of, written_bytes
from qwenvl_ft.train import launch
from qwenvl_ft.train.activations import recompute
from tests.conftest import SAMPLE, TINY
from tests.forked import train_two
from tests.runs import adapter, config, difference, few_records, run, same
from tests.tiny import make_family
from tests.train.test_activations import Alive
from tests.train.test_tuning import KINDS as KINDS_OF_LORA
from tests.train.test_tuning import SETTINGS, by_peft, plain_steps

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


def test_attention_and_mlp_of_the_language_model_are_quantized_and_take_what_is_said(tmp_path):
    plain = load_base(TINY, "float32").state_dict()
    for kind in KINDS:
        model, held = load_base(TINY, "float32", quantization=kind), theirs(TINY, kind)
        quantized = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
        assert quantized.keys() == {name for name in plain_linears(plain) if is_quantized(family_of(TINY), name)}
        assert not [name for name in quantized if "visual" in name or "head" in name] and len(quantized) == 4 * 7
        for name, layer in quantized.items():
            wanted = weight_of(held.get_submodule(name))
            assert layer.dequantized(torch.float32).allclose(wanted, atol=1e-7)
            assert layer.dequantized(torch.bfloat16).allclose(wanted.bfloat16(), atol=1e-7, rtol=2**-7)
            size = plain[f"{name}.weight"].numel()
            assert bytes_per_weight(kind) * size == pytest.approx(stored_bytes(layer.weight), rel=0.03)
        kept = {key: tensor for key, tensor in model.state_dict().items() if key.removesuffix(".weight") not in quantized}
        assert (
            all(plain[key].equal(tensor) for key, tensor in kept.items() if key in plain) and len(kept.keys() & plain.keys()) > 40
        )
    assert bytes_per_weight("none") == 2 and bytes_per_weight("none", 4) == 4


def plain_linears(state):
    return [key.removesuffix(".weight") for key, tensor in state.items() if key.endswith(".weight") and tensor.ndim == 2]


def stored_bytes(weight):
    """What bitsandbytes keeps of a weight, but for the tables that all have alike."""
    if weight.dtype == torch.int8:
        return weight.nbytes
    state = weight.quant_state
    return weight.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes


@pytest.fixture(scope="module")
def row(few, tmp_path_factory):
    """One of those that a run would have, of several records in a tree."""
    from transformers import AutoProcessor

    prepared = prepare(config(tmp_path_factory.mktemp("row"), train_meta_file=few))
    processor = limited(AutoProcessor.from_pretrained(TINY), prepared.chat)
    return Rows(prepared.scripts, prepared.plan.rows, prepared.chat, processor)[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("more", [{}, {"lora_dropout": 0.3, "target_modules": ["q_proj", "up_proj"]}, {"use_dora": True}], ids=str)
def test_losses_and_gradients_are_those_of_pefts_own_layers_on_bitsandbytes_own(kind, more, row):
    """With dropout, recomputed, and through layers without LoRA; and what is left to PEFT."""
    found = []
    for ours in (False, True):
        base = load_base(TINY, "float32", "varlen", quantization=kind) if ours else refit(theirs(TINY, kind), "varlen")
        torch.manual_seed(0)
        settings = {"target_modules": family_of(TINY).language, "r": 4, "lora_alpha": 8, "init_lora_weights": False, **more}
        model = get_peft_model(base, LoraConfig(**settings)).train()
        if ours:
            fuse_lora(model)
            recompute(model)
        else:
            assert {type(of).__module__ for of in model.modules() if isinstance(of, LoraLayer)} == {"peft.tuners.lora.bnb"}
        torch.manual_seed(1)
        loss = summed_loss(model, model, row, False)
        loss.backward()
        found.append((loss.item(), torch.cat([of.grad.flatten() for of in trainable(model).values()])))
    (wanted, theirs_grad), (loss, grad) = found
    assert loss == pytest.approx(wanted, rel=1e-5) and (grad - theirs_grad).norm() < 1e-4 * theirs_grad.norm()


def fused(kind):
    torch.manual_seed(0)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=family_of(TINY).language)
    model = get_peft_model(load_base(TINY, "float32", "varlen", quantization=kind), lora).train()
    fuse_lora(model)
    return model


def test_no_weight_that_is_written_out_stays_for_the_backward_pass(row):
    def bytes_that_stay(kind):
        model = fused(kind)
        with Alive([*model.parameters(), *model.buffers(), *(of for of in row.values() if isinstance(of, torch.Tensor))]) as alive:
            held = summed_loss(model, model, row, False)
        return alive.now() * bool(held.requires_grad)

    assert bytes_that_stay("nf4") == bytes_that_stay("int8") == bytes_that_stay("none") > 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_largest_weight_takes_what_is_counted_for_it_while_it_is_written_out(kind):
    model = load_base(TINY, "float32", quantization=kind)
    layer = model.get_submodule("model.language_model.layers.0.mlp.up_proj")
    with Alive([], peak=True) as alive:
        layer.dequantized(torch.float32)
    assert written_bytes(model, torch.float32) <= alive.peak < 1.3 * written_bytes(model, torch.float32)
    assert written_bytes(nn.Linear(2, 2), torch.float32) == 0


def test_recomputed_or_kept_and_with_features_that_are_kept_the_bits_are_the_same(few, tmp_path):
    settings = {**SHORT, "train_meta_file": few, "quantization": "nf4", "max_steps": None, "num_train_epochs": 2}
    found = run(tmp_path, **settings, gradient_checkpointing="auto")
    assert same(found, run(tmp_path, "other", **settings, gradient_checkpointing=True, cache_features="off"))


@pytest.mark.parametrize("kind", ["dora", "rslora_and_plus", "full"])
def test_each_kind_of_lora_trains_beside_it_as_pefts_and_merges(kind, few, tmp_path):
    settings = {**SETTINGS, "train_meta_file": few, "quantization": "nf4", **KINDS_OF_LORA[kind]}
    ours = run(tmp_path, **settings)
    model, optimizer = by_peft(refit(theirs(TINY, "nf4"), "varlen"), **KINDS_OF_LORA[kind])
    plain_steps(tmp_path, model, optimizer, **settings)
    assert difference(get_peft_model_state_dict(model), ours) < 2e-3
    (proof,) = export(tmp_path / "run", tmp_path / "merged", None, 1, lambda done, total: None)
    assert proof["difference"] <= 1e-3 * proof["largest"] < proof["unrounded"]


def test_layers_without_lora_are_merged_into_what_they_stood_for_too(few, tmp_path, monkeypatch):
    settings = {**SHORT, "max_steps": 1, "train_meta_file": few, "quantization": "nf4", "lora_targets": ["q_proj"]}
    run(tmp_path, **settings)
    export(tmp_path / "run", tmp_path / "merged", None, 1, lambda done, total: None)
    merged, held = load_base(tmp_path / "merged", "float32"), theirs(TINY, "nf4")
    name = "model.language_model.layers.1.mlp.down_proj"
    assert merged.get_submodule(name).weight.allclose(weight_of(held.get_submodule(name)), atol=1e-6)
    monkeypatch.setattr(Deltas, "rounded", lambda self, tensor: None)
    with pytest.raises(UserError, match="28 of 28 weights are not PEFT's sum of base and adapter"):
        export(tmp_path / "run", tmp_path / "wrong", None, 1, lambda done, total: None)


def test_what_trained_in_bfloat16_is_merged_into_weights_that_were_quantized_from_it(few, tmp_path):
    """Those of a base in float32 differed from what the export quantized on a CPU, and its proof held them against themselves."""
    settings = {**SHORT, "max_steps": 1, "train_meta_file": few, "quantization": "nf4", "lora_targets": ["q_proj"]}
    run(tmp_path, **settings, dtype="bfloat16")
    export(tmp_path / "run", tmp_path / "merged", None, 1, lambda done, total: None)
    name = "model.language_model.layers.1.mlp.down_proj"
    merged = load_base(tmp_path / "merged", "float32").get_submodule(name).weight
    held = [
        load_base(TINY, of, quantization="nf4").get_submodule(name).dequantized(torch.float32) for of in ("bfloat16", "float32")
    ]
    assert merged.allclose(held[0], atol=1e-6) and not merged.allclose(held[1], atol=1e-3)


def test_what_the_adapter_was_trained_on_is_said_where_it_answers_and_merged_only_by_bitsandbytes(
    few, tmp_path, capsys, monkeypatch
):
    def said(*arguments):
        with pytest.raises(SystemExit):
            main([*arguments, "--adapter", str(tmp_path / "run")])
        output = capsys.readouterr()
        return " ".join(output.out.split()), " ".join(output.err.split())

    settings = {**SHORT, "max_steps": 1, "train_meta_file": few}
    run(tmp_path, **settings, quantization="int8")
    assert "the language model's attention and MLP are held in int8" in " ".join(capsys.readouterr().out.split())
    assert (
        "was trained on its base in int8 and answers here on the base as it is"
        in said("ask", str(TINY), "hi", "--max-new-tokens", "1")[1]
    )
    assert examine(tmp_path / "run").facts["trained"].startswith("on its base in int8")
    assert "), those of the adapter on the base as it is by" in said("export", "--out", str(tmp_path / "merged"))[0]
    assert "held in int8 while it trained" in (tmp_path / "merged" / "README.md").read_text()
    with pytest.raises(UserError, match="quantization was int8 and is now none"):
        run(tmp_path, **settings, resume=True)
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    assert (
        "run, which trained beside layers in int8: bitsandbytes is not installed"
        in said("export", "--out", str(tmp_path / "other"))[1]
    )


def test_what_does_not_go_with_it_is_said_before_torch(tmp_path, monkeypatch):
    def said(**settings):
        with pytest.raises(UserError) as raised:
            make_ready(config(tmp_path, quantization="nf4", **settings))
        return [f"{problem.what}; {problem.fix}" for problem in raised.value.problems]

    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    assert said() == ["bitsandbytes is not installed; pip install bitsandbytes"]
    monkeypatch.undo()
    folder = shutil.copytree(TINY, tmp_path / "model")
    known = json.loads((TINY / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**known, "quantization_config": {"bits": 4}}))
    (found,) = said(model=folder)
    assert "is quantized already" in found
    for family in ("qwen3_vl_moe", "qwen3_5_moe"):  # which call the number of their experts by two names
        (found,) = said(model=make_family(family, tmp_path / family, light=True))
        assert "the experts of a mixture" in found
    with pytest.raises(ValueError, match="choose one of quantization and PiSSA"):
        config(tmp_path, quantization="nf4", init_lora_weights="pissa")


def test_zero_3_is_refused(tmp_path, monkeypatch):
    accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=3, deepspeed_config={})))
    monkeypatch.setattr(launch, "Accelerator", lambda **named: accelerator)
    monkeypatch.setattr(launch, "launch_problem", lambda *of: None)
    with pytest.raises(UserError, match=r"quantization: nf4: ZeRO-3 shares out weights"):
        launch.start(config(tmp_path, quantization="nf4"))
    assert launch.start(config(tmp_path)) is accelerator


def test_two_processes_beside_a_quantized_base_end_where_one_does(tmp_path, forks):
    """Each holds all of it. ZeRO-2 takes nothing of it apart, either."""
    settings = {"quantization": "nf4", "max_steps": 2, "save_steps": 2, "max_grad_norm": 1e9}
    run(tmp_path, **settings)
    for stage in (0, 2):
        (tmp_path / str(stage)).mkdir()
        train_two(forks, tmp_path / str(stage), stage, **settings)
        assert difference(adapter(tmp_path / "run"), adapter(tmp_path / str(stage) / "run")) < 1e-3
