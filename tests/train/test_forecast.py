"""What a run will take of a card's memory, said beforehand: held against what torch's own allocator gives away in real steps."""

import json
import sys
from collections import Counter

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForImageTextToText

from qwenvl_ft.cli import data
from qwenvl_ft.cli.main import main
from qwenvl_ft.data.families import FAMILIES
from qwenvl_ft.data.prepare import prepare
from qwenvl_ft.data.quantization import bytes_per_weight
from qwenvl_ft.data.rows import join
from qwenvl_ft.errors import UserError
from qwenvl_ft.model.load import add_lora, refit, trainable
from qwenvl_ft.model.lora import fuse_lora
from qwenvl_ft.model.loss import summed_loss
from qwenvl_ft.train import forecast
from qwenvl_ft.train.activations import Needs, recompute
from qwenvl_ft.train.cards import CARDS, Card, card_of, named_by_driver
from qwenvl_ft.train.forecast import CUDA, Forecaster, heaviest
from qwenvl_ft.train.simulation import TRAINED, WEIGHTS, Shapes, forward, peak_of, shape_of
from tests.conftest import ROOT, TINY
from tests.runs import config

MODELS = ["Qwen2-VL-7B", "Qwen2.5-VL-7B", "Qwen3-VL-8B"]


@pytest.fixture(scope="module")
def shapes():
    """scripts/real_shapes.py."""
    sys.path.insert(0, str(ROOT / "scripts"))
    import real_shapes

    return real_shapes


@pytest.fixture
def settings_of(shapes, tmp_path):
    """Settings of a run on a toy of a model, which has a config.json and nothing else."""

    def settings_of(name, **settings):
        shapes.config_of(name, toy=True).save_pretrained(tmp_path / name)
        return config(tmp_path, model=tmp_path / name, **{"lora_on": ["language", "vision"]} | settings)

    return settings_of


