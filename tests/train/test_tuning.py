"""What of a model trains, and how: each setting against PEFT and plain torch, and the merge of what it trains."""

import json
import re
import shutil

import pytest
import torch
from torch import nn

from qwenvl_ft.data.families import family_of
from qwenvl_ft.data.targets import find_layers, num_trained, tower_of
from qwenvl_ft.errors import UserError
from qwenvl_ft.export.merge import export
from qwenvl_ft.model.load import trainable
from qwenvl_ft.model.lora import fuse_lora
from qwenvl_ft.values import Own
from tests.conftest import SAMPLE, TINY
from tests.runs import adapter, config, difference, few_records, metrics, run, same
from tests.serving import CHARTS
from tests.tiny import make_family

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


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


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
    assert num_trained(config(towers.parent, lora_on=TOWERS)) == sum(tensor.numel() for tensor in adapter(towers).values())
    whole = num_trained(config(towers.parent, lora_on=FULL)) - num_trained(config(towers.parent, lora_on=["language"]))
    chosen = [num_trained(config(towers.parent, lora_on=on, lora_targets=["q_proj"])) for on in (FULL, ["language"])]
    assert chosen[0] - chosen[1] == whole > 100_000, "lora_targets does not choose among what trains in full"
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


def test_where_the_tower_alone_trains_what_shows_nothing_teaches_nothing_and_is_counted(tmp_path, capsys):
    """The first row without a picture ended the run with a traceback: its loss had no way back."""
    asked = [{"from": "user", "value": "and without a picture? " * 30}, {"from": "assistant", "value": "nothing"}]
    shown = json.loads((SAMPLE / "train.json").read_text())[0]
    (tmp_path / "mixed.json").write_text(json.dumps([shown, {"conversations": asked}]))
    (tmp_path / "text.json").write_text(json.dumps([{"conversations": asked}]))
    settings = {"train_meta_file": tmp_path / "mixed.json", "row_tokens": 600, "rows_per_step": 1, "max_steps": 4}
    for tower in ("merger", "vision"):
        tuned = run(tmp_path, tower, lora_on=[tower], **settings)
        assert "1 records show no picture or video: they teach nothing" in capsys.readouterr().out
        assert any("lora_B" in key and value.any() for key, value in tuned.items())
        losses = {}
        for line in metrics(tmp_path / tower):
            losses.setdefault(line["taught_tokens"], set()).add(line["loss"])
        assert sorted(map(len, losses.values())) == [1, 2], "that of the text is the same each time"
    with pytest.raises(UserError, match="lora_on: is vision alone, and no record shows a picture"):
        run(tmp_path, "text", lora_on=["vision"], **settings | {"train_meta_file": tmp_path / "text.json"})


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
    ({"lora_targets": ["q_proj"], "lora_on": ["language", "merger", "vision"]}, "lora_targets: names no layer of merger and vision\n"),
    ({"lora_targets": ["norm"]}, "model.language_model.norm is no linear layer"),
    ({"lora_targets": ["embed_tokens"]}, "embed_tokens is no linear layer"),
    ({"lora_targets": ["patch_embed.proj"], "lora_on": ["vision"]}, "patch_embed.proj is no linear layer"),
    ({"lora_targets": "q_proj"}, "lora_targets: q_proj: names no layer"),
])  # fmt: skip
def test_what_matches_nothing_or_is_no_linear_layer_is_said_before_torch_with_what_there_is(settings, said, tmp_path, monkeypatch):
    from qwenvl_ft.train import setup

    monkeypatch.setattr(setup, "load_base", None)
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


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Two short steps at a steady rate, on records that are planned once for all tests here."""
    few = few_records(tmp_path_factory.mktemp("records"), 3)
    return {**SETTINGS, "train_meta_file": few}


SETTINGS = {"max_steps": 2, "save_steps": 1, "rows_per_step": 1, "learning_rate": 1e-2, "lr_scheduler_type": "constant",
            "warmup_ratio": 0.0, "max_grad_norm": 1e9}  # fmt: skip


def plain_steps(folder, model, optimizer, **settings):
    """The steps of a run of these settings in plain torch: the mean loss over all taught tokens, the optimizer's own rates."""
    from transformers import AutoProcessor

    from qwenvl_ft.data.prepare import prepare, schedule
    from qwenvl_ft.data.rows import Rows
    from qwenvl_ft.data.targets import tower_trains
    from qwenvl_ft.model.load import limited
    from qwenvl_ft.model.loss import summed_loss

    known = config(folder, **settings)
    prepared = prepare(known)
    rows = Rows(prepared.scripts, prepared.plan.rows, prepared.chat, limited(AutoProcessor.from_pretrained(TINY), prepared.chat))
    for _, step in schedule(prepared, known):
        losses = [summed_loss(model, model, rows[row], tower_trains(known.lora_on)) for row in step]
        (sum(losses) / sum(map(prepared.taught_tokens, step))).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def by_peft(base=None, **settings):
    """The tiny base with LoRA on its language model, by PEFT alone, and its optimizer; or another `base`."""
    from peft import LoraConfig, get_peft_model
    from peft.optimizers import create_loraplus_optimizer

    from qwenvl_ft.model.load import load_base

    ratio, towers = settings.pop("loraplus_lr_ratio", None), settings.pop("lora_on", {})
    if "merger" in towers:
        settings["modules_to_save"] = ["merger"]
    torch.manual_seed(42)
    targets = family_of(TINY).language
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", **settings)
    model = get_peft_model(base or load_base(TINY, "float32", "varlen"), lora).train()
    if ratio:
        return model, create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=ratio)
    rates = {name: towers.get(tower_of(name), {}).get("learning_rate", 1e-2) for name in trainable(model)}
    groups = [{"params": [parameter], "lr": rates[name]} for name, parameter in trainable(model).items()]
    return model, torch.optim.AdamW(groups, weight_decay=0.0)


