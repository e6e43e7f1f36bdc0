"""What a frozen vision tower makes of a row, kept on disk: read, it gives the same loss and gradients to the bit."""

import os
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from transformers import AutoProcessor

from qwenvl_ft.data import features as kept_features
from qwenvl_ft.data import rows
from qwenvl_ft.data.chat import open_chat
from qwenvl_ft.data.families import feature_width
from qwenvl_ft.data.features import ENTRY, INDEX, Features
from qwenvl_ft.data.rows import FEATURES, Rows
from qwenvl_ft.model.load import limited, trainable
from qwenvl_ft.model.loss import summed_loss
from tests.model.test_packing import make_model
from tests.model.test_trees import records


@pytest.fixture(scope="module")
def job(family_model, tmp_path_factory):
    """(model, rows of text, pictures, a film, a picture and a film)."""
    chat = open_chat(family_model, video_max_pixels=160_000)
    scripts = [chat.write_scripts(record)[-1] for record in records(tmp_path_factory.mktemp("features"))]
    together = [[4, 5, 7], [9], [0, 10, 8], [6]]
    return make_model(family_model), Rows(scripts, together, chat, limited(AutoProcessor.from_pretrained(family_model), chat))


def features_of(job, folder, family_model):
    return Features(folder / "features" / "one", len(job[1]), feature_width(family_model), torch.float32)


def found(model, row, keep=None):
    """Loss and gradients."""
    model.zero_grad()
    loss = summed_loss(model, model, row, False, keep)
    loss.backward()
    return loss.item(), torch.cat([parameter.grad.flatten() for parameter in trainable(model).values()])


def test_kept_features_give_the_same_loss_and_gradients_and_open_no_picture(job, family_model, tmp_path, monkeypatch):
    model, plain = job
    held = features_of(job, tmp_path, family_model)
    seeing = Rows(plain.scripts, plain.rows, plain.chat, plain.processor, features=held)
    wanted = [found(model, seeing[number], partial(held.write, number)) for number in range(len(plain))]
    with_media = [number for number in range(len(plain)) if any(plain.scripts[of].media for of in plain.rows[number])]
    assert held.num_kept() == len(with_media) == 3

    def opened(*args):
        assert not args[0], "a picture is opened, though what the tower makes of it is kept"
        return {}

    monkeypatch.setattr(rows, "pixels", opened)
    monkeypatch.setattr(type(model.base_model.model), "get_image_features", None)
    elsewhere = pickle.loads(pickle.dumps(held))  # as a worker has it
    blind = Rows(plain.scripts, plain.rows, plain.chat, plain.processor, features=elsewhere)
    for number, (loss, gradients) in enumerate(wanted):
        row = blind[number]
        assert (FEATURES in row) == (number in with_media) and "pixel_values" not in row and "pixel_values_videos" not in row
        again, others = found(model, row)
        assert again == loss and torch.equal(others, gradients)


@pytest.mark.parametrize("damage", ["a part is cut", "a bit of a part", "an entry is torn", "the folder is taken away"])
def test_what_is_torn_or_damaged_is_made_again(damage, tmp_path):
    held = Features(tmp_path / "features" / "one", 3, 4, torch.bfloat16)
    made = torch.randn(5, 4).bfloat16()
    held.write(0, made)
    held.write(2, made + 1)
    assert torch.equal(held.read(0), made) and held.read(1) is None and torch.equal(held.read(2), made + 1)
    part, index = held.folder / "1.part", held.folder / INDEX
    if damage == "a part is cut":
        part.write_bytes(part.read_bytes()[:-1])
    elif damage == "a bit of a part":
        part.write_bytes(part.read_bytes()[:-1] + b"\x07")
    elif damage == "an entry is torn":
        index.write_bytes(index.read_bytes()[: -ENTRY["end"].itemsize] + bytes(8))
    else:
        held.folder.rename(tmp_path / "gone")
    assert held.read(2) is None
    if damage != "the folder is taken away":
        assert torch.equal(held.read(0), made)
        other = Features(held.folder, 3, 4, torch.bfloat16)  # another process, or the next run
        other.write(2, made)
        assert torch.equal(held.read(2), made) and (held.folder / "2.part").exists()


@pytest.mark.parametrize(
    "entry", [(1, 0, 0, 2**60), (1, 0, 2**63, 2**63 + 8), (1, 0, 8, 0), (9, 0, 0, 8)], ids=["long", "far", "negative", "no part"]
)
def test_an_index_that_is_damaged_ends_no_run(entry, tmp_path):
    held = Features(tmp_path / "features" / "one", 1, 4, torch.float32)
    held.write(0, torch.zeros(1, 4))
    (held.folder / INDEX).write_bytes(np.array([entry], ENTRY).tobytes())
    assert held.read(0) is None


def test_what_is_not_finite_is_not_kept(tmp_path):
    """Every later run would end with it."""
    held = Features(tmp_path / "features" / "one", 2, 4, torch.float32)
    held.write(0, torch.tensor([[0.0, 1.0, float("nan"), 2.0]]))
    held.write(1, torch.ones(1, 4))
    assert held.read(0) is None and torch.equal(held.read(1), torch.ones(1, 4))


@pytest.mark.parametrize("other", [torch.zeros(2, 4).bfloat16(), torch.zeros(2, 8)], ids=["precision", "width"])
def test_numbers_of_another_kind_are_not_kept_and_it_is_said(other, tmp_path, capsys):
    held = Features(tmp_path / "features" / "one", 1, 4, torch.float32)
    held.write(0, other)
    assert held.read(0) is None and "is not kept any more: it has" in capsys.readouterr().err


def test_a_full_disk_is_said_once_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    held = Features(tmp_path / "features" / "one", 3, 4, torch.float32)

    def full(self, *args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Features, "_write", full)
    held.waiting.extend([(0, torch.zeros(1, 4), None)] * 3)  # as on a GPU
    for row in range(3):
        held.write(row, torch.zeros(1, 4))
    assert capsys.readouterr().err.count("No space left on device") == 1 and held.read(0) is None


def test_the_folders_that_were_not_used_for_longest_are_removed_unless_a_run_may_have_them(tmp_path):
    for number in range(kept_features.KEPT + 3):
        Features(tmp_path / f"{number}", 1, 4, torch.float32)
    for number in (0, 1):
        os.utime(tmp_path / f"{number}", (number, number))
    Features(tmp_path / "6", 1, 4, torch.float32)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3", "4", "5", "6"]
