"""A model that no GPU holds: whole layers on each, and the answers of one that lies in one place."""

import re

import pytest
import torch
from accelerate import dispatch_model

from qwenvl_ft.data.meta_file import read_records
from qwenvl_ft.errors import UserError
from qwenvl_ft.infer.engine import Engine, open_adapter
from qwenvl_ft.model import spread
from tests.conftest import SAMPLE, TINY
from tests.serving import random_adapter


@pytest.fixture
def machine(monkeypatch):
    """GPUs that are not there, with so many bytes free on each; returns where the model's parts would go."""

    def start(*free):
        places = {}
        monkeypatch.setattr(spread.torch.cuda, "device_count", lambda: len(free))
        monkeypatch.setattr(spread.torch.cuda, "mem_get_info", lambda card: (free[card], free[card]))
        monkeypatch.setattr(spread, "dispatch_model", lambda model, found: places.update(found) or model)
        return places

    return start


@pytest.fixture(scope="module")
def engine():
    return Engine.open(TINY)


def test_whole_layers_go_to_each_gpu_in_order(engine, machine, capsys):
    num_bytes = sum(weight.nbytes for weight in engine.model.parameters())
    places = machine(*[int(0.7 * num_bytes)] * 3)
    assert spread.onto(engine.model, torch.device("cuda")) is engine.model
    assert set(places.values()) == {0, 1, 2} and "lie on 3 GPUs" in capsys.readouterr().err
    layers = [place for name, place in places.items() if ".language_model.layers" in name]
    assert not [name for name in places if re.search(r"layers\.\d+\.", name)], "a layer is on one GPU"
    assert set(layers) == {1, 2} and layers == sorted(layers), "in order"


def test_what_the_first_gpu_has_room_for_stays_on_it(engine, machine):
    num_bytes = sum(weight.nbytes for weight in engine.model.parameters())
    places = machine(2 * num_bytes, 2 * num_bytes)
    assert spread.onto(engine.model, torch.device("cpu")) is engine.model
    moved = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(engine.model), "to", lambda model, device: moved.append(device))
        spread.onto(engine.model, torch.device("cuda"))
    assert moved == [torch.device("cuda")] and not places


def test_what_all_together_cannot_hold_is_refused(engine, machine):
    num_bytes = sum(weight.nbytes for weight in engine.model.parameters())
    places = machine(num_bytes // 4, num_bytes // 4)
    with pytest.raises(UserError, match=r"GiB of weights do not fit the 2 GPUs here"):
        spread.onto(engine.model, torch.device("cuda"))
    assert not places


def test_a_model_in_several_places_answers_as_in_one_with_an_adapter_too(engine, tmp_path):
    """In memory and on the disk: the hooks that carry what goes between them are those that carry it between GPUs."""
    adapter = random_adapter(TINY, tmp_path / "adapter", 0)
    questions = [record.turns[:1] for record in read_records(SAMPLE / "eval.json", SAMPLE / "images")[0][:4]]
    questions.append(questions[0])  # which begins like another
    wanted, adapted = (of.ask_many(questions, 12) for of in (engine, Engine.open(TINY, adapter)))
    apart = Engine.open(TINY)
    language = {"embed_tokens": "cpu", "norm": "cpu", "rotary_emb": "cpu", "layers.0": "cpu", "layers.1": "cpu", "layers.2": "disk"}
    places = {f"model.language_model.{name}": place for name, place in (language | {"layers.3": "disk"}).items()}
    places |= {"model.visual": "cpu", "lm_head": "cpu"}
    dispatch_model(apart.model, places, offload_dir=tmp_path)
    assert spread.is_spread(apart.model)
    assert apart.ask_many(questions, 12) == wanted
    beside = open_adapter(apart, TINY, adapter, "adapter_0")
    assert beside.ask_many(questions, 12) == adapted != wanted
