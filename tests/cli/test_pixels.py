"""One set of limits of pixels, from what comes before training to what answers: one large photo, the same tokens everywhere."""

import json
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from ruamel.yaml import YAML
from transformers import AutoProcessor

from qwenvl_ft.cli.options import read_chat_settings
from qwenvl_ft.config import Config
from qwenvl_ft.data.geometry import Limits, grid_of, read_limits, tokens_of
from qwenvl_ft.data.rows import Rows
from qwenvl_ft.errors import UserError
from qwenvl_ft.export.merge import export
from qwenvl_ft.infer.engine import ChatSettings, Engine, open_beside
from tests import films, runs
from tests.conftest import TINY
from tests.serving import data_url, serving

SAID = "What is in it?"
TRAINED = 150_000  # px: less than the tiny base's own 200,704, and than a config's default


@pytest.fixture(scope="module")
def photo(tmp_path_factory) -> Path:
    """The folder of a photo of 4000 x 3000 px and of a meta-file that asks about it."""
    folder = tmp_path_factory.mktemp("photo")
    ramp = np.linspace(0, 255, 4000, dtype=np.uint8)
    Image.fromarray(np.broadcast_to(ramp, (3000, 4000))).convert("RGB").save(folder / "photo.jpg")
    talk = [{"from": "user", "value": f"<img>photo.jpg</img>\n{SAID}"}, {"from": "assistant", "value": "A ramp."}]
    (folder / "meta.json").write_text(json.dumps([{"conversations": talk}]))
    return folder


def settings(photo: Path, **more) -> dict:
    return {**runs.BASE, "train_meta_file": photo / "meta.json", "train_data_dir": photo, "output_dir": photo / "run", "max_steps": 1,
            "row_tokens": 4096, "rows_per_step": 1, **more}  # fmt: skip


@pytest.fixture(scope="module")
def trained(photo):
    """The tokens that training gives the photo, in the row that it reads; its run lies in photo / run."""
    from qwenvl_ft.train.loop import train

    grids, example = [], Rows.example

    def noted(self, script):
        made = example(self, script)
        grids.append(made["image_grid_thw"].tolist())
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rows, "example", noted)
        train(Config(**settings(photo, max_pixels=TRAINED)))
    ((grid,),) = grids
    return tokens_of(tuple(grid), 2)


def tokens(run, photo: Path, *options: str) -> set[int]:
    """How long `show` and `validate-meta --model` say that the record is."""
    where = ["--data-dir", str(photo), "--model", str(TINY), *options, "--json"]
    shown = json.loads(run("show", str(photo / "meta.json"), "0", *where)[1])
    counted = json.loads(run("validate-meta", str(photo / "meta.json"), *where)[1])
    return {len(shown["ids"]), counted["tokens"]["total"]}


def planned(run, photo: Path, **more) -> int:
    file = photo / "plan.yaml"
    YAML().dump({key: str(value) if isinstance(value, Path) else value for key, value in settings(photo, **more).items()}, file)
    return json.loads(run("plan", "--config", str(file), "--json")[1])["tokens"]["total"]


def test_what_is_shown_before_training_is_what_training_would_use(run, photo):
    """A 4000 x 3000 photo had 15,301 tokens for show and validate-meta, by the base's own limits, and 1,256 for plan and train."""
    default = planned(run, photo)
    assert tokens(run, photo) == {default} and default > planned(run, photo, max_pixels=TRAINED)
    smaller = planned(run, photo, max_pixels=TRAINED)
    assert tokens(run, photo, "--config", str(photo / "plan.yaml")) == {smaller} == tokens(run, photo, "--max-pixels", str(TRAINED))
    assert tokens(run, photo, "--config", str(photo / "plan.yaml"), "--max-pixels", str(1280 * 28 * 28)) == {default}


