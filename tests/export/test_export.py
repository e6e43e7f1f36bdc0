"""The merge against base and adapter, and everything that it must refuse."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from qwenvl_ft.cli.main import main
from qwenvl_ft.data.geometry import read_limits
from qwenvl_ft.data.meta_file import read_records
from qwenvl_ft.data.records import Turn
from qwenvl_ft.errors import UserError
from qwenvl_ft.evaluate.card import card_of
from qwenvl_ft.export import merge
from qwenvl_ft.export.merge import Deltas, export, store
from qwenvl_ft.export.merge import _copy_settings as export_settings
from qwenvl_ft.folders.adapter import as_float32, module_of
from qwenvl_ft.folders.whole import damage
from qwenvl_ft.hub.doctor import examine
from qwenvl_ft.infer.engine import Engine
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
    export(trained, trained.parent / "merged", None, 0, lambda done, total: None)
    return trained.parent / "merged"


@pytest.fixture(scope="module")
def question():
    return read_records(SAMPLE / "train.json", SAMPLE / "images")[0][1].turns[:1]


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


def test_a_merged_folder_says_how_its_run_was_taught_to_be_asked(trained, merged, tmp_path):
    assert not (merged / "reading.json").exists()
    run = shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*"))
    settings = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(settings.replace("media_position: as_written", "media_position: last"))
    export(run, tmp_path / "out", None, 0, lambda done, total: None)
    assert json.loads((tmp_path / "out" / "reading.json").read_text()) == {"media_position": "last"}


def test_the_resolution_of_training_goes_with_adapter_and_merged_model(trained, merged, question):
    """A model served at another resolution than it was trained at answers worse, and nothing says why."""
    grids = {Engine.open(*where).inputs([question])["image_grid_thw"].prod().item() for where in ((TINY, trained), (merged,))}
    (grid,) = grids
    assert grid <= 16 * 4 < Engine.open(TINY).inputs([question])["image_grid_thw"].prod().item()


def converted(folder, dtype, base=TINY):
    """The base in another dtype; its config does not say which, as some released ones do not."""
    shutil.copytree(base, folder)
    weights = {key: tensor.to(dtype) for key, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({key: config[key] for key in config if key not in ("dtype", "torch_dtype")}))
    return folder


@pytest.mark.parametrize("factor", [0, 0.9, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_proof_refuses_a_merge_with_another_scale(trained, tmp_path, monkeypatch, factor, dtype):
    """alpha / rank forgotten or applied twice is the classical wrong merge; of a small adapter the logits hardly show it."""
    base = converted(tmp_path / "base", dtype)
    adapter = changed_adapter(
        trained, tmp_path / "adapter", lambda t: t.update({key: t[key] * 0.3 for key in t if "lora_B" in key})
    )
    (adapter / "base_model.json").unlink()
    export(adapter, tmp_path / "right", base, 1, lambda done, total: None)
    monkeypatch.setattr(Deltas, "of", lambda self, key, shape, of=Deltas.of: (p := of(self, key, shape)) and (p[0] * factor, p[1]))
    with pytest.raises(UserError, match="weights are not PEFT's sum"):
        export(adapter, tmp_path / "merged", base, 1, lambda done, total: None)
    assert not (tmp_path / "merged").exists() and not list(tmp_path.glob("**/.incoming"))


def test_the_proof_refuses_a_folder_that_reads_pictures_otherwise(trained, tmp_path, monkeypatch):
    """Right weights beside a wrong processor: only the logits show it."""
    monkeypatch.setattr(merge, "_copy_settings", lambda folder, run, base: export_settings(folder, base, base))
    with pytest.raises(UserError, match="tokens where base and adapter read"):
        export(trained, tmp_path / "merged", None, 1, lambda done, total: None)


def test_a_base_that_the_adapter_was_merged_into_already_is_another_base(trained, merged, tmp_path):
    with pytest.raises(UserError, match=r"is not the base that .* was trained on"):
        export(trained, tmp_path / "twice", merged, 0, lambda done, total: None)


def test_a_checkpoint_is_exported_with_what_its_run_has(trained, tmp_path):
    (found,) = trained.glob("checkpoint-*")
    proofs = export(found, tmp_path / "out", None, 1, lambda done, total: None)
    assert proofs[0]["where"] == "few.json[0]" and "lora_rank: " in (tmp_path / "out" / "README.md").read_text()
    assert read_limits(tmp_path / "out") == read_limits(trained) != read_limits(TINY)
    with pytest.raises(UserError, match=r"is not the base that"):
        export(found, tmp_path / "twice", tmp_path / "out", 0, lambda done, total: None)


def test_without_the_records_the_proof_is_on_a_picture(trained, tmp_path):
    adapter = changed_adapter(trained, tmp_path / "adapter", lambda t: None)
    (adapter / "config.yaml").unlink()
    (proof,) = export(adapter, tmp_path / "out", None, 3, lambda done, total: None)
    assert proof["where"].startswith("a made-up picture")


def test_a_base_in_transformers_4s_files_stays_in_them_with_trainings_resolution(trained, tmp_path, question):
    """Engines of that time read the merged folder as they read the base: transformers 5 writes a tokenizer they cannot."""
    base = tmp_path / "base"
    shutil.copytree(TINY, base)
    settings = json.loads((base / "processor_config.json").read_text())["image_processor"]
    size = settings.pop("size")
    settings |= {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
    (base / "preprocessor_config.json").write_text(json.dumps(settings))
    (base / "processor_config.json").unlink()
    export(trained, tmp_path / "out", base, 1, lambda done, total: None)
    names = {path.name for path in base.iterdir()} - {"training.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names | {
        "README.md",
        "MANIFEST.json",
        "video_preprocessor_config.json",
    }
    assert read_limits(tmp_path / "out") == read_limits(trained)
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == (base / "tokenizer_config.json").read_text()


def test_an_adapter_of_transformers_4_merges_and_answers(trained, merged, tmp_path, question):
    def rename(tensors):
        for key in list(tensors):
            tensors[key.replace("model.model.visual.", "model.visual.").replace("model.language_model.", "model.")] = tensors.pop(
                key
            )

    adapter = changed_adapter(trained, tmp_path / "adapter", rename)
    assert any(key.startswith("base_model.model.visual.") for key in load_file(adapter / "adapter_model.safetensors"))
    export(adapter, tmp_path / "out", None, 1, lambda done, total: None)
    ours, wanted = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", merged))
    assert all(torch.equal(ours[key], wanted[key]) for key in wanted)
    assert torch.equal(logits(TINY, adapter, question), logits(TINY, trained, question))


def test_the_proof_is_on_training_records(trained, merged, tmp_path):
    proofs = export(trained, tmp_path / "out", None, 2, lambda done, total: None)
    assert [proof["where"] for proof in proofs] == ["few.json[0]", "few.json[1]"]
    assert all(proof["difference"] < 1e-3 * proof["largest"] for proof in proofs)
    card = (tmp_path / "out" / "README.md").read_text()
    assert (
        "lora_rank: " in card
        and "records with" in card
        and "a taught token over the run" in card
        and "sha256" in card
        and "differ from base and adapter" in card
    )
    assert damage(tmp_path / "out") is None
    assert "Not compared" in (merged / "README.md").read_text()


def test_an_evaluation_goes_into_the_card_of_its_adapter_and_of_what_is_merged(trained, tmp_path, capsys):
    adapter, meta = tmp_path / "adapter", tmp_path / "held.json"
    shutil.copytree(trained, adapter)
    before = (adapter / "README.md").read_text()
    assert "## Training" in before and "## Scores" not in before
    meta.write_text(json.dumps([{"conversations": [{"from": "user", "value": "hi"}, {"from": "assistant", "value": "yes"}]}]))
    arguments = ["eval", str(TINY), str(meta), "--adapter", str(adapter), "--max-new-tokens", "2"]
    for say in ("changed by hand", ""):
        if say:
            (adapter / "README.md").write_text("mine\n")
        else:
            (adapter / "README.md").unlink()
        with pytest.raises(SystemExit) as done:
            main(arguments)
        assert not done.value.code and ("changed by hand" in capsys.readouterr().err) == bool(say)
    export(adapter, tmp_path / "out", None, 0, lambda done, total: None)
    for folder in (adapter, tmp_path / "out"):
        assert "## Scores on held.json" in (card := (folder / "README.md").read_text()) and "| hi | yes |" in card


def test_a_merge_in_small_blocks_is_the_same(trained, merged, tmp_path, monkeypatch):
    """Tensors larger than a block are merged some rows at a time."""
    monkeypatch.setattr(merge, "BLOCK_BYTES", 3000)
    seen = []
    export(trained, tmp_path / "out", None, 0, lambda done, total: seen.append((done, total)))
    ours, whole = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", merged))
    assert ours.keys() == whole.keys() and all(torch.allclose(ours[key], whole[key], atol=1e-6) for key in ours)
    assert seen == sorted(seen) and seen[-1][0] <= seen[-1][1] < seen[-1][0] + 100_000


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_numbers_are_widened_and_rounded_as_torch_does(dtype):
    """Every number of 16 bits, the halves between two neighbours, what overflows, and many at random."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    every = torch.cat([every, every.view(torch.int32).add(0x8000).view(torch.float32), torch.randn(10_000) * 1e-3])
    every = every[~every.isnan()]
    wanted = every.to(dtype)
    stored = np.zeros(len(every), np.uint16 if dtype == torch.bfloat16 else wanted.numpy().dtype)
    with np.errstate(over="ignore"):
        store(stored, every.numpy().copy())
    ours = torch.from_numpy(stored).view(dtype)
    assert torch.equal(ours, wanted)
    assert torch.equal(torch.from_numpy(as_float32(stored)), wanted.float())


