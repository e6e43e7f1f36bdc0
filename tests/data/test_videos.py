"""Odd films, made with PyAV here: as planned from their packets, or refused in words; frames against PyAV's own decoding."""

import threading
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image
from qwen_vl_utils import vision_process

from qwenvl_ft.data import videos
from qwenvl_ft.data.pictures import PictureChanged
from qwenvl_ft.data.reading import AS_FOUND, Reading
from qwenvl_ft.data.videos import Drawing, frames, measured
from qwenvl_ft.errors import UserError
from tests import films
from tests.films import ONE, write

H264 = {"codec": "libx264"}
# name -> how it is written; each has 20 frames at 10 a second unless it says so.
GOOD = {
    "phone.mp4": H264, "bframes.mp4": H264 | {"options": {"bf": "3"}}, "bframes.avi": H264 | {"options": {"bf": "2"}},
    "old.avi": {"codec": "mpeg4", "options": {"bf": "2"}}, "hevc.mp4": {"codec": "libx265", "options": {"x265-params": "log-level=0"}},
    "av1.mp4": {"codec": "libsvtav1", "size": (128, 96)}, "vp8.webm": {"codec": "libvpx"},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"auto-alt-ref": "1", "lag-in-frames": "16"}},
    "a.mkv": H264, "broadcast.ts": H264, "old.mpg": {"codec": "mpeg2video", "rate": 25}, "old.flv": {"codec": "flv"},
    "old.wmv": {"codec": "wmv2"}, "camera.avi": {"codec": "mjpeg", "pix": "yuvj420p"}, "screen.gif": {"codec": "gif", "pix": "rgb8"},
    "ntsc.mp4": {"rate": Fraction(24000, 1001)}, "slow.mp4": {"rate": Fraction(1, 5)}, "fast.mp4": {"rate": 240, "count": 60},
    "two.mp4": {"count": 2}, "three.mp4": {"count": 3}, "1.mp4:2.mp4": {},
}  # fmt: skip


def measured_and_drawn(path, options=None):
    film = measured(path, "here", options)
    return film, frames(film, lambda image: image)


@pytest.mark.parametrize("name", GOOD)
def test_a_film_is_drawn_as_it_was_planned(name, tmp_path):
    settings = dict(GOOD[name])
    path = write(tmp_path / ("a:b.mp4" if ":" in name else name), **settings)
    with av.open(f"file:{path}") as container:
        decoded = [frame.to_image() for frame in container.decode(video=0)]
        rate = float(container.streams.video[0].average_rate)
    film, images = measured_and_drawn(path)
    assert (film.num_frames, film.width, film.height) == (len(decoded), *decoded[0].size) and film.fps == pytest.approx(rate)
    number = vision_process.smart_nframes({}, len(decoded), rate)
    assert film.indices == tuple(np.linspace(0, len(decoded) - 1, number).round().astype(int).tolist())
    assert all(image.tobytes() == decoded[at].tobytes() for image, at in zip(images, film.indices, strict=True))


MATRICES = {  # (a, b, c, d), and where the mark that is at the top left then is: left or right, top or bottom
    (0, ONE, -ONE, 0): (1, 0), (-ONE, 0, 0, -ONE): (1, 1), (0, -ONE, ONE, 0): (0, 1), (-ONE, 0, 0, ONE): (1, 0),
}  # fmt: skip


@pytest.mark.parametrize("matrix", MATRICES)
def test_a_phones_film_is_planned_upright_as_it_is_shown(matrix, tmp_path):
    film, images = measured_and_drawn(films.turned(write(tmp_path / "phone.mp4"), *matrix))
    right, bottom = MATRICES[matrix]
    for image in images:
        assert image.size == (film.width, film.height) == ((112, 84) if matrix[0] else (84, 112))
        seen = np.asarray(image.convert("L"))
        assert seen[-1 if bottom else 0, -1 if right else 0] > 150 > seen[0 if bottom else -1, 0 if right else -1]


@pytest.mark.parametrize("codec", ["libx264", "libvpx-vp9"])
def test_a_film_of_uneven_times_shows_what_is_on_the_screen_at_each(codec, tmp_path):
    """By their places, frames of a screen recording stand at the wrong seconds: one second may hold a frame, the next thirty."""
    times = [0, 100, 200, 300, 400, 3000, 3100, 3200, 3300, 4000]
    path = write(tmp_path / f"screen.{'mp4' if codec == 'libx264' else 'webm'}", 10, codec, at=lambda number: times[number])
    film, images = measured_and_drawn(path, {"nframes": 10})
    assert (film.num_frames, film.fps) == (10, pytest.approx(9 / 4, rel=1e-3))
    shown = [max(at for at, begins in enumerate(times) if begins <= index / film.fps * 1000 + 1) for index in film.indices]
    assert [films.number_of(image) for image in images] == pytest.approx(shown, abs=0.5) and shown != list(film.indices)