FULL = {"language": {}, "merger": {"full": True, "learning_rate": 3e-3}}
KINDS = {
    "full": {"lora_on": FULL},
    "rslora_and_plus": {"use_rslora": True, "loraplus_lr_ratio": 4},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_trains_as_pefts_goes_on_to_the_same_bits_and_merges(kind, settings, tmp_path):
    """What is saved, loaded by PEFT on the base as it was, has the logits of the model that PEFT and plain torch trained."""
    from peft import get_peft_model_state_dict

    from qwenvl_ft.data.meta_file import read_records
    from qwenvl_ft.infer.engine import Engine

    ours = run(tmp_path, **settings, **KINDS[kind])
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    assert same(ours, run(tmp_path, **settings, **KINDS[kind], resume=True))

    model, optimizer = by_peft(**KINDS[kind])
    start = tmp_path / "start"
    model.save_pretrained(start)
    fuse_lora(model)  # AdamW shows any other order of sums where a gradient is about 0; tests/model/test_lora.py compares both
    plain_steps(tmp_path, model, optimizer, **settings, **KINDS[kind])
    question = read_records(settings["train_meta_file"], SAMPLE / "images")[0][1].turns[:1]
    inputs = Engine.open(TINY, tmp_path / "run").inputs([question])
    with torch.inference_mode():
        trained, plain = model.eval()(**inputs).logits, loaded(tmp_path / "run").eval()(**inputs).logits
    assert (trained - plain).abs().max() < 1e-3 * trained.abs().max()
    wanted = get_peft_model_state_dict(model)
    if kind == "pissa":  # which PEFT makes plain when it saves
        edit(start / "adapter_config.json", init_lora_weights=True)
        with pytest.warns(UserWarning, match="PiSSA changes the base weights"):
            model.save_pretrained(tmp_path / "wanted", path_initial_model_for_weight_conversion=str(start))
        wanted = adapter(tmp_path / "wanted")
        said = (json.loads((tmp_path / of / "adapter_config.json").read_text()) for of in ("run", "wanted"))
        ours_said, theirs = ([of[key] for key in ("r", "lora_alpha", "init_lora_weights")] for of in said)
        assert ours_said == theirs == [8, 16, True]
    assert difference(wanted, ours) < 2e-3
    merges_as_pefts(tmp_path / "run", tmp_path / "merged")


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def other_family(request, tmp_path_factory):
    """A random model of a family that is not data/tiny's."""
    return make_family(request.param, tmp_path_factory.mktemp("family") / request.param, light=True)


@pytest.mark.parametrize("kind", [*KINDS, "towers"])
def test_each_kind_in_the_other_families_goes_on_to_the_same_bits_answers_as_by_peft_and_merges(
    kind, other_family, settings, tmp_path
):
    from qwenvl_ft.data.meta_file import read_records
    from qwenvl_ft.infer.engine import Engine

    towers = {"lora_on": {"language": {}, "vision": {"rank": 2}, "merger": {"rank": 6}}}
    all_settings = {**settings, "model": other_family, "max_pixels": 16 * 32 * 32, **(KINDS | {"towers": towers})[kind]}
    ours = run(tmp_path, **all_settings)
    assert all(tensor.any() for tensor in ours.values()), "a B that stayed zero learnt nothing"
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    assert same(ours, run(tmp_path, **all_settings, resume=True))
    question = read_records(settings["train_meta_file"], SAMPLE / "images")[0][1].turns[:1]
    engine = Engine.open(other_family, tmp_path / "run")
    inputs = engine.inputs([question])
    with torch.inference_mode():
        wanted = loaded(tmp_path / "run", other_family).eval()(**inputs).logits
        assert (engine.model(**inputs).logits - wanted).abs().max() < 1e-5 * wanted.abs().max()
    merges_as_pefts(tmp_path / "run", tmp_path / "merged", other_family)


def test_every_family_merges_with_ranks_of_its_towers_and_a_merger_in_full(family_model, tmp_path):
    """Weights at random, as if trained: also Qwen3-VL's several mergers."""
    from transformers import AutoModelForImageTextToText

    from qwenvl_ft.model.load import add_lora, load_base

    model = add_lora(load_base(family_model, "float32"), family_of(family_model), TOWERS, 4, 8, 0.0, 0,
                     {"vision": Own(rank=2, alpha=3), "merger": Own(full=True)})  # fmt: skip
    for parameter in trainable(model).values():
        nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    export(tmp_path / "adapter", tmp_path / "merged", family_model, 0, lambda done, total: None)
    base, merged = (AutoModelForImageTextToText.from_pretrained(of).state_dict() for of in (family_model, tmp_path / "merged"))
    wanted = model.merge_and_unload().state_dict()
    assert all(merged[key].allclose(wanted[key], atol=1e-5) for key in merged)
    changed = {key for key in base if not base[key].equal(merged[key])}
    assert {tower_of(key) for key in changed} == TOWERS.keys()
    assert all(key in changed for key in base if ".visual.merger." in key or "deepstack_merger" in key)


def test_norms_and_biases_of_a_merger_in_full_do_not_decay(tmp_path):
    from qwenvl_ft.model.load import add_lora, load_base
    from qwenvl_ft.train.groups import groups_of

    model = add_lora(load_base(TINY, "bfloat16"), family_of(TINY), FULL, 4, 8, 0.0, 0, {"merger": Own(full=True)})
    groups = groups_of(model, config(tmp_path, lora_on=FULL, weight_decay=0.1))
    assert {(group["name"], group["weight_decay"], min(of.ndim for of in group["params"])) for group in groups} == {
        ("learning_rate", 0.1, 2), ("learning_rate_merger", 0.1, 2), ("learning_rate_merger", 0.0, 1),
    }  # fmt: skip
    assert {of.dtype for group in groups for of in group["params"]} == {torch.float32}


def test_adapters_with_and_without_a_merger_share_a_base_and_vllm_wants_the_first_merged(tmp_path):
    from qwenvl_ft.hub.doctor import examine
    from qwenvl_ft.infer.engine import Engine, open_beside
    from qwenvl_ft.model.load import add_lora, load_base
    from qwenvl_ft.serve.batching import Batcher
    from qwenvl_ft.serve.vllm_backend import start_vllm

    folders = {name: tmp_path / name for name in ("full", "plain")}
    for name, folder in folders.items():
        towers = ["language", "merger"] if name == "full" else ["language", "vision"]
        model = add_lora(load_base(TINY, "float32"), family_of(TINY), towers, 4, 8, 0.0, 0, {"merger": Own(full=True)})
        for parameter in trainable(model).values():
            nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(folder)
    engines = open_beside(TINY, folders)
    asked = [{"role": "user", "content": [{"type": "image", "image": str(CHARTS[0])}, {"type": "text", "text": "read"}]}]
    batcher, answers = Batcher(engines[None], 1), {}
    with torch.inference_mode():
        for name in ("full", None, "plain", "full", None):  # back and forth
            batcher._switch(engines[name].adapter)
            found = engines[name].model(**engines[name].inputs([asked])).logits
            assert found.equal(answers.setdefault(name, found))
        batcher.close()
        for name, logits in answers.items():
            alone = Engine.open(TINY, folders.get(name))
            assert logits.allclose(alone.model(**alone.inputs([asked])).logits, atol=1e-4), name
    assert not answers["full"].allclose(answers["plain"], atol=0.1)
    with pytest.raises(UserError, match=r"holds the merger, of which .*other trains LoRA: PEFT cannot hold both"):
        model = add_lora(load_base(TINY, "float32"), family_of(TINY), ["merger"], 4, 8, 0.0, 0)
        model.save_pretrained(tmp_path / "other")
        open_beside(TINY, folders | {"other": tmp_path / "other"})
    assert examine(folders["full"]).facts["vLLM"].startswith("does not take modules_to_save; merge first: qwenvl-ft export")
    with pytest.raises(UserError, match=r"full: vLLM does not take its modules_to_save\n  fix: merge it with `qwenvl-ft export`"):
        start_vllm(TINY, ["tiny"], folders, [], None)


def random_lora(folder):
    """An adapter of PEFT's alone, as another tool leaves it, that does something."""
    model, _ = by_peft()
    for parameter in trainable(model).values():
        nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder)
    return folder