def test_a_bfloat16_base_takes_a_bfloat16_adapter(trained, tmp_path):
    """The usual case: the sum is made in float32 and rounded once."""
    base = converted(tmp_path / "base", torch.bfloat16)
    halves = load_file(base / "model.safetensors")
    adapter = changed_adapter(trained, tmp_path / "adapter", lambda t: t.update({key: t[key].bfloat16() for key in t}))
    (adapter / "base_model.json").unlink()
    export(adapter, tmp_path / "out", base, 0, lambda done, total: None)
    ours = load_file(tmp_path / "out" / "model.safetensors")
    learnt = load_file(adapter / "adapter_model.safetensors")
    (key,) = (key for key in halves if module_of(key) == "model.language_model.layers.1.mlp.down_proj")
    left, right = (learnt[f"base_model.model.{module_of(key)}.lora_{side}.weight"].float() for side in "BA")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    wanted = (halves[key].float() + settings["lora_alpha"] / settings["r"] * left @ right).bfloat16()
    # Sums are made in another order here, so a few numbers round to the neighbour.
    assert (
        ours[key].dtype == torch.bfloat16 and (ours[key] != wanted).float().mean() < 1e-2 < (wanted != halves[key]).float().mean()
    )
    assert torch.allclose(ours[key].float(), wanted.float(), rtol=2**-7)


