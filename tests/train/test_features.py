"""Runs that keep what the frozen vision tower makes: where, of what, and that they end where others do."""

import json
import os
import time

import pytest
from PIL import Image

from qwenvl_ft.data import prepare as preparing
from qwenvl_ft.data.prepare import prepare
from qwenvl_ft.model.load import load_base
from qwenvl_ft.train import setup, state
from tests.runs import ROOT, config, few_records, run, same
from tests.train.conftest import breaks


@pytest.fixture
def towers(tmp_path, monkeypatch):
    """Counts how often the vision tower is run; a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    calls = []

    def watched(*args, **kwargs):
        model = load_base(*args, **kwargs)
        model.model.visual.register_forward_hook(lambda *args: calls.append(1))
        return model

    monkeypatch.setattr(setup, "load_base", watched)
    return calls


def folders(tmp_path):
    return sorted((tmp_path / "cache/qwenvl_ft/features").glob("*"))


WIDTH = json.loads((ROOT / "data/tiny/config.json").read_text())["text_config"]["hidden_size"]
TWO_EPOCHS = {"max_steps": None, "num_train_epochs": 2}


@pytest.mark.parametrize("workers", [0, 2])  # which build rows of the next epoch before those of this one are kept
def test_from_the_second_epoch_on_the_tower_is_not_run_and_the_weights_are_the_same(workers, towers, tmp_path, capsys):
    plain = run(tmp_path, "plain", cache_features="off", **TWO_EPOCHS)
    assert len(towers) == 2 * 6 and not folders(tmp_path)
    towers.clear()
    (tmp_path / "held_out").mkdir()
    kept = run(
        tmp_path,
        "kept",
        eval_meta_file=few_records(tmp_path / "held_out", 1),
        eval_steps=2,
        dataloader_num_workers=workers,
        **TWO_EPOCHS,
    )
    assert same(plain, kept) and len(towers) == 6 + 1, "each row once, and the held-out one"
    assert len(folders(tmp_path)) == 2
    said = capsys.readouterr().out
    assert (
        "what the vision tower makes of its rows is kept: 0 of 6 rows are in" in said and "made in the first epoch and kept" in said
    )
    towers.clear()
    assert same(plain, run(tmp_path, "again", **TWO_EPOCHS)) and not towers
    assert "6 of 6 rows are in" in capsys.readouterr().out
    assert not same(plain, run(tmp_path, "blank", lora_rank=2, **TWO_EPOCHS)) and not towers, "another adapter, the same tower"


@pytest.mark.parametrize(
    "settings",
    [{"max_steps": 2}, {"lora_on": ["language", "vision"]}, {"lora_on": ["language", "merger"]}],
    ids=["one epoch", "a tower that trains", "a merger that trains"],
)
def test_what_is_run_once_or_changes_is_not_kept(settings, towers, tmp_path):
    run(tmp_path, **TWO_EPOCHS | settings)
    assert not folders(tmp_path)


@pytest.mark.parametrize("settings", [{"max_pixels": 16 * 28 * 28}, {"row_tokens": 1400}, {"dtype": "bfloat16"}], ids=str)
def test_other_pixels_rows_or_numbers_are_other_features(settings, towers, tmp_path):
    run(tmp_path, "one", **TWO_EPOCHS)
    run(tmp_path, "other", **TWO_EPOCHS | settings)
    assert len(folders(tmp_path)) == 2


def test_other_pictures_under_the_same_names_are_other_features(towers, tmp_path):
    settings = breaks(tmp_path) | TWO_EPOCHS
    run(tmp_path, "one", **settings)
    for picture in (tmp_path / "images").iterdir():
        before = picture.stat()
        with Image.open(picture) as image:
            image.rotate(180).save(picture, format=image.format)
        os.utime(picture, ns=(before.st_atime_ns, before.st_mtime_ns))
    run(tmp_path, "other", **settings)
    assert len(folders(tmp_path)) == 2


def test_a_row_with_a_broken_picture_is_not_kept_and_its_record_is_skipped_in_each_epoch(towers, tmp_path):
    settings = breaks(tmp_path, 1) | TWO_EPOCHS | {"lora_dropout": 0.0}
    plain = run(tmp_path, "plain", cache_features="off", **settings)
    assert same(plain, run(tmp_path, "kept", **settings))
    skipped = json.loads((tmp_path / "kept/all_results.json").read_text())["skipped"]
    assert [problem["where"] for problem in skipped] == ["some.json[1]"]


def test_other_code_makes_other_features(towers, tmp_path, monkeypatch):
    run(tmp_path, "one", **TWO_EPOCHS)
    monkeypatch.setattr(state, "code_of", lambda room: f"another {room.name}")
    run(tmp_path, "other", **TWO_EPOCHS)
    assert len(folders(tmp_path)) == 2 and len(towers) == 2 * 6


def test_what_is_made_of_a_file_that_changes_during_a_run_is_not_kept(towers, tmp_path, monkeypatch):
    """It would be found under the name of what was in the file before."""
    settings = breaks(tmp_path) | TWO_EPOCHS | {"lora_dropout": 0.0}

    def touch(*_):
        for picture in (tmp_path / "images").iterdir():
            picture.write_bytes(picture.read_bytes())

    time.sleep(0.1)
    monkeypatch.setattr(setup, "report_start", touch)
    run(tmp_path, "one", **settings)
    assert len(towers) == 2 * 6


def test_what_does_not_fit_the_disk_is_not_kept_and_the_plan_says_which(towers, tmp_path, monkeypatch, capsys):
    known = config(tmp_path, **TWO_EPOCHS)
    prepared = prepare(known)
    facts = prepared.summary(known)["features"]
    assert facts == {"bytes": 2 * WIDTH * int(prepared.media_tokens.sum()), "not_kept": None}
    with monkeypatch.context() as patched:
        patched.setattr(preparing, "free_bytes", lambda folder: facts["bytes"] * 3)
        assert "are free" in prepared.summary(known)["features"]["not_kept"]
        run(tmp_path, **TWO_EPOCHS)
    assert not folders(tmp_path) and "what the vision tower makes of its rows is not kept: it takes" in capsys.readouterr().out
    run(tmp_path, "kept", **TWO_EPOCHS)
    towers.clear()
    monkeypatch.setattr(preparing, "free_bytes", lambda folder: 0)  # what is there takes no more
    run(tmp_path, "again", **TWO_EPOCHS)
    assert "6 of 6 rows" in capsys.readouterr().out