def test_an_adapter_is_trained_on_from_as_peft_and_plain_torch_do(settings, tmp_path, capsys):
    from peft import PeftModel, get_peft_model_state_dict

    from qwenvl_ft.model.load import load_base

    theirs = random_lora(tmp_path / "theirs")
    trained = run(tmp_path, **settings, init_adapter=theirs)
    said = " ".join(capsys.readouterr().out.split())
    assert "from the weights of" in said and f"a new run, which begins with the weights of {theirs}" in said
    model = PeftModel.from_pretrained(load_base(TINY, "float32", "varlen"), theirs, is_trainable=True).train()
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2, weight_decay=0.0)
    plain_steps(tmp_path, model, optimizer, **settings)
    assert difference(get_peft_model_state_dict(model), trained) < 2e-3
    assert difference(adapter(theirs), trained) > 0.01


@pytest.mark.parametrize(("here", "said"), [
    ({"rank": 2}, r"56 tensors of another rank: .* is \[4, 192\] and here \[2, 192\]\n  fix: set lora_rank, .* says r 4"),
    ({"alpha": 4}, r"counts 2 times, and 1 times here, .*\n  fix: set lora_alpha and use_rslora to its own: .* says lora_alpha 8"),
    ({"on": ["vision"]}, r"lacks 16 of the 16 tensors that train here(.|\n)*holds 56 tensors that do not train here"),
])  # fmt: skip
def test_an_adapter_that_does_not_fit_is_refused_with_the_key_to_set(here, said, tmp_path):
    from qwenvl_ft.model.load import add_lora, load_base
    from qwenvl_ft.train.initial import set_initial

    theirs = random_lora(tmp_path / "theirs")
    towers = {"on": ["language"], "rank": 4, "alpha": 8} | here
    model = add_lora(load_base(TINY, "float32"), family_of(TINY), *towers.values(), 0.0, 0)
    with pytest.raises(UserError, match=said):
        set_initial(model, config(tmp_path), torch.device("cpu"), None, theirs)


