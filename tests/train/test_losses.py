"""The losses that are printed, kept and drawn: means over the tokens taught, of the whole run, whatever became of it between."""

import json
import re
import shutil
from xml.etree import ElementTree

import pytest

from qwenvl_ft.errors import NonFiniteLoss, UserError
from qwenvl_ft.train import loop
from qwenvl_ft.train.curves import draw_losses
from qwenvl_ft.train.state import Run
from tests.runs import adapter, config, metrics, run, same

SETTINGS = {"max_steps": 5, "logging_steps": 2, "save_steps": 3}


def mean(lines):
    return sum(line["loss"] * line["taught_tokens"] for line in lines) / sum(line["taught_tokens"] for line in lines)


def test_what_is_printed_is_the_mean_since_the_last_line_and_over_the_run(tmp_path, capsys):
    """It was the loss of the one step that the line fell on, and all_results.json had the last step's as train_loss."""
    run(tmp_path, **SETTINGS)
    lines = metrics(tmp_path / "run")
    assert len({line["taught_tokens"] for line in lines}) > 1  # else a plain mean would do
    printed = re.findall(r"^step (\d)/5 .* loss=([\d.]+) \(([\d.]+) over the run\)", capsys.readouterr().out, re.MULTILINE)
    since = {1: lines[:1], 2: lines[1:2], 4: lines[2:4], 5: lines[4:]}
    assert printed == [(str(step), f"{mean(some):.4f}", f"{mean(lines[:step]):.4f}") for step, some in since.items()]
    assert [line["run_loss"] for line in lines] == pytest.approx([mean(lines[:step]) for step in range(1, 6)])
    results = json.loads((tmp_path / "run" / "all_results.json").read_text())
    assert results["train_loss"] == pytest.approx(mean(lines)) and results["steps"] == 5


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of one that ended, and of one that was cut off after the line of a step that no checkpoint has."""
    folder = tmp_path_factory.mktemp("runs")
    run(folder, "plain", **SETTINGS)

    def cut_off(*args, step=loop.train_step):
        if len(metrics(folder / "run")) == 4:
            raise KeyboardInterrupt
        return step(*args)

    with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(loop, "train_step", cut_off)
        run(folder, **SETTINGS)
    return folder


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"step": 1}\n', "\0\0\0", None])
@pytest.mark.parametrize("name", ["metrics.jsonl", "plan.json"])
def test_a_run_goes_on_whatever_became_of_its_plan_and_metrics_and_knows_all_losses(runs, tmp_path, name, damage):
    """Resuming read both of them, and a line that a power cut had left was a traceback."""
    shutil.copytree(runs / "run", tmp_path / "run")
    path = tmp_path / "run" / name
    path.unlink() if damage is None else path.write_text(damage)
    run(tmp_path, **SETTINGS, resume=True)
    assert same(adapter(runs / "plain"), adapter(tmp_path / "run"))
    timed = ("tokens_per_s", "taught_tokens_per_s", "data_wait_s", "peak_memory_gib")
    ours, plain = (
        [{k: v for k, v in line.items() if k not in timed} for line in metrics(of)] for of in (tmp_path / "run", runs / "plain")
    )
    assert ours == plain
    for file in ("all_results.json", "loss.svg"):
        assert (tmp_path / "run" / file).read_text() == (runs / "plain" / file).read_text()
    with pytest.raises(UserError, match="learning_rate was"):
        run(tmp_path, **SETTINGS, resume=True, learning_rate=1.0)


def points(svg):
    """Of each curve of the drawing, its points."""
    found = ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}polyline")
    return [[tuple(map(float, pair.split(","))) for pair in of.get("points").split()] for of in found]


def test_the_curves_are_those_of_the_metrics(tmp_path):
    run(tmp_path, **SETTINGS, eval_meta_file=config(tmp_path).train_meta_file, eval_steps=2)
    lines = metrics(tmp_path / "run")
    train, held_out = points((tmp_path / "run" / "loss.svg").read_text())
    assert (len(train), len(held_out)) == (5, 3)
    for curve, key in ((train, "loss"), (held_out, "eval_loss")):
        losses = [line[key] for line in lines if key in line]
        heights = [360 - y for _, y in curve]  # of 300 px, above the axis
        assert heights == pytest.approx([loss * heights[0] / losses[0] for loss in losses], abs=0.3)
    assert [x for x, _ in train] == [60, 220, 380, 540, 700]


def test_a_long_run_is_drawn_as_means_and_a_single_step_can_be_drawn():
    lines = [{"step": step, "loss": 1.0 + step % 2, "taught_tokens": 1 + 2 * (step % 2)} for step in range(1, 8_001)]
    (train,) = points(draw_losses(lines))
    assert len(train) == 400 and len({y for _, y in train}) == 1  # each mean is 1.75 of taught tokens
    assert "training, mean of 20 steps" not in draw_losses(lines[:400])
    assert "mean of 20 steps" in draw_losses(lines)
    assert points(draw_losses(lines[:1])) == [[(60.0, pytest.approx(74.3, abs=0.1))]]


def test_losses_are_looked_at_once_a_step_and_the_row_of_one_that_is_not_finite_is_named(tmp_path, monkeypatch):
    """Each row's was, which on a GPU waits until it is computed."""
    taken, ran = [], []

    def train_step(run, epoch, rows, *args, stock=loop.train_step):
        taken.extend(run.prepared.places(row) for row in rows)
        return stock(run, epoch, rows, *args)

    def loss_of(*args, stock=Run.loss):
        ran.append(stock(*args))
        return ran[-1] * (float("nan") if len(ran) == 2 else 1)

    monkeypatch.setattr(loop, "train_step", train_step)
    monkeypatch.setattr(Run, "loss", loss_of)
    with pytest.raises(NonFiniteLoss) as stopped:
        run(tmp_path, rows_per_step=3, max_steps=1)
    (problem,) = stopped.value.problems
    assert len(ran) == len(taken) == 3 and problem.where == taken[1] and problem.what == "the loss is nan"


def test_the_seconds_that_rows_are_waited_for_and_the_most_memory_stand_in_a_steps_line(tmp_path, monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(loop.time, "monotonic", lambda: next(clock))
    rows = loop.Timed(iter([1, 2, 3]))
    assert [next(rows), next(rows)] == [1, 2] and rows.waited() == 2 and rows.waited() == 0 and [*rows] == [3]
    monkeypatch.undo()
    monkeypatch.setattr(loop, "peak_bytes", lambda device: 3 * 2**30 if device.type == "cpu" else 0)
    run(tmp_path, max_steps=1)
    (line,) = metrics(tmp_path / "run")
    assert line["peak_memory_gib"] == 3 and line["data_wait_s"] > 0


def test_trained_weights_that_never_had_a_gradient_are_named(tmp_path, capsys):
    """LoRA on the tower, and no picture in any record."""
    meta = tmp_path / "texts.json"
    meta.write_text(json.dumps([{"conversations": [{"from": "user", "value": "hi"}, {"from": "assistant", "value": "yes"}]}]))
    run(tmp_path, max_steps=1, train_meta_file=meta, lora_on=["language", "vision"])
    said = capsys.readouterr().out
    assert re.search(r"(\d+) of \d+ trained weights had no gradient in this run: .*visual", said)
    run(tmp_path, "seen", max_steps=1, lora_on=["language", "vision"])
    assert "no gradient" not in capsys.readouterr().out