@pytest.mark.parametrize("first", [3, 10])
def test_a_film_that_an_edit_list_shortens_is_planned_as_it_is_shown(first, tmp_path):
    path = write(tmp_path / "film.mp4")
    with av.open(str(path)) as container:
        ticks = round(1 / container.streams.video[0].time_base / 10)
    film, images = measured_and_drawn(films.boxes(path, b"elst", 8, ">Ii", 2000 - 100 * first, first * ticks))
    assert film.num_frames == 20 - first == film.indices[-1] + 1
    assert [films.number_of(image) - first for image in images] == pytest.approx(film.indices, abs=1)


def bad(tmp_path):
    def front(name):
        return films.moved_to_front(write(tmp_path / "whole.mp4", codec="libx264"), tmp_path / name)

    made = {
        "cut.mp4": lambda name: films.cut(front(name), 0.6), "no index.mp4": lambda name: films.cut(write(tmp_path / name), 0.5),
        "cut.avi": lambda name: films.cut(write(tmp_path / name, codec="mjpeg", pix="yuvj420p"), 0.5),
        "one.mp4": lambda name: write(tmp_path / name, 1), "sound.m4a": lambda name: films.sound(tmp_path / name),
        "askew.mp4": lambda name: films.turned(write(tmp_path / name), ONE, ONE, -ONE, ONE),
        "sizes.avi": lambda name: films.of_sizes(tmp_path / name, [(64, 48)] * 4 + [(128, 96)] * 4),
        "strip.avi": lambda name: films.of_sizes(tmp_path / name, [(4096, 16)] * 4, "png"),
        "empty.mp4": lambda name: films.cut(write(tmp_path / name), 0), "text.mp4": lambda name: said(tmp_path / name, "hello"),
        "list.m3u8": lambda name: said(tmp_path / name, f"#EXTM3U\n#EXTINF:2,\n{write(tmp_path / 'part.ts', codec='libx264')}\n"),
        "parts.ffconcat": lambda name: said(tmp_path / name, f"ffconcat version 1.0\nfile {write(tmp_path / 'part.mp4').name}\n"),
        "frame.png": lambda name: png(tmp_path / name), "damaged.mp4": lambda name: overwritten(write(tmp_path / name, **H264)),
    }  # fmt: skip
    return made


def said(path, text):
    path.write_text(text)
    return path


def png(path):
    Image.new("RGB", (64, 64)).save(path)
    return path


def overwritten(path):
    """Its frames are not what they were, its index is."""
    content = bytearray(path.read_bytes())
    start = content.index(b"mdat") + 4
    content[start + 200 : start + 2000] = b"\xff" * 1800
    path.write_bytes(content)
    return path