def test_a_finished_run_is_extended_or_its_weights_are_taken_for_another(settings, tmp_path, capsys):
    epochs = settings | {"max_steps": None, "save_steps": 100}
    longer = run(tmp_path, "longer", **epochs, num_train_epochs=2)
    first = run(tmp_path, **epochs, num_train_epochs=1)
    assert not same(first, longer)
    capsys.readouterr()
    assert same(longer, run(tmp_path, **epochs, num_train_epochs=2, resume=True))
    assert re.search(r"is of a run of (\d) steps and this is one of \d: so is the schedule of its rate", capsys.readouterr().out)
    with pytest.raises(UserError, match="num_train_epochs was 2 and is now 1"):
        run(tmp_path, **epochs, num_train_epochs=1, resume=True)

    (checkpoint,) = (tmp_path / "longer").glob("checkpoint-*")
    other = settings | {"learning_rate": 5e-3, "rows_per_step": 2, "max_steps": 1}
    wanted = run(tmp_path, "other", **other, init_adapter=checkpoint)
    for _ in range(2):  # the second time as after a kill before the first checkpoint
        assert same(wanted, run(tmp_path, **other, resume="weights"))
        out = capsys.readouterr().out
        assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-1"]
        assert f"begins with the weights of {tmp_path / 'run'}" in out and len(metrics(tmp_path / "run")) == 1
        assert same(wanted, run(tmp_path, **other, resume=True))
        shutil.rmtree(tmp_path / "run" / "checkpoint-1")
        with pytest.raises(UserError, match=r"holds no checkpoint yet, and earlier-1 of an earlier run\n  fix: set resume=weights"):
            run(tmp_path, **other, resume=True)
    shutil.rmtree(tmp_path / "run" / "earlier-1")
    with pytest.raises(UserError, match="holds no checkpoint to take weights from"):
        run(tmp_path, **other, resume="weights")