def test_shards_and_their_index_are_kept(trained, merged, tmp_path, question):
    from transformers import AutoModelForImageTextToText

    sharded = tmp_path / "sharded"
    AutoModelForImageTextToText.from_pretrained(TINY).save_pretrained(sharded, max_shard_size="2MB")
    for path in [*TINY.glob("*.json"), TINY / "chat_template.jinja"]:
        if not (sharded / path.name).exists():
            shutil.copy(path, sharded)
    adapter = changed_adapter(trained, tmp_path / "adapter", lambda tensors: None)
    (adapter / "base_model.json").unlink()
    export(adapter, tmp_path / "out", sharded, 0, lambda done, total: None)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()
    assert torch.allclose(logits(tmp_path / "out", None, question), logits(merged, None, question), atol=1e-4)


def changed_adapter(trained, folder, change):
    """A copy that was changed on purpose, so it goes without the manifest."""
    shutil.copytree(trained, folder)
    (folder / "MANIFEST.json").unlink()
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            lambda t: t.update({key.replace("layers.0", "layers.9"): t.pop(key) for key in list(t) if "layers.0" in key}),
            "has no module in the base",
        ),
        (lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(1)}), "not a LoRA tensor"),
        (lambda t: t.update({key: t[key] / 0 for key in t}), "NaN or infinity"),
        (
            lambda t: t.update(
                {f"base_model.model.model.visual.patch_embed.proj.lora_{side}.weight": torch.ones(4, 4) for side in "AB"}
            ),
            "LoRA on a convolution",
        ),
        (lambda t: t.update({key: torch.ones(t[key].shape[0] + 1, t[key].shape[1]) for key in t if "lora_B" in key}), "has shape"),
    ],
)
def test_an_adapter_tensor_that_does_not_land_is_an_error_and_nothing_is_left(trained, tmp_path, change, complaint):
    adapter = changed_adapter(trained, tmp_path / "adapter", change)
    with pytest.raises(UserError, match=complaint):
        export(adapter, tmp_path / "out", None, 0, lambda done, total: None)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("**/model.safetensors"))


