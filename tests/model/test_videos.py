"""Videos in training and asking, of every family: against transformers' own processor and positions, given the same frames."""

import random
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor
from transformers.video_utils import VideoMetadata

from qwenvl_ft.data.chat import IGNORE, open_chat
from qwenvl_ft.data.geometry import read_video_limits, reading_of
from qwenvl_ft.data.pictures import PictureChanged, size_of
from qwenvl_ft.data.reading import Reading
from qwenvl_ft.data.records import Picture, Record, Turn, Video
from qwenvl_ft.data.rows import Rows, as_floats
from qwenvl_ft.data.videos import frames, measured
from qwenvl_ft.errors import UserError
from qwenvl_ft.infer.engine import Engine
from qwenvl_ft.model.load import add_lora, limited, load_base, trainable
from qwenvl_ft.model.loss import summed_loss, vision_features
from tests import films
from tests.tiny import lighten

VIDEO_MAX_PIXELS = 160_000  # every film below is shrunk, and above the least that Qwen3-VL's processor makes of a frame


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """A picture and films of several sizes and rates, one of them a list of frames."""
    folder = tmp_path_factory.mktemp("media")
    noise = np.random.default_rng(0)
    for name, (width, height) in {"a.png": (168, 112), **{f"{number}.png": (170, 130) for number in range(5)}}.items():
        Image.fromarray(noise.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(folder / name)
    path = folder / "a.png"
    return {
        "picture": Picture(path, *size_of(path, "")),
        "film": measured(films.write(folder / "film.mp4", 20, size=(112, 84)), "film"),
        "long": measured(films.write(folder / "long.mp4", 70, rate=7, size=(320, 240)), "long", {"fps": 0.6}),
        "fast": measured(films.write(folder / "fast.mp4", 30, rate=240, size=(90, 170)), "fast", {"nframes": 6}),
        "list": measured([folder / f"{number}.png" for number in range(5)], "list", {"fps": 1.0}),
    }


TALKS = {
    "one film": [("film",)], "a film with a remainder": [("long",)], "five frames": [("list",)], "two films": [("film", "fast")],
    "mixed": [("picture", "long", "picture"), ("fast",)], "a picture": [("picture",)], "text": [()],
}  # fmt: skip


def record_of(talk, media, name="here"):
    turns = []
    for shown in talk:
        turns += [Turn("user", (*(media[one] for one in shown), "What happens?")), Turn("assistant", ("it moves",))]
    return Record(name, tuple(turns))


class Job:
    def __init__(self, model_dir):
        self.model_dir = model_dir
        self.chat = open_chat(model_dir, video_max_pixels=VIDEO_MAX_PIXELS)
        self.processor = limited(AutoProcessor.from_pretrained(model_dir), self.chat)
        self.model = load_base(model_dir, "float32")

    def rows(self, records, together=False, **settings):
        scripts = [self.chat.write_scripts(record)[-1] for record in records]
        rows = [[*range(len(scripts))]] * together + [[number] for number in range(len(scripts))]
        return Rows(scripts, rows, self.chat, self.processor, **settings)

    def stock(self, record):
        """What transformers makes of the record: one call of its own processor, frames given."""
        messages = [{"role": turn.role, "content": [part_of(part) for part in turn.parts]} for turn in record.turns]
        text = self.processor.apply_chat_template(messages, tokenize=False)
        videos = [medium for medium in record.media if isinstance(medium, Video)]
        shown = [Image.open(picture.source).convert("RGB") for picture in record.pictures]
        metadata = [VideoMetadata(total_num_frames=of.num_frames, fps=of.fps, frames_indices=list(of.indices)) for of in videos]
        decoded = [frames(video, lambda image: image) for video in videos]
        own = {"videos": decoded, "video_metadata": metadata, "do_sample_frames": False} if videos else {}
        return self.processor(text=[text], images=shown or None, **own, return_tensors="pt")


def part_of(part):
    return {"type": "text", "text": part} if isinstance(part, str) else {"type": part.kind}


@pytest.fixture(scope="module")
def job(family_model):
    return Job(family_model)


@pytest.mark.parametrize("name", TALKS)
def test_ids_pixels_grids_and_positions_are_transformers_own(name, job, media):
    record = record_of(TALKS[name], media)
    (script,) = (rows := job.rows([record])).scripts
    example, wanted = as_floats(rows.example(script)), job.stock(record)
    assert example["input_ids"].tolist() == wanted["input_ids"][0].tolist() and len(example["input_ids"]) == script.length
    for key in ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"):
        assert (key in example) == (key in wanted) and (key not in example or torch.equal(example[key], wanted[key])), key
    seconds = {key: wanted[key] for key in ("second_per_grid_ts",) if key in wanted}
    places, _ = job.model.model.get_rope_index(
        wanted["input_ids"], wanted["mm_token_type_ids"], wanted.get("image_grid_thw"), wanted.get("video_grid_thw"), **seconds
    )
    assert torch.equal(example["position_ids"][1:], places[:, 0])
    assert torch.equal(example["position_ids"][0], torch.arange(script.length))
    shown = torch.isin(example["input_ids"], torch.tensor([id for id in script.placeholders if id is not None]))
    assert (example["labels"][shown] == IGNORE).all()


def test_the_times_are_those_of_the_film(job, media):
    """Without its rate Qwen2.5-VL takes 24 frames a second for granted and Qwen3-VL writes the times of such a film."""
    script = job.chat.write_scripts(record_of([("film",)], media))[0]
    said, steps = job.chat.said(script.ids), len(script.counts)
    written = job.chat.family.clock == "written"
    assert steps == (2 if written else 1) and ("<0.3 seconds>" in said and "<1.6 seconds>" in said) == written
    places = job.rows([record_of([("film",)], media)]).text(script)["position_ids"]
    times = places[1][torch.tensor(script.widened()[0]) == job.chat.video_id].unique()
    if job.chat.family.clock == "seconds":  # 4 frames in 2 seconds: a step is a second, of four places
        assert (times - times[0]).tolist() == [0, 4]


def test_what_is_asked_is_what_was_taught(job, media):
    """Of the films as files, as of their frames in memory."""
    engine = Engine(job.model.eval(), job.processor, job.chat)
    for name in ("mixed", "five frames", "two films"):
        record = record_of(TALKS[name], media)
        row = job.rows([record])[0]
        floats = as_floats(row)
        asked = engine.inputs([record.turns[:-1]])
        ids = asked.pop("input_ids")[0]
        assert torch.equal(ids, row["input_ids"][0, : len(ids)])
        for key in ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"):
            assert (key in asked) == (key in row) and (key not in asked or torch.equal(asked[key], floats[key]))
        with torch.no_grad():
            logits = job.model(input_ids=ids[None], **dict(asked.items())).logits[0, -1]
            features = vision_features(job.model, row, False)
            ours = job.model(
                input_ids=row["input_ids"], position_ids=row["position_ids"], mm_encoder_outputs=features, use_cache=False
            ).logits[0, len(ids) - 1]
        assert torch.allclose(logits, ours, atol=1e-4)
    (film,) = read_of(media["film"])
    inputs = [engine.inputs([[Turn("user", (one, "What?"))]]) for one in (media["film"], film)]
    assert all(torch.equal(inputs[0][key], inputs[1][key]) for key in inputs[0])


def read_of(film):
    from qwenvl_ft.infer.messages import read_messages

    return read_messages([{"role": "user", "content": [{"video": str(film.source)}]}])[0].parts


def test_a_joined_row_with_films_has_the_loss_and_the_gradients_of_its_records(job, media):
    model = add_lora(load_base(job.model_dir, "float32"), job.chat.family, ["language", "vision"], 4, 8, 0.0, 0).train()
    for name, parameter in trainable(model).items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    talks = (TALKS["mixed"], TALKS["one film"], TALKS["text"])
    rows = job.rows([record_of(talk, media) for talk in talks], together=True)

    def gradients(which):
        model.zero_grad()
        loss = sum(summed_loss(model, model, rows[index], tower_trains=True) for index in which)
        loss.backward()
        return loss.item(), torch.cat([parameter.grad.flatten() for parameter in trainable(model).values()])

    (packed, together), (single, apart) = gradients([0]), gradients([1, 2, 3])
    assert packed == pytest.approx(single, rel=1e-5)
    assert (together - apart).abs().max() < 1e-4 * apart.abs().max()


def test_the_loss_is_that_of_the_models_own_forward(job, media):
    record = record_of(TALKS["mixed"], media)
    row, wanted = job.rows([record])[0], job.stock(record)
    with torch.no_grad():
        stock = job.model(**wanted, labels=row["labels"]).loss.item()
        ours = summed_loss(job.model, job.model, row, False).item()
    assert ours / (row["labels"] != IGNORE).sum().item() == pytest.approx(stock, rel=1e-5)


def test_a_film_that_breaks_keeps_its_place_blank_and_untaught(job, media, tmp_path):
    path = films.write(tmp_path / "bad.mp4", 20, codec="libx264")
    bad = replace(measured(path, "bad"), num_bytes=None)
    content = bytearray(path.read_bytes())
    start = content.index(b"mdat") + 4
    content[start + 200 : start + 2000] = b"\xff" * 1800
    records = [record_of([("film", "picture")], media), record_of([("bad", "picture")], media | {"bad": bad}, "bad")]
    whole = job.rows(records, together=True)[0]
    path.write_bytes(content)
    with pytest.raises(UserError, match="bad: "):
        job.rows(records)[1]
    row, problems = job.rows(records, together=True, skip=True).build(0)
    assert [problem.where for problem in problems] == ["bad"]
    assert all(torch.equal(row[key], whole[key]) for key in ("input_ids", "position_ids", "image_grid_thw", "video_grid_thw"))
    assert row["pixel_values_videos"].shape == whole["pixel_values_videos"].shape and row["pixel_values_videos"][-4:].eq(128).all()
    assert (row["labels"] != IGNORE).sum() * 2 == (whole["labels"] != IGNORE).sum()
    with pytest.raises(PictureChanged):
        job.rows([record_of([("bad",)], {"bad": replace(bad, num_bytes=1)})], skip=True)[0]


def test_a_row_of_a_film_needs_no_blank_picture_and_the_tower_runs_once(job, media, monkeypatch):
    """Where processes share out the tower's weights, one that runs it twice waits for ever for one that runs it once."""
    rows = job.rows([record_of([("film", "picture")], media), record_of([()], media)], always_look=True)
    assert len(rows[0]["image_grid_thw"]) == 1 and len(rows[1]["image_grid_thw"]) == 1
    calls = []
    handle = job.model.model.visual.register_forward_hook(lambda *args: calls.append(1))
    vision_features(job.model, rows[0], False)
    handle.remove()
    assert calls == [1]


def test_bounds_of_its_own_hold_for_each_frame(job, media):
    small, large = replace(media["long"], max_pixels=40_000), replace(media["film"], min_pixels=60_000)
    picture = replace(media["picture"], max_pixels=15_000)
    row = job.rows([record_of([("small", "large", "picture")], {"small": small, "large": large, "picture": picture})])[0]
    plain = job.rows([record_of([("long", "film", "picture")], media)])[0]
    area = job.chat.limits.patch_size**2
    for key in ("video_grid_thw", "image_grid_thw"):
        assert torch.equal(row[key][:, 0], plain[key][:, 0])
    areas, before = ((of["video_grid_thw"][:, 1:].prod(dim=1) * area).tolist() for of in (row, plain))
    assert areas[0] <= 40_000 < before[0] and areas[1] >= 60_000 > before[1]
    assert row["image_grid_thw"].prod() * area <= 15_000 < plain["image_grid_thw"].prod() * area
    for own in (replace(media["film"], max_pixels=3_000), replace(media["picture"], max_pixels=3_000)):
        with pytest.raises(UserError, match="below the least that it may have"):
            job.chat.grid_of(own)


def test_700_random_sizes_are_resized_as_the_processor_does(job, monkeypatch):
    from transformers.image_utils import SizeDict
    from transformers.video_processing_utils import BaseVideoProcessor

    monkeypatch.setattr(BaseVideoProcessor, "resize", lambda self, image, size, resample: (size.height, size.width))
    rng, processor, limits = random.Random(0), job.processor.video_processor, job.chat.video_limits
    stock = {"factor": limits.unit_px, "temporal_factor": limits.step_frames, "cap_pixels_per_frame": True}
    for _ in range(700):
        height, number = int(10 ** rng.uniform(0.5, 3.7)), rng.choice([2, 3, 4, 5, 7, 40, 301, 768])
        width = min(max(int(height * 10 ** rng.uniform(-2, 2)), -(-height // 190)), 190 * height)
        video = Video((), height, width, 1.0, tuple(range(number)), number)
        frames_of = torch.empty(1, number, 3, height, width, device="meta")
        wanted = processor.resize(frames_of, SizeDict(**processor.size), None, **stock)
        assert limits.size_of(video) == wanted, video
        assert limits.grid_of(video) == (-(-number // 2), wanted[0] // limits.patch_size, wanted[1] // limits.patch_size)


def test_a_frame_is_bounded_alike_in_every_family(job, tmp_path):
    """video_max_pixels: Qwen2-VL's processor bounds a frame, Qwen3-VL's all frames together."""
    folder = shutil.copytree(job.model_dir, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    lighten(folder)
    film = Video((), 720, 1280, 30.0, tuple(range(4)), 4)  # of more, the tiny Qwen3-VL bounds the whole
    for most in (140_000, 180_000):
        chat = open_chat(folder, video_max_pixels=most)
        height, width = chat.video_limits.size_of(film)
        assert 0.7 * most < height * width <= most
        limited(processor := AutoProcessor.from_pretrained(folder), chat, Reading(video_fps=1.5, video_max_frames=9))
        processor.save_pretrained(tmp_path)
        assert read_video_limits(tmp_path, chat.video_limits.whole) == chat.video_limits
        assert reading_of(tmp_path) == Reading(video_fps=1.5, video_max_frames=9)
    with pytest.raises(UserError, match="video_max_pixels: is 3000, less than the model's own least"):
        open_chat(folder, video_max_pixels=3000)