def test_a_rank_that_a_layer_has_not_is_refused_by_pissa(settings, tmp_path):
    with pytest.raises(UserError, match=r"has \d+ singular values, and its rank is 4000"):
        run(tmp_path, **settings, init_lora_weights="pissa", lora_rank=4000)


def test_the_best_checkpoint_is_kept_and_evaluations_without_a_better_one_end_the_run(settings, tmp_path, monkeypatch, capsys):
    from qwenvl_ft.train import loop

    losses = iter([3.0, 2.0, 2.5, 2.0, 2.2, 2.1, 2.3])
    monkeypatch.setattr(loop, "evaluate", lambda *of: loop.Taught(next(losses), 1, []))
    judged = settings | {"eval_meta_file": settings["train_meta_file"], "eval_steps": 1, "save_steps": 100, "save_total_limit": 1}

    def trained(**more):
        state = run(tmp_path, **judged | {"max_steps": 6, **more})
        kept = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
        return state, kept, json.loads((tmp_path / "run" / "all_results.json").read_text())

    stopped, kept, results = trained(keep_best=True, early_stopping_patience=2)
    assert kept == ["checkpoint-2", "checkpoint-4"] and same(stopped, adapter(tmp_path / "run" / "checkpoint-4"))
    assert results["best"] == {"step": 2, "eval_loss": 2.0, "checkpoint": "checkpoint-2"}
    assert results["stopped_early"] == {"step": 4, "of": 6} and results["steps"] == 4
    out = " ".join(capsys.readouterr().out.split())
    assert "stopped early: no eval_loss below 2.0000 since step 2" in out
    assert f"is that of step 2: for --adapter {tmp_path / 'run' / 'checkpoint-2'}" in out
    monkeypatch.setattr(loop, "train_step", None)  # no step is left to do
    assert same(stopped, trained(keep_best=True, early_stopping_patience=2, resume=True)[0])
    monkeypatch.undo()
    monkeypatch.setattr(loop, "evaluate", lambda *of: loop.Taught(next(losses), 1, []))
    _, kept, results = trained(keep_best=True, early_stopping_patience=4, resume=True)
    assert kept == ["checkpoint-2", "checkpoint-6"] and results["steps"] == 6
    assert same(adapter(tmp_path / "run" / "checkpoint-2"), run(tmp_path, "two", **settings))


def test_without_these_keys_the_best_goes_with_the_oldest(settings, tmp_path, monkeypatch):
    from qwenvl_ft.train import loop

    losses = iter([2.0, 3.0, 3.0])
    monkeypatch.setattr(loop, "evaluate", lambda *of: loop.Taught(next(losses), 1, []))
    more = {"eval_meta_file": settings["train_meta_file"], "eval_steps": 1, "save_total_limit": 1, "max_steps": 3}
    run(tmp_path, **settings | more)
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-3"]
    assert json.loads((tmp_path / "run" / "all_results.json").read_text()).keys().isdisjoint({"best", "stopped_early"})
