"""A run on videos named in a meta-file: its settings, and what its adapter and merged folder draw of a film afterwards."""

import json

import pytest
from transformers import AutoProcessor

from qwenvl_ft.cli.main import main
from qwenvl_ft.data.prepare import prepare
from qwenvl_ft.errors import UserError
from qwenvl_ft.export.merge import export
from qwenvl_ft.infer.engine import Engine
from tests import films
from tests.conftest import TINY
from tests.runs import config, run

DRAWN = {"video_fps": 4.0, "video_max_frames": 8, "video_max_pixels": 20_000}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three records of two films and a picture."""
    folder = tmp_path_factory.mktemp("films")
    films.write(folder / "a.mp4", 40, codec="libx264", size=(320, 240))
    films.write(folder / "b.mp4", 20)
    talks = ["<video>a.mp4</video>\nWhat?", "<video>b.mp4</video>\n<video>a.mp4</video>\nBoth?", "No film?"]
    records = [{"conversations": [{"from": "user", "value": talk}, {"from": "assistant", "value": "a bar"}]} for talk in talks]
    (folder / "train.json").write_text(json.dumps(records))
    return folder


def settings(folder, **more):
    return {"train_meta_file": folder / "train.json", "train_data_dir": folder, "row_tokens": 4096, "max_steps": 1} | more


def grids(folder, **more):
    return [grid for script in prepare(config(folder, **settings(folder, **more))).scripts for grid in script.grids]


def test_each_setting_of_videos_changes_what_is_drawn(folder):
    plain, smaller = grids(folder), grids(folder, video_max_pixels=20_000)
    assert [steps for steps, _, _ in plain] == [4, 2, 4] == [steps for steps, _, _ in smaller]
    assert 14 * 14 * smaller[0][1] * smaller[0][2] <= 20_000 < 14 * 14 * plain[0][1] * plain[0][2]
    assert [steps for steps, _, _ in grids(folder, video_fps=4.0)] == [8, 4, 8]
    assert [steps for steps, _, _ in grids(folder, video_fps=4.0, video_max_frames=8)] == [4, 4, 4]


def test_what_was_trained_is_what_adapter_and_merged_folder_draw(folder, tmp_path):
    run(folder, **settings(folder, **DRAWN))
    prepared = prepare(config(folder, **settings(folder, **DRAWN)))
    script, question = prepared.scripts[0], {"video": str(folder / "a.mp4")}
    export(folder / "run", tmp_path / "merged", None, 0, lambda done, total: None)
    for engine in (Engine.open(TINY, folder / "run"), Engine.open(tmp_path / "merged")):
        asked = engine.inputs([[{"role": "user", "content": [question, "What?"]}]])
        assert asked["video_grid_thw"].tolist() == [[*script.grids[0]]]
        assert asked["input_ids"][0].tolist() == script.widened()[0][: asked["input_ids"].shape[1]]
    stock = AutoProcessor.from_pretrained(tmp_path / "merged").video_processor
    assert (stock.fps, stock.max_frames, stock.cap_pixels_per_frame) == (4.0, 8, True)
    assert stock.size["longest_edge"] == 20_000


def test_a_film_that_breaks_is_named_or_skipped(folder, tmp_path, capsys):
    whole = (folder / "a.mp4").read_bytes()
    start, end = whole.index(b"mdat") + 4, whole.index(b"moov") - 4
    half = (start + end) // 2  # what comes before it, and the index behind, are whole
    (tmp_path / "a.mp4").write_bytes(whole[:half] + b"\xff" * (end - half) + whole[end:])
    for name in ("b.mp4", "train.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(UserError, match=r"train\.json\[[01]\]: "):
        run(tmp_path, **settings(tmp_path))
    run(tmp_path, name="skipping", **settings(tmp_path, on_bad_record="skip"))
    results = json.loads((tmp_path / "skipping" / "all_results.json").read_text())
    assert {problem["where"] for problem in results["skipped"]} == {"train.json[0]", "train.json[1]"}
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        main(["validate-meta", str(tmp_path / "train.json"), "--data-dir", str(tmp_path), "--json", "--deep"])
    report = json.loads(capsys.readouterr().out)
    assert (exit.value.code, report["used"]) == (1, 1)
    assert [problem["where"] for problem in report["problems"]] == ["train.json[0]", "train.json[1]"]


def test_a_film_too_long_for_a_row_is_told_how_to_become_shorter(folder):
    with pytest.raises(UserError, match=r"lower video_max_pixels, video_fps or video_max_frames, or shorten"):
        prepare(config(folder, **settings(folder, row_tokens=100)))