def rows_of(shapes, settings, tokens):
    known = shapes.AutoConfig.from_pretrained(settings.model)
    return [join(shapes.records(known, tokens, 3, tokens // 2, 1))]


def allocated(work, file):
    """The bytes that torch's allocator gives away at most while `work` is done, beyond those before, as it counts them itself."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        work()
    profiler.export_chrome_trace(str(file))
    changes = [event["args"] for event in json.loads(file.read_text())["traceEvents"] if event["name"] == "[memory]"]
    totals = [change["Total Allocated"] for change in changes]
    return max(totals) - (totals[0] - changes[0]["Bytes"])


@pytest.mark.parametrize("name", MODELS)
def test_the_forecast_is_what_the_allocator_gives_away(name, shapes, settings_of, tmp_path):
    settings = settings_of(name)
    (row,) = rows_of(shapes, settings, 512)
    known, on = shapes.config_of(name, toy=True), settings.lora_on
    real = refit(AutoModelForImageTextToText.from_config(known, dtype=torch.float32), "varlen")
    real = add_lora(real, FAMILIES[known.model_type], on, settings.lora_rank, settings.lora_alpha, 0.0, 42)
    fuse_lora(real)
    recompute(real)
    real.train()
    optimizer = torch.optim.AdamW(trainable(real).values())

    def step():
        summed_loss(real, real, row, tower_trains=True).backward()

    step()
    optimizer.step()  # from now on there are gradients and moments
    tensors = [*real.parameters(), *real.buffers(), *(of for of in row.values() if isinstance(of, torch.Tensor))]
    tensors += [of.grad for of in trainable(real).values()]
    tensors += [of for state in optimizer.state.values() for of in state.values()]
    before = sum({of.untyped_storage().data_ptr(): of.untyped_storage().nbytes() for of in tensors}.values())
    simulated = shape_of(settings, bf16=False)
    measured, counted = Needs(real), Needs(simulated)
    with measured.of_row():
        held = summed_loss(real, real, row, tower_trains=True)
    with Shapes(), counted.of_row():
        held = forward(simulated, row, on)
    del held
    assert [*measured.sizes.values()] == [*counted.sizes.values()] and measured.beside == pytest.approx(counted.beside, rel=0.001)
    found = {}
    for recomputed in (True, False):
        for of in (measured, counted):
            of.keep(0 if recomputed else len(of.sizes))
        found[recomputed] = allocated(step, tmp_path / "trace.json")
        assert peak_of(simulated, row, on).total() - before == pytest.approx(found[recomputed], rel=0.01)
    assert found[False] > 1.5 * found[True]


def test_what_is_chosen_fits_and_where_nothing_does_that_is_said(shapes, settings_of):
    settings = settings_of("Qwen2-VL-7B", gradient_checkpointing=False, dtype="auto")
    rows, asked = rows_of(shapes, settings, 1024), list[int]()

    def rows_at(row_tokens):
        asked.append(row_tokens)
        return rows_of(shapes, settings, row_tokens)

    of = Forecaster(settings, CARDS["H100"])
    roomy, least, kept = (of.of_rows(rows, checkpointing) for checkpointing in ("auto", True, False))
    assert roomy.fits and roomy.kept == roomy.auto == roomy.layers == kept.kept == 4 and least.kept == 0
    assert least.gib < roomy.gib == kept.gib and of.that_fits(roomy, 1024, rows_at) == ({}, roomy) and not asked
    for gib in (least.gib + 0.001, (least.gib + 0.6) / 2, 0.6):
        of.card = Card("small", gib)
        asked.clear()
        chosen, then = of.that_fits(kept._replace(card=of.card), 1024, rows_at)
        if gib > least.gib:
            assert chosen == {"gradient_checkpointing": "auto"} and then.fits and then.kept < 4
        elif gib > 0.6:
            assert then.fits and then.tokens <= chosen["row_tokens"] == asked[-1] < 1024 and chosen["row_tokens"] % 256 == 0
        else:
            assert then is None, "weights and CUDA itself take that"


@pytest.mark.parametrize("more", [{"use_dora": True}, {"lora_on": {"language": {}, "merger": {"full": True}}}])
def test_what_peft_runs_itself_is_simulated_in_float32(more, shapes, settings_of):
    """Its autocast knows no shapes, and DoRA's square matrices of ones were made for real."""
    plain, settings = settings_of("Qwen2-VL-7B", dtype="auto"), settings_of("Qwen2-VL-7B", dtype="auto", **more)
    rows = rows_of(shapes, settings, 256)
    least, found = (Forecaster(of, CARDS["H100"]).of_rows(rows, True) for of in (plain, settings))
    assert found.gib != least.gib and found.parts[TRAINED] > 0


def test_quantized_weights_take_what_their_bits_do(shapes, settings_of):
    settings = settings_of("Qwen2-VL-7B", dtype="auto")
    rows = rows_of(shapes, settings, 256)
    plain, quantized = (
        Forecaster(settings.model_copy(update={"quantization": how}), CARDS["H100"]).of_rows(rows, True) for how in ("none", "nf4")
    )
    bare = AutoModelForImageTextToText.from_config(shapes.config_of("Qwen2-VL-7B", toy=True))
    sizes = [of.numel() for name, of in bare.named_parameters() if "language_model.layers" in name and "proj.weight" in name]
    saved = (2 - bytes_per_weight("nf4")) * sum(sizes)
    assert plain.parts[WEIGHTS] - quantized.parts[WEIGHTS] == pytest.approx(saved, rel=0.01)  # storages are whole units
    assert quantized.parts["a quantized weight, written out"] == 2 * max(sizes)


def test_a_card_is_known_by_its_name_or_by_its_gib():
    assert card_of("RTX 4090") == card_of("nvidia geforce rtx4090") == CARDS["RTX 4090"]
    assert (card_of("24").gib, card_of("80").gib, card_of("24").tflops) == (23, 79, None)
    assert not card_of("T4").bf16 and card_of("L4").bf16
    for text, said in {
        "RTX 409": "did you mean RTX 4090?",
        "1": "give its GiB",
        "inf": "give its GiB",
        "A100": "did you mean A100-",
    }.items():
        with pytest.raises(UserError) as refused:
            card_of(text)
        assert said in refused.value.problems[0].fix
    assert named_by_driver("NVIDIA A100-SXM4-80GB", 79.3, True).tflops == CARDS["A100-80GB"].tflops
    assert named_by_driver("NVIDIA GeForce RTX 4090", 23.6, True).tflops == CARDS["RTX 4090"].tflops
    assert named_by_driver("Other 9000", 23.6, True).tflops is None


PLAN = ["plan", "--config", "configs/demo.yaml", f"model={TINY}", "gradient_checkpointing=auto"]


@pytest.fixture
def planned(capsys, monkeypatch):
    """(what a plan says, what it notes), as JSON or as a drawing."""
    monkeypatch.setattr(data.shutil, "which", lambda name: None)

    def planned(*more):
        with pytest.raises(SystemExit) as ended:
            main([*PLAN, *more])
        assert not ended.value.code
        out, err = capsys.readouterr()
        return (json.loads(out) if "--json" in more else " ".join(out.split())), err

    return planned


def test_plan_forecasts_for_the_card_that_is_named_or_here_and_says_what_to_change(planned, monkeypatch):
    assert "memory" not in planned("--json")[0], "there is no card"
    memory = planned("--gpu", "RTX 4090", "--json")[0]["memory"]
    assert memory["fits"] and memory["card_gib"] == 23 and memory["kept"] == memory["auto_keeps"] == memory["layers"] == 4
    assert sum(memory["parts_gib"].values()) == pytest.approx(memory["gib"], abs=0.05) and memory["advice"] is None
    monkeypatch.setattr(data.shutil, "which", lambda name: "nvidia-smi")
    monkeypatch.setattr(forecast, "present_card", lambda: Card("a card that is here", 0.6))
    said, _ = planned("quantization=nf4")
    assert "Memory on a card that is here, simulated" in said and "does not fit" in said and "fix nothing fits" in said
    monkeypatch.setattr(forecast, "memory_of", lambda settings, prepared, card: {"card": card.name})
    cards = {(): "a card that is here", ("fit=24",): "a card of 24 GiB", ("fit=24", "--gpu", "L4"): "L4"}
    assert all(planned(*more, "--json")[0]["memory"] == {"card": name} for more, name in cards.items())


def test_what_to_change_is_said_in_words(tmp_path, monkeypatch):
    settings = config(tmp_path, row_tokens=1400, gradient_checkpointing=True, dtype="auto")
    prepared = prepare(settings)
    longest = max(prepared.plan.lengths)
    parts = Forecaster(settings, CARDS["H100"]).of_rows(heaviest(settings, prepared), True).parts
    fixed = sum(parts[name] for name in (WEIGHTS, TRAINED, CUDA))
    lower = f"lower max_pixels (now 1003520) until no record is longer than 256 tokens (now {longest}), and set row_tokens: 256"
    for share, said in {0.9: "set row_tokens: 1024: ", 0.3: lower}.items():
        card = Card("small", (fixed + share * (parts.total() - fixed)) / 2**30)
        memory = forecast.memory_of(settings, prepared, card)
        assert not memory["fits"] and memory["advice"].startswith(said)
        assert memory["set"] == ({"row_tokens": 1024} if share == 0.9 else {})

    def of_rows(self, rows, how, stock=Forecaster.of_rows):
        found = stock(self, rows, how)
        return found if self.config.quantization == "none" else found._replace(parts=Counter({WEIGHTS: 2**29}))

    monkeypatch.setattr(Forecaster, "of_rows", of_rows)
    memory = forecast.memory_of(settings, prepared, Card("small", 0.6))
    assert (memory["set"], memory["advice"]) == ({"quantization": "nf4"}, "set quantization: nf4: 0.5 GiB then")


def test_a_model_that_cannot_be_simulated_is_said_in_a_line_and_the_plan_stands(planned, monkeypatch):
    def fails(*_):
        raise NotImplementedError("nonzero: of what?\nmore")

    monkeypatch.setattr(forecast, "shape_of", fails)
    said, noted = planned("--gpu", "24")
    assert "in all" not in said and "an epoch" in said
    assert noted == f"no forecast of memory: {TINY} with these settings cannot be simulated (nonzero: of what?)\n"
