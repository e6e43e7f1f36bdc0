"""A folder of runs as training and evaluation leave them, without the training."""

import json
from pathlib import Path

import pytest
from PIL import Image
from ruamel.yaml import YAML
from starlette.testclient import TestClient

from qwenvl_ft.board.app import make_app

HERE = "http://127.0.0.1:8080"


def write_run(root: Path, name: str, done: int, steps: int, **settings) -> Path:
    """A run of `steps` that has done some of them, half a second each; all of them: with its results."""
    folder = root / name
    folder.mkdir(parents=True)
    settings = {"model": "data/tiny", "train_meta_file": "data/sample/train.json", "output_dir": str(folder), **settings}
    with (folder / "config.yaml").open("w") as file:
        YAML().dump(settings, file)
    (folder / "plan.json").write_text(json.dumps({"steps": steps, "records": 8, "notes": []}))
    lines = [
        {"step": step, "loss": 4 / step, "taught_tokens": 100, "learning_rate": 1e-4, "epoch": step / 10, "tokens_per_s": 2000.0,
         "taught_tokens_per_s": 200.0, "run_loss": 3.25, "peak_memory_gib": 11.5}
        for step in range(1, done + 1)
    ]  # fmt: skip
    if done == steps:
        lines[-1]["eval_loss"] = 1.125
        (folder / "all_results.json").write_text(json.dumps({"steps": steps}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def predicted(number: int, answer: str, wanted: str = "16", **more) -> dict:
    return {"where": f"eval.json[{number}].conversations[1]", "pictures": [], "question": f"Question {number}?", "wanted": wanted,
            "answer": answer, "cut": False, "exact": answer == wanted, "relaxed": answer == wanted, "asked": "0", **more}  # fmt: skip


def write_predictions(path: Path, *predictions: dict) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(of) + "\n" for of in predictions))
    return path


@pytest.fixture
def root(tmp_path) -> Path:
    """runs/ with a finished run, a stopped one, their answers, and a comparison beside it."""
    root = tmp_path / "runs"
    write_run(root, "first", 10, 10)
    write_run(root, "sweep/second", 4, 10, learning_rate=0.002)
    picture = tmp_path / "chart.png"
    Image.new("RGB", (1600, 800), "#c33").save(picture)
    (tmp_path / "secret.txt").write_text("a secret")
    boxes = {"boxes": [{"bbox_2d": [10, 20, 110, 120], "label": "cat", "picture": 0}],
             "wanted_boxes": [{"bbox_2d": [10, 20, 110, 130], "label": "cat", "picture": 0}], "iou": [0.9]}  # fmt: skip
    write_predictions(
        root / "first/predictions-eval.jsonl",
        predicted(0, "16", pictures=[str(picture), str(tmp_path / "secret.txt"), str(tmp_path / "gone.png")]),
        predicted(1, "<b>17</b>"), predicted(2, "  "), predicted(3, "16 and", cut=True),
        predicted(4, "here", pictures=[str(picture)], **boxes),
    )  # fmt: skip
    write_predictions(root / "sweep/second/predictions-eval.jsonl", *(predicted(number, "16") for number in range(4)))
    write_predictions(tmp_path / "compare-eval/base.jsonl", predicted(0, "3"))
    return root


def end_all(app) -> None:
    """Ends what a board started, whatever became of the test."""
    for process in app.state.jobs.processes.values():
        process.kill()
        process.wait()


@pytest.fixture
def client(root) -> TestClient:
    return TestClient(make_app(root), base_url=HERE)
