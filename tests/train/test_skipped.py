"""Records whose pictures break while they are decoded: skipped where the config says so, counted alike by every process."""

import json
import shutil

import accelerate
import pytest
import torch

from qwenvl_ft.data.pictures import PictureChanged
from qwenvl_ft.errors import UserError
from qwenvl_ft.model.load import limited
from qwenvl_ft.train import setup
from tests.runs import adapter, config, metrics, run, same
from tests.train.conftest import breaks


def results(folder):
    return json.loads((folder / "all_results.json").read_text())


def test_a_step_divides_by_what_is_really_taught(tmp_path, monkeypatch):
    """Against the mean over the tokens of the records that can be shown, and its gradient, computed here without the loop."""
    from transformers import AutoProcessor

    from qwenvl_ft.data.prepare import prepare, schedule
    from qwenvl_ft.data.rows import Rows
    from qwenvl_ft.model.load import add_lora, load_base
    from qwenvl_ft.model.loss import summed_loss

    settings = breaks(tmp_path, 1, 4) | {"max_steps": 1, "lora_dropout": 0.0, "rows_per_step": 100}
    known = config(tmp_path, **settings)
    prepared = prepare(known)
    assert not prepared.problems
    ((_, step),) = schedule(prepared, known)
    good = [[number for number in prepared.plan.rows[row] if number not in (1, 4)] for row in step]
    processor = AutoProcessor.from_pretrained(known.model)
    rows = Rows(prepared.scripts, [row for row in good if row], prepared.chat,
                limited(processor, prepared.chat))  # fmt: skip
    model = add_lora(load_base(known.model, "float32"), prepared.chat.family, ["language"], 4, 8, 0.0, known.seed)
    tokens = sum(int((row["labels"] >= 0).sum()) for row in rows)
    loss = sum(summed_loss(model, model, row, False) for row in rows) / tokens
    loss.backward()
    wanted = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9).item()
    clip, norms = accelerate.Accelerator.clip_grad_norm_, []
    monkeypatch.setattr(accelerate.Accelerator, "clip_grad_norm_", lambda *args: (norms.append(norm := clip(*args)), norm)[1])
    run(tmp_path, **settings)
    (line,) = metrics(tmp_path / "run")
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert [norm.item() for norm in norms] == pytest.approx([wanted], rel=1e-4)


def test_skipped_records_are_said_at_the_end_and_kept_with_the_results(skipping, capsys, tmp_path):
    folder, _ = skipping
    assert {problem["where"] for problem in results(folder)["skipped"]} == {"some.json[1]", "some.json[4]"}
    assert all("breaks while it is decoded" in problem["what"] for problem in results(folder)["skipped"])
    run(tmp_path, **breaks(tmp_path, 2))
    said = capsys.readouterr()
    assert "skipped some.json[2]: " in said.out and "1 records whose pictures break" in said.out and "some.json[2]: " in said.err


def test_a_resumed_run_skips_them_again_and_ends_with_the_same_bits(skipping, tmp_path):
    folder, settings = skipping
    shutil.copytree(folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-4"), shutil.rmtree(tmp_path / "run" / "checkpoint-3")
    for name in ("adapter_model.safetensors", "all_results.json"):
        (tmp_path / "run" / name).unlink()
    assert same(adapter(folder), run(tmp_path, **settings, resume=True))
    assert results(folder)["skipped"] == results(tmp_path / "run")["skipped"]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_step_of_which_nothing_is_left_passes(workers, tmp_path):
    settings = breaks(tmp_path, *range(8)) | {"max_steps": 2, "dataloader_num_workers": workers}
    before = run(tmp_path, **settings)
    assert all(torch.isfinite(tensor).all() for tensor in before.values())
    assert not any(tensor.any() for name, tensor in before.items() if "lora_B" in name), "nothing taught, and it learnt"
    assert results(tmp_path / "run")["skipped"]


def test_held_out_records_that_break_are_skipped_and_do_not_count(tmp_path):
    settings = breaks(tmp_path, 1)
    meta = settings["train_meta_file"]
    records = json.loads(meta.read_text())
    (tmp_path / "good.json").write_text(json.dumps([record for number, record in enumerate(records) if number != 1]))
    few = {"max_steps": 1, "learning_rate": 1e-12, "lora_dropout": 0.0}
    losses = []
    for number, held_out in enumerate((meta, tmp_path / "good.json")):
        run(tmp_path, name=f"run{number}", **{**settings, **few, "eval_meta_file": held_out})
        losses.append(metrics(tmp_path / f"run{number}")[0]["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_without_skip_the_run_stops_in_words_and_saves_nothing(tmp_path):
    settings = breaks(tmp_path, *range(8)) | {"on_bad_record": "error"}
    with pytest.raises(UserError, match=r"some\.json.*breaks while it is decoded"):
        run(tmp_path, **settings)
    assert not list((tmp_path / "run").glob("checkpoint-*")) and not (tmp_path / "run" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_is_gone_stops_the_run_although_bad_records_are_skipped(workers, tmp_path, monkeypatch):
    """A folder that was unmounted would be skipped record by record, and a resumed run would plan other rows."""
    settings = breaks(tmp_path) | {"dataloader_num_workers": workers}
    monkeypatch.setattr(setup, "write_settings", lambda *_: shutil.rmtree(tmp_path / "images"))
    with pytest.raises(UserError, match=r"some\.json\[\d\]: since the records were read it changed: .* is gone") as error:
        run(tmp_path, **settings)
    assert isinstance(error.value, PictureChanged)