def test_another_base_is_refused(trained, tmp_path):
    shutil.copytree(TINY, tmp_path / "other")
    weights = load_file(tmp_path / "other" / "model.safetensors")
    one = sorted(weights)[len(weights) // 2]
    save_file({**weights, one: weights[one] + 1}, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"is not the base that .* was trained on"):
        export(trained, tmp_path / "out", tmp_path / "other", 0, lambda done, total: None)


def test_an_existing_folder_is_not_written_into(trained, tmp_path):
    with pytest.raises(UserError, match="exists already"):
        export(trained, tmp_path, None, 0, lambda done, total: None)


SETTINGS = "adapter_config.json"


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        (SETTINGS, {"base_model_name_or_path": None}, "is not a model's folder"),
        (SETTINGS, {"r": None}, "names no LoRA with r and lora_alpha"),
        (SETTINGS, {"r": True}, "names no LoRA with r and lora_alpha"),
        (SETTINGS, {"r": 0}, "r is 0, no rank"),
        (SETTINGS, {"r": -4}, "r is -4, no rank"),
        (SETTINGS, {"r": 4.0}, "r is 4.0, no rank"),
        (SETTINGS, {"r": 2}, "its tensors have rank 4, adapter_config.json says 2"),
        (SETTINGS, {"lora_alpha": -64}, "lora_alpha is -64, no scale"),
        (SETTINGS, {"lora_alpha": 0}, "lora_alpha is 0, no scale"),
        (SETTINGS, {"lora_alpha": 10**400}, "no scale"),
        (SETTINGS, {"lora_alpha": float("nan")}, "lora_alpha is nan, no scale"),
        (SETTINGS, {"lora_alpha": float("inf")}, "lora_alpha is inf, no scale"),
        (SETTINGS, {"base_model_name_or_path": 5}, "base_model_name_or_path is 5, no name"),
        (SETTINGS, {"init_lora_weights": "pissa"}, "is no plain LoRA adapter .init_lora_weights."),
        (SETTINGS, {"lora_bias": True, "bias": "all"}, "is no plain LoRA adapter .lora_bias, bias."),
        ("base_model.json", "{", "is not JSON|not valid JSON|base_model.json"),
    ],
)
def test_an_adapter_that_is_damaged_or_more_than_lora_is_named(trained, tmp_path, name, content, complaint):
    adapter = changed_adapter(trained, tmp_path / "adapter", lambda tensors: None)
    if isinstance(content, dict):
        content = json.dumps(json.loads((adapter / name).read_text()) | content)
    (adapter / name).write_text(content)
    with pytest.raises(UserError, match=complaint):
        export(adapter, tmp_path / "out", None, 0, lambda done, total: None)


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def flip(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def scale(path):
    save_file({key: tensor * 3 for key, tensor in load_file(path).items()}, path, {"format": "pt"})


def another_mean(path):
    content = json.loads(path.read_text())
    content["image_processor"]["image_mean"] = [0, 0, 0]
    path.write_text(json.dumps(content))


CHANGES = {
    "a flipped bit": ("adapter_model.safetensors", flip),
    "scaled weights": ("adapter_model.safetensors", scale),
    "another alpha": ("adapter_config.json", lambda path: edit(path, lora_alpha=64)),
    "a negative alpha": ("adapter_config.json", lambda path: edit(path, lora_alpha=-64)),
    "another mean": ("processor_config.json", another_mean),
    "no processor": ("processor_config.json", lambda path: path.unlink()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_adapter_that_is_not_as_it_was_written_is_refused_by_whoever_opens_it(trained, tmp_path, change):
    """Each of them was exported with exit 0: the final adapter had no manifest, and nobody looked into a checkpoint's."""
    name, spoil = CHANGES[change]
    (checkpoint,) = trained.glob("checkpoint-*")
    for number, source in enumerate((trained, checkpoint)):
        adapter = tmp_path / str(number)
        shutil.copytree(source, adapter)
        if not (adapter / name).is_file():
            continue
        spoil(adapter / name)
        reason = f"{name} is (damaged|missing)"
        with pytest.raises(UserError, match=reason):
            export(adapter, tmp_path / "out", TINY, 0, lambda done, total: None)
        with pytest.raises(UserError, match=reason):
            Engine.open(TINY, adapter)
        assert any(problem.what.startswith(name) for problem in examine(adapter).problems)
        assert not (tmp_path / "out").exists()


def test_an_adapter_that_was_copied_is_as_it_was_written(trained, tmp_path):
    """Its own files make it, not those of the run beside it; a checkpoint's adapter does without what only resume reads."""
    manifest = json.loads((trained / "MANIFEST.json").read_text())
    assert {"adapter_model.safetensors", "adapter_config.json", "processor_config.json", "tokenizer.json"} <= manifest.keys()
    (tmp_path / "final").mkdir()
    for name in (*manifest, "MANIFEST.json"):
        shutil.copy(trained / name, tmp_path / "final")
    export(tmp_path / "final", tmp_path / "one", None, 0, lambda done, total: None)
    (checkpoint,) = trained.glob("checkpoint-*")
    shutil.copytree(checkpoint, tmp_path / "light")
    (tmp_path / "light" / "optimizer.safetensors").unlink()
    export(tmp_path / "light", tmp_path / "two", TINY, 0, lambda done, total: None)
    flip(tmp_path / "final" / "adapter_model.safetensors")
    (tmp_path / "final" / "MANIFEST.json").unlink()  # as the message says, where it was changed on purpose
    export(tmp_path / "final", tmp_path / "three", None, 0, lambda done, total: None)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("model.safetensors", "version https://git-lfs.github.com/spec/v1\noid", "git-lfs"),
        ("tokenizer.json", "{}", "is not a tokenizer"),
    ],
)
def test_a_base_that_is_damaged_is_named_before_the_merge(trained, tmp_path, name, content, complaint):
    shutil.copytree(TINY, tmp_path / "base")
    (tmp_path / "base" / name).write_text(content)
    with pytest.raises(UserError, match=complaint):
        export(trained, tmp_path / "out", tmp_path / "base", 0, lambda done, total: None)


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
    export(adapter, tmp_path / "out", old, 0, lambda done, total: None)
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == renamed.keys()
    assert torch.allclose(logits(tmp_path / "out", None, question), logits(merged, None, question), atol=1e-4)


def test_the_adapter_loads_in_plain_peft_and_answers_the_same(trained, question):
    from peft import PeftModel
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(TINY, dtype=torch.float32), trained)
    processor = AutoProcessor.from_pretrained(trained)
    picture, text = question[0].parts
    messages = [
        {
            "role": "user",
            "content": [{"type": "image", "image": Image.open(picture.source).copy()}, {"type": "text", "text": text}],
        }
    ]
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


