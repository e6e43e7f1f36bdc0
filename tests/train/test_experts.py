"""LoRA on the fused experts of a mixture: trained, saved, read by PEFT alone, gone on with, merged into each layout of a base."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForImageTextToText

from qwenvl_ft.data.families import family_of
from qwenvl_ft.data.meta_file import read_records
from qwenvl_ft.data.targets import num_trained
from qwenvl_ft.errors import UserError
from qwenvl_ft.export.merge import export
from qwenvl_ft.folders.adapter import read_header
from qwenvl_ft.hub.doctor import examine
from qwenvl_ft.infer.engine import Engine
from tests.conftest import SAMPLE
from tests.runs import config, metrics, run, same
from tests.tiny import make_family
from tests.train.test_alike import another
from tests.train.test_tuning import loaded, merges_as_pefts

ON = {"language": {"rank": 4}, "experts": {"rank": 2, "alpha": 6, "learning_rate": 2e-2}}


@pytest.fixture(scope="module", params=["qwen3_vl_moe", "qwen3_5_moe"])
def mixture(request, tmp_path_factory):
    """The folder of a random model with experts: fused with their axes turned round, as released, or one by one."""
    return make_family(request.param, tmp_path_factory.mktemp("mixture") / request.param, light=True)


@pytest.fixture(scope="module")
def trained(mixture, tmp_path_factory):
    """A run of two steps with LoRA on language and experts."""
    folder = tmp_path_factory.mktemp("run")
    return folder, run(folder, model=mixture, **SETTINGS)


SETTINGS = {"lora_on": ON, "max_steps": 2, "save_steps": 1, "rows_per_step": 1, "learning_rate": 1e-2, "warmup_ratio": 0.0,
            "max_pixels": 16 * 32 * 32}  # fmt: skip


def test_experts_train_with_a_rank_and_a_rate_of_their_own_and_go_on_to_the_same_bits(mixture, trained):
    folder, tensors = trained
    names = [name for name in tensors if ".experts." in name]
    assert names and all(tensors[name].any() for name in tensors), "a B that stayed zero learnt nothing"
    counted, trained_here = num_trained(config(folder, model=mixture, **SETTINGS)), sum(of.numel() for of in tensors.values())
    assert counted == trained_here or ("3_5" in mixture.name and trained_here < counted < 1.3 * trained_here), "stored one by one"
    assert {tensors[name].shape[0] for name in names if "lora_A" in name} == {2 * 3}, "rank 2 for each of 3 experts"
    for line in metrics(folder / "run"):
        assert line["learning_rate_experts"] == pytest.approx(2 * line["learning_rate"])
    assert "LoRA on experts, rank 2, alpha 6, learning rate 0.02" in json.loads((folder / "run/plan.json").read_text())["trains"]
    shutil.rmtree(folder / "run" / "checkpoint-2")
    assert same(tensors, run(folder, model=mixture, **SETTINGS, resume=True))


def test_peft_alone_answers_the_same_and_the_merge_is_its_own_in_the_layout_of_the_base(mixture, trained, tmp_path):
    folder, _ = trained
    question = read_records(folder / "few.json", SAMPLE / "images")[0][1].turns[:1]
    engine = Engine.open(mixture, folder / "run")
    inputs, peft = engine.inputs([question]), loaded(folder / "run", mixture).eval()
    with torch.inference_mode():
        wanted = peft(**inputs).logits
        assert (engine.model(**inputs).logits - wanted).abs().max() < 1e-5 * wanted.abs().max()
        proof = merges_as_pefts(folder / "run", tmp_path / "merged", mixture)
        merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()(**inputs).logits
    assert (merged - wanted).abs().max() < 1e-5 * wanted.abs().max() and proof["difference"] < 1e-5 * proof["largest"]
    before, after = (
        {of.key: of.shape for of in read_header(path / "model.safetensors")[1]} for path in (mixture, tmp_path / "merged")
    )
    assert before == after


def test_experts_that_lie_fused_as_the_model_has_them_are_merged_as_well(mixture, trained, tmp_path):
    """Qwen3.5's are released so; transformers writes the same model with each expert by itself."""
    from safetensors.torch import load_file, save_file

    base = shutil.copytree(mixture, tmp_path / "base")
    model = AutoModelForImageTextToText.from_pretrained(mixture, dtype=torch.float32)
    weights = {name: tensor for name, tensor in load_file(mixture / "model.safetensors").items() if ".experts." not in name}
    fused = {name: tensor for name, tensor in model.state_dict().items() if ".experts." in name}
    save_file(weights | fused, base / "model.safetensors", {"format": "pt"})
    (base / "model.safetensors.index.json").unlink(missing_ok=True)
    adapter = shutil.copytree(trained[0] / "run", tmp_path / "adapter")
    (adapter / "base_model.json").unlink()
    merges_as_pefts(adapter, tmp_path / "merged", base)


def test_an_adapter_of_one_of_the_two_parameters_is_the_one_that_it_names(mixture, tmp_path):
    """PEFT calls it `experts` in both cases, which with two is the other one."""
    from peft import LoraConfig, get_peft_model

    name = {"qwen3_vl_moe": "gate_up_proj", "qwen3_5_moe": "down_proj"}[mixture.name]
    model = AutoModelForImageTextToText.from_pretrained(mixture, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=[], target_parameters=[f"mlp.experts.{name}"]))
    for key, parameter in adapted.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(tmp_path / name)
    report = examine(tmp_path / name)
    assert not report.problems and report.facts["on"] == "experts"
    assert "does not take target_parameters; merge first" in report.facts["vLLM"]
    merges_as_pefts(tmp_path / name, tmp_path / "merged", mixture)


def test_a_mixture_is_taken_for_no_other_family(mixture, tmp_path):
    another(mixture, tmp_path)
    assert family_of(tmp_path).like == mixture.name


def test_an_adapter_on_something_else_than_experts_is_no_plain_one(mixture, trained, tmp_path):
    adapter = shutil.copytree(trained[0] / "run", tmp_path / "adapter")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "MANIFEST.json").unlink()
    settings["target_parameters"].append("mlp.gate.weight")
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"no plain LoRA adapter \(mlp.gate.weight\)"):
        export(adapter, tmp_path / "merged", mixture, 0, lambda done, total: None)