BAD = {
    "cut.mp4": "the file was cut off", "no index.mp4": "not a video that can be read", "cut.avi": "the file was cut off",
    "one.mp4": "has 1 frames", "sound.m4a": "holds no pictures", "askew.mp4": "no quarter of a circle", "sizes.avi": "several sizes",
    "strip.avi": "over 200 times", "empty.mp4": "not a video", "text.mp4": "not a video", "list.m3u8": "not a video",
    "parts.ffconcat": "not a video", "frame.png": "not a video", "damaged.mp4": "ends after|not a video|no frame",
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_drawn_is_refused_in_words(name, tmp_path):
    path = bad(tmp_path)[name](name)
    with pytest.raises(UserError, match=BAD[name]) as error:
        measured_and_drawn(path)
    (problem,) = error.value.problems
    assert problem.where in ("here", name) and problem.fix


def test_a_film_cut_where_nothing_says_so_is_drawn_as_far_as_it_goes(tmp_path):
    film, images = measured_and_drawn(films.cut(write(tmp_path / "live.ts", codec="libx264"), 0.6))
    assert 2 <= film.num_frames < 20 and [films.number_of(image) for image in images] == pytest.approx(film.indices, abs=1)


@pytest.mark.parametrize("seed", range(6))
def test_a_film_with_bytes_changed_is_drawn_or_refused(seed, tmp_path):
    random = np.random.default_rng(seed)
    for name in ("a.mp4", "a.webm", "a.avi", "a.gif"):
        codec = {"mp4": H264, "webm": {"codec": "libvpx"}, "avi": {}, "gif": {"codec": "gif", "pix": "rgb8"}}[name[2:]]
        content = bytearray(write(tmp_path / name, 8, **codec).read_bytes())
        for at in random.integers(0, len(content), 12):
            content[at] = random.integers(256)
        (tmp_path / name).write_bytes(content)
        try:
            film, images = measured_and_drawn(tmp_path / name)
        except UserError as error:
            assert all(problem.what and problem.fix for problem in error.problems)
        else:
            assert len(images) == len(film.indices) and {image.size for image in images} == {(film.width, film.height)}


def test_a_list_of_frames_is_a_film_at_its_rate(tmp_path):
    paths = [tmp_path / f"{number}.png" for number in range(5)]
    for number, path in enumerate(paths):
        Image.fromarray(films.picture(number)).save(path)
    film = measured(paths, "here", {"fps": 1, "max_pixels": 50_000})
    assert (film.source, film.height, film.width, film.fps, film.indices, film.num_frames, film.max_pixels) == (
        tuple(paths), 84, 112, 1.0, (0, 1, 2, 3, 4), 5, 50_000
    )  # fmt: skip
    assert [films.number_of(image) for image in frames(film, lambda image: image)] == [0, 1, 2, 3, 4]
    Image.new("RGB", (64, 64)).save(paths[3])
    with pytest.raises(UserError, match="frames of several sizes: 112 x 84, 64 x 64 px"):
        measured(paths, "here")
    with pytest.raises(PictureChanged, match=r"3\.png was 112 x 84 px and is 64 x 64 px"):
        frames(film, lambda image: image)
    for few in ([], paths[:1], paths[:3] * 2):
        with pytest.raises(UserError, match=f"has {len(few)} frames"):
            measured(few, "here", reading=Reading(video_max_frames=4))


@pytest.mark.parametrize(("options", "complaint"), [
    ({"fps": 0}, "is no rate"), ({"fps": True}, "is no rate"), ({"nframes": 30}, "it has 20 frames"), ({"fps": 1, "nframes": 4}, "fps and"),
    ({"max_frames": 1}, "drawn at most"), ({"max_pixels": 0}, "whole number of pixels"), ({"speed": 2}, 'has "speed"'),
])  # fmt: skip
def test_options_that_mean_nothing_are_named(options, complaint, tmp_path):
    with pytest.raises(UserError, match=complaint):
        measured(write(tmp_path / "a.mp4"), "here", options)


@pytest.mark.parametrize("reading", [Reading(video_fps=5.0), Reading(video_max_frames=6), AS_FOUND])
def test_the_config_says_how_many_frames_where_the_record_does_not(reading, tmp_path):
    path = write(tmp_path / "a.mp4", 60)
    drawn = {"fps": reading.video_fps, "max_frames": reading.video_max_frames}
    assert len(measured(path, "here", reading=reading).indices) == vision_process.smart_nframes(drawn, 60, 10.0)
    assert len(measured(path, "here", {"fps": 1.0}, reading).indices) == 6
    assert len(measured(path, "here", {"nframes": 8}, reading).indices) == 8


@pytest.mark.parametrize("total", [2, 3, 5, 40, 1801, 20_000])
def test_the_number_of_frames_is_that_of_qwen_vl_utils(total):
    for rate in (0.2, 10.0, 23.976, 240.0):
        for drawn in ({}, {"fps": 0.3}, {"fps": 60.0}, {"max_frames": 7}, {"fps": 1.0, "max_frames": 64}):
            assert Drawing.of(drawn, "here").number(total, rate, "here") == vision_process.smart_nframes(drawn, total, rate)


def test_a_film_that_changed_since_it_was_measured_is_another(tmp_path):
    path = write(tmp_path / "a.mp4")
    film = measured(path, "here")
    write(path, 30)
    with pytest.raises(PictureChanged, match="since the records were read it changed"):
        frames(film, lambda image: image)
    path.unlink()
    with pytest.raises(PictureChanged, match=r"a\.mp4 is gone"):
        frames(film, lambda image: image)


def test_a_decoder_that_does_not_come_to_an_end_is_left_and_named(tmp_path, monkeypatch):
    film = measured(write(tmp_path / "a.mp4"), "here")
    monkeypatch.setattr(videos, "MOST_SECONDS", 0.5)
    released = threading.Event()
    with pytest.raises(UserError, match=r"a\.mp4: did not come to an end in 0\.5 seconds"):
        frames(film, lambda image: released.wait())
    released.set()


def test_only_the_wanted_frames_are_kept_and_made_pictures_of(tmp_path, monkeypatch):
    """All of a film's frames were decoded to pictures, and the wanted ones in memory at once, in full size."""
    film = measured(write(tmp_path / "a.mp4", 60), "here", {"nframes": 6})
    made = []
    upright = videos._upright
    monkeypatch.setattr(videos, "_upright", lambda frame, where: (made.append(frame.pts), upright(frame, where))[1])
    assert frames(film, lambda image: len(made)) == [1, 2, 3, 4, 5, 6]