def test_a_question_and_paths_may_be_plain_text(trained):
    assert Engine.open(str(TINY), str(trained)).ask("say one", 5) == Engine.open(TINY, trained).ask([Turn("user", ("say one",))], 5)


def test_folders_that_were_taken_for_each_other_are_named(trained, merged, tmp_path):
    with pytest.raises(UserError, match=r"is an adapter, not a model\n  fix: give its base"):
        Engine.open(trained)
    with pytest.raises(UserError, match=r"is a whole model, not an adapter\n  fix: give it as the model"):
        Engine.open(TINY, merged)
    shutil.copytree(next(trained.glob("checkpoint-*")), tmp_path / "run" / "checkpoint-7")
    with pytest.raises(UserError, match=r"give its newest checkpoint, .*checkpoint-7"):
        Engine.open(TINY, tmp_path / "run")
    with pytest.raises(UserError, match=r"is not the base that .* was trained on"):
        Engine.open(merged, trained)


def test_a_quantized_base_is_refused(trained, tmp_path):
    """Merging into 4-bit weights rounds what was learnt away."""
    shutil.copytree(TINY, tmp_path / "base")
    config = json.loads((TINY / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "quantization_config": {"load_in_4bit": True}}))
    with pytest.raises(UserError, match="is quantized"):
        export(trained, tmp_path / "out", tmp_path / "base", 0, lambda done, total: None)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "git-lfs"), (b"", "not a whole"),
     (b"\x10\0\0\0\0\0\0\0{'what': 'is it'}", "not a whole")],
)  # fmt: skip
def test_a_shard_that_is_not_whole_is_named(trained, tmp_path, content, complaint):
    shutil.copytree(TINY, tmp_path / "base")
    (tmp_path / "base" / "model-2.safetensors").write_bytes(content)
    adapter = changed_adapter(trained, tmp_path / "adapter", lambda tensors: None)
    (adapter / "base_model.json").unlink()
    with pytest.raises(UserError, match=complaint):
        export(adapter, tmp_path / "out", tmp_path / "base", 0, lambda done, total: None)
    assert not (tmp_path / "out").exists()


def test_one_side_of_tied_embeddings_is_refused(trained, tmp_path):
    def add(tensors):
        for side, shape in (("A", (2, 128)), ("B", (1472, 2))):
            tensors[f"base_model.model.lm_head.lora_{side}.weight"] = torch.ones(shape)

    adapter = changed_adapter(trained, tmp_path / "adapter", add)
    for place in ({"tie_word_embeddings": True}, {"text_config": {"tie_word_embeddings": True}}):
        with pytest.raises(UserError, match="one side of embeddings"):
            Deltas(adapter, place)


def test_settings_that_are_not_yaml_any_more_are_named_in_place_of_a_model_card(tmp_path):
    (tmp_path / "config.yaml").write_text("a: &a\n  <<: *a\n")
    with pytest.raises(UserError, match=r"config.yaml:2:7: the alias \*a"):
        card_of(tmp_path, tmp_path, [])
