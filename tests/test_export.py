"""The merge against base and adapter, and everything that it must refuse."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwenvl_ft.engine import Engine
from qwenvl_ft.errors import UserError
from qwenvl_ft.export import export, module_of, prove, prove_on_training_record
from qwenvl_ft.meta import Turn, read_meta
from tests.conftest import SAMPLE, TINY
from tests.runs import run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on all towers that has moved well away from its base."""
    folder = tmp_path_factory.mktemp("trained")
    run(folder, lora_on=["language", "vision", "merger"], learning_rate=2e-2, lora_alpha=12, max_pixels=16 * 28 * 28)
    return folder / "run"


@pytest.fixture(scope="module")
def merged(trained):
    export(trained, trained.parent / "merged", None, lambda done, total: None)
    return trained.parent / "merged"


@pytest.fixture(scope="module")
def question():
    return read_meta(SAMPLE / "train.json", SAMPLE / "images")[0][1].turns[:1]


def logits(model_dir, adapter, turns):
    engine = Engine.open(model_dir, adapter)
    with torch.inference_mode():
        return engine.model(**engine.inputs([turns])).logits


def test_the_merged_model_has_the_logits_of_base_and_adapter(trained, merged, question):
    adapted, base = logits(TINY, trained, question), logits(TINY, None, question)
    assert (logits(merged, None, question) - adapted).abs().max() < 1e-3 * adapted.abs().max()
    assert base.shape != adapted.shape or (base - adapted).abs().max() > 0.1 * adapted.abs().max()


def test_the_merge_equals_pefts(trained, merged):
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    base = AutoModelForImageTextToText.from_pretrained(TINY, dtype=torch.float32)
    wanted = PeftModel.from_pretrained(base, trained).merge_and_unload().state_dict()
    ours = AutoModelForImageTextToText.from_pretrained(merged, dtype=torch.float32).state_dict()
    assert wanted.keys() == ours.keys()
    assert all(torch.allclose(wanted[key], ours[key], atol=1e-5) for key in wanted)


def test_the_merged_folder_has_the_bases_keys_and_dtypes_and_ties(merged):
    base, ours = load_file(TINY / "model.safetensors"), load_file(merged / "model.safetensors")
    assert base.keys() == ours.keys() and "lm_head.weight" not in ours
    assert all(base[key].dtype == ours[key].dtype for key in base)


def test_the_resolution_of_training_goes_with_adapter_and_merged_model(trained, merged, question):
    """A model served at another resolution than it was trained at answers worse, and nothing says why."""
    grids = {Engine.open(*where).inputs([question])["image_grid_thw"].prod().item() for where in ((TINY, trained), (merged,))}
    (grid,) = grids
    assert grid <= 16 * 4 < Engine.open(TINY).inputs([question])["image_grid_thw"].prod().item()


def test_the_proof_refuses_a_merge_with_another_scale(trained, question, tmp_path):
    """alpha / rank forgotten or applied twice is the classical wrong merge."""
    other = tmp_path / "adapter"
    shutil.copytree(trained, other)
    settings = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**settings, "lora_alpha": settings["lora_alpha"] * 1.5}))
    export(other, tmp_path / "merged", None, lambda done, total: None)
    with pytest.raises(UserError, match="differs from base and adapter"):
        prove(tmp_path / "merged", TINY, trained, question)
    assert not (tmp_path / "merged").exists() and (tmp_path / "merged.differs").exists()


def test_the_proof_is_on_a_training_record(trained, merged):
    difference, largest, where = prove_on_training_record(merged, TINY, trained)
    assert difference < 1e-3 * largest and where == "few.json[0]"


def changed_adapter(trained, folder, change):
    shutil.copytree(trained, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            lambda t: t.update({key.replace("layers.0", "layers.9"): t.pop(key) for key in list(t) if "layers.0" in key}),
            "has no home",
        ),
        (lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(1)}), "not a LoRA tensor"),
        (lambda t: t.update({key: torch.ones(t[key].shape[0] + 1, t[key].shape[1]) for key in t if "lora_B" in key}), "has shape"),
    ],
)
def test_an_adapter_tensor_that_does_not_land_is_an_error_and_nothing_is_left(trained, tmp_path, change, complaint):
    adapter = changed_adapter(trained, tmp_path / "adapter", change)
    with pytest.raises(UserError, match=complaint):
        export(adapter, tmp_path / "out", None, lambda done, total: None)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("**/model.safetensors"))


def test_another_base_is_refused(trained, tmp_path):
    shutil.copytree(TINY, tmp_path / "other")
    weights = load_file(tmp_path / "other" / "model.safetensors")
    first = next(iter(weights))
    save_file({**weights, first: weights[first] + 1}, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="not the base that this adapter was trained on"):
        export(trained, tmp_path / "out", tmp_path / "other", lambda done, total: None)


def test_an_existing_folder_is_not_written_into(trained, tmp_path):
    with pytest.raises(UserError, match="exists already"):
        export(trained, tmp_path, None, lambda done, total: None)


def test_the_keys_of_transformers_4_checkpoints_are_understood():
    """Released Qwen2-VL and Qwen2.5-VL files have them; transformers maps them at load, the merge keeps them."""
    assert module_of("visual.blocks.0.attn.qkv.weight") == "model.visual.blocks.0.attn.qkv"
    assert module_of("model.layers.3.mlp.up_proj.weight") == "model.language_model.layers.3.mlp.up_proj"
    assert module_of("model.language_model.layers.3.mlp.up_proj.weight") == "model.language_model.layers.3.mlp.up_proj"
    assert module_of("lm_head.weight") == "lm_head"


def test_a_checkpoint_of_transformers_4_merges_under_its_own_keys(trained, merged, tmp_path, question):
    old = tmp_path / "old"
    shutil.copytree(TINY, old)
    weights = load_file(old / "model.safetensors")
    renamed = {key.replace("model.visual.", "visual.").replace("model.language_model.", "model."): weights[key] for key in weights}
    save_file(renamed, old / "model.safetensors", {"format": "pt"})
    adapter = tmp_path / "adapter"
    shutil.copytree(trained, adapter)
    (adapter / "base_model.json").unlink()
    export(adapter, tmp_path / "out", old, lambda done, total: None)
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == renamed.keys()
    assert torch.allclose(logits(tmp_path / "out", None, question), logits(merged, None, question), atol=1e-4)


def test_the_adapter_loads_in_plain_peft_and_answers_the_same(trained, question):
    from peft import PeftModel
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(TINY, dtype=torch.float32), trained)
    processor = AutoProcessor.from_pretrained(trained)
    picture, text = question[0].parts
    messages = [{"role": "user", "content": [{"type": "image", "image": Image.open(picture.path)}, {"type": "text", "text": text}]}]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    out = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    stock = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert Engine.open(TINY, trained).ask(question, max_new_tokens=20) == stock


def test_a_batch_answers_as_one_by_one_and_a_stream_as_a_whole(question):
    engine = Engine.open(TINY)
    talks = [question, (Turn("user", ("say one two",)),), (Turn("user", (*question[0].parts[:1], "read")),)]
    single = [engine.ask(turns, max_new_tokens=30) for turns in talks]
    assert engine.ask_many(talks, max_new_tokens=30) == single
    assert "".join(engine.stream(talks[2], max_new_tokens=30)) == single[2]