def test_a_photo_has_the_same_tokens_from_the_plan_to_the_merged_folder(run, photo, trained, monkeypatch):
    """eval showed the base other pictures than the adapter, so that its comparison was none."""
    out, like = photo / "run", ["--config", str(photo / "run" / "config.yaml")]
    picture, question = photo / "photo.jpg", [{"role": "user", "content": [{"image": str(photo / "photo.jpg")}, "\n" + SAID]}]
    written = planned(run, photo, max_pixels=TRAINED)
    assert tokens(run, photo, *like) == {written}

    def of(inputs) -> int:
        (grid,) = inputs["image_grid_thw"].tolist()
        return tokens_of(tuple(grid), 2)

    seen, inputs = [], Engine.inputs_of
    monkeypatch.setattr(Engine, "inputs_of", lambda self, scripts: seen.append(of(got := inputs(self, scripts))) or got)
    export(out, photo / "merged", None, 0, lambda done, total: None)
    few = ["--max-new-tokens", "1"]
    base, tuned, merged = ([str(TINY), *like], [str(TINY), "--adapter", str(out)], [str(photo / "merged")])
    for number, who in enumerate((base, tuned, merged)):
        asked = [who[0], SAID, *who[1:], "--image", str(picture), *few]
        assert run("ask", *asked)[0] == 0
        scores = run("eval", who[0], str(photo / "meta.json"), *who[1:], "--data-dir", str(photo), *few, "--json",
                     "--out", str(photo / f"{number}.jsonl"))  # fmt: skip
        assert json.loads(scores[1])["max_pixels"] == TRAINED
    assert seen == [trained] * 6
    stock = AutoProcessor.from_pretrained(photo / "merged")
    assert of(stock.image_processor(images=Image.open(picture), return_tensors="pt")) == trained
    served_alone = {
        "tuned": open_beside(TINY, {"tuned": out})["tuned"],
        "base": open_beside(TINY, {}, ChatSettings(max_pixels=TRAINED))[None],
    }
    body = {"max_tokens": 1, "messages": [{"role": "user", "content": [{"image": data_url(picture)}, {"text": "\n" + SAID}]}]}
    for name, engine in served_alone.items():
        with serving({name: engine}) as served:
            said = httpx.post(served.url + "/v1/chat/completions", json=body | {"model": name}, timeout=60).json()
        assert said["usage"]["prompt_tokens_details"]["image_tokens"] == trained
        assert said["usage"]["prompt_tokens"] == len(engine.inputs([question])["input_ids"][0])


def test_a_film_is_drawn_alike_however_it_is_asked_about(run, tmp_path, monkeypatch):
    """With video_fps in --config `ask --video` drew a quarter of the frames that `ask --jsonl` and `serve` drew."""
    film, config = films.write(tmp_path / "a.mp4", count=80), tmp_path / "config.yaml"
    config.write_text(f"model: {TINY}\ntrain_meta_file: a.json\noutput_dir: o\nvideo_fps: 0.5\n")
    messages = [{"role": "user", "content": [{"video": str(film)}, {"text": "read"}]}]
    (tmp_path / "in.jsonl").write_text(json.dumps({"messages": messages}))
    frames, inputs_of = [], Engine.inputs_of

    def noted(self, scripts):
        frames.append(len(scripts[0].media[0].indices))
        return inputs_of(self, scripts)

    monkeypatch.setattr(Engine, "inputs_of", noted)
    for how in (["read", "--video", str(film)], ["--jsonl", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out.jsonl")]):
        assert run("ask", str(TINY), *how, "--config", str(config), "--max-new-tokens", "1")[0] == 0
    settings = read_chat_settings(config, None, None, None)
    open_beside(TINY, {}, settings)[None].inputs([messages])
    assert frames == [4] * 3 and settings.open(TINY)[1].video_fps == 0.5


def test_limits_that_cross_are_named_wherever_they_are_given(run, photo):
    for command in (["show", str(photo / "meta.json"), "0", "--data-dir", str(photo), "--model", str(TINY)],
                    ["ask", str(TINY), "hi"]):  # fmt: skip
        code, _, err = run(*command, "--min-pixels", "100352", "--max-pixels", "50176")
        assert code == 1 and "max_pixels: is 50176, less than min_pixels, 100352" in err
        assert run(*command, "--max-pixels", "5")[0] == 2
    with pytest.raises(UserError, match="less than min_pixels, 1000000"):
        read_limits(TINY, 1_000_000)


def test_pictures_that_rounding_makes_smaller_are_counted_and_tiny_ones_noted(run, talk, tmp_path):
    """64 px became 56, 4 tokens, without a word."""
    for name, side in {"icon": 64, "tenth": 150, "fine": 290, "whole": 280}.items():
        Image.new("RGB", (side, side)).save(tmp_path / f"{name}.png")
    meta = talk(*([f"<img>{name}.png</img>?", "a"] for name in ("icon", "tenth", "fine", "whole")))
    facts = run("plan", "--config", "configs/demo.yaml", f"train_meta_file={meta}", f"train_data_dir={tmp_path}", "--json")[1]
    limits = Limits(14, 2, 3136, 1280 * 28 * 28)
    lost = {side: 1 - (grid_of(side, side, limits)[1] * 14) ** 2 / side**2 for side in (64, 150, 290, 280)}
    assert [side for side, share in lost.items() if share > 0.1] == [64, 150] and lost[290] > 0
    assert json.loads(facts)["pictures_shrunk"] == 2
    (note,) = [note for note in json.loads(facts)["notes"] if "little can be seen" in note]
    assert note == ("1 picture of at most 16 tokens, in which little can be seen: icon.png, 64 x 64 px, becomes 56 x 56, 4 tokens; "
                    "min_pixels enlarges them")  # fmt: skip
    enlarged = run("plan", "--config", "configs/demo.yaml", f"train_meta_file={meta}", f"train_data_dir={tmp_path}", "min_pixels=50176",
                   "--json")[1]  # fmt: skip
    assert not [note for note in json.loads(enlarged)["notes"] if "picture" in note]
