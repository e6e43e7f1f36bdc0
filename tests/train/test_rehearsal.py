"""Rows on a GPU, as far as they can be followed without one: nothing of the CPU's among what is there, and nothing waits."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image

from qwenvl_ft import Engine
from qwenvl_ft.config import Config
from qwenvl_ft.data.targets import tower_trains
from qwenvl_ft.model.load import load_base
from qwenvl_ft.model.loss import summed_loss
from qwenvl_ft.train.simulation import shape_of
from tests.model.test_packing import make_job
from tests.model.test_trees import trees  # noqa: F401  (a fixture)
from tests.train.rehearsal import DEVICE, Rehearsal


@pytest.fixture(scope="module")
def rows(family_model, trees, tmp_path_factory):  # noqa: F811
    """Records in a row, a record alone with two pictures, text alone, and trees with pictures and films."""
    _, rows = make_job(family_model, tmp_path_factory.mktemp("job"))
    return [rows[0], rows[2], rows[3], trees[0]]


def rehearsed(model_dir, row, on, bf16=True):
    """A row forward and back."""
    config = Config(model=model_dir, train_meta_file="none", output_dir="none", lora_on=on)
    model = shape_of(config, bf16)
    with Rehearsal() as rehearsal:
        summed_loss(model, model, row, tower_trains(config.lora_on), device=DEVICE).backward()
    return rehearsal


@pytest.mark.parametrize("kind", ["packed", "alone", "text", "trees"])
def test_no_row_waits_and_what_it_needs_is_sent_before(family_model, rows, kind):
    row = rows[["packed", "alone", "text", "trees"].index(kind)]
    found = rehearsed(family_model, row, ["language"])
    films = kind == "trees" and family_model.name == "qwen3_vl"  # transformers sorts a row's pictures from its films by masks
    assert not found.mixed and bool(found.waits) == films, (found.mixed, found.waits)
    assert found.sent and all("waits.py" in place for _, place in found.sent)


def test_in_float32_where_no_kernel_has_segments_a_row_does_not_wait_either(family_model, rows):
    found = rehearsed(family_model, rows[0], ["language"], bf16=False)
    assert not found.mixed and not found.waits, found.waits


@pytest.mark.parametrize("kind", ["packed", "trees"])
def test_where_the_tower_trains_its_gradients_alone_are_waited_for(family_model, rows, kind):
    found = rehearsed(family_model, rows[0 if kind == "packed" else 3], ["language", "vision", "merger"])
    assert not found.mixed
    if not (kind == "trees" and family_model.name == "qwen3_vl"):
        assert {name for name, _ in found.waits} == {"aten.masked_scatter_backward.default"}


def test_answers_on_a_device_are_those_of_the_cpu(family_model, tmp_path):
    """Of an adapter, each alone and in a batch, whose prefixes are read once."""
    torch.manual_seed(0)
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(load_base(family_model, "float32"), lora).save_pretrained(tmp_path / "adapter")
    engine, asked = Engine.open(family_model, tmp_path / "adapter"), questions(tmp_path)

    def answers():
        return [engine.ask(asked[0], 4), engine.ask(asked[-1], 4), *engine.ask_many(asked, 4)]

    wanted = answers()
    with Rehearsal(values=True) as rehearsal, torch.inference_mode():
        rehearsal.move(engine.model)
        assert engine.model.device == DEVICE and answers() == wanted
    assert not rehearsal.mixed and rehearsal.sent, rehearsal.mixed


def questions(folder):
    """Two about one picture, one about another, one about none."""
    for number, size in enumerate([(168, 112), (90, 200)]):
        Image.effect_noise(size, 90).save(folder / f"{number}.png")
    shown = [[{"type": "image", "image": str(folder / f"{number}.png")}] for number in (0, 0, 1)] + [[]]
    return [
        [{"role": "user", "content": [*media, {"type": "text", "text": f"What is it, {number}?"}]}]
        for number, media in enumerate(shown)
    ]


def test_the_rehearsal_sees_what_a_gpu_would_refuse_or_wait_for():
    with Rehearsal() as found:
        states, ids = torch.ones(4, 2, device=DEVICE), torch.tensor([0, 1, 1]).to(DEVICE)
        assert not found.waits and not found.mixed and len(found.sent) == 1
        states[torch.tensor([0, 1])]
        states + torch.ones(2)
        assert len(found.mixed) == 1 and len(found.sent) == 2 and not found.waits
        assert ids.tolist() == [0, 1, 1] and int(ids[2]) == 1 and (ids == 1).nonzero().flatten().shape == (2,)
        assert states[:3][ids == 1].shape == (2, 2) and torch.tensor([5], device=DEVICE).to("cpu").item() == 5
        assert states[[0, 1]].shape == (2, 2) and states.new_tensor([1.0]).shape == (1,)
        torch.zeros(3, dtype=torch.long).copy_(ids)
    assert [name for name, _ in found.waits] == [
        "tolist", "aten._local_scalar_dense.default", "aten.nonzero.default", "a mask as index", "tensor", "aten._to_copy.default",
        "__getitem__", "new_tensor", "aten.copy_.default",
    ]  # fmt: skip
