"""Pictures as they are seen, against Pillow; and every way in which a file is no picture."""

import json
import os
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from qwenvl_ft.data.meta_file import read_records
from qwenvl_ft.data.pictures import as_seen, load, size_of
from qwenvl_ft.errors import UserError

pytestmark = pytest.mark.filterwarnings("error")


def noise(width: int = 90, height: int = 60) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


def refused(path: Path) -> str:
    """What is said about a file that `size_of` refuses."""
    with pytest.raises(UserError) as error:
        size_of(path, "here")
    (problem,) = error.value.problems
    assert problem.where == "here" and problem.fix
    return problem.what


def png_header(path: Path, width: int, height: int) -> Path:
    """A PNG that promises this size and holds no pixels."""
    chunks = (b"IHDR", struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)), (b"IDAT", b""), (b"IEND", b"")
    packed = (struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(packed))
    return path


def test_a_photo_that_lies_on_its_side_stands_up(tmp_path):
    """Orientation 6: the top of what is seen is the left of what is stored."""
    picture = Image.new("RGB", (60, 40), "white")
    picture.paste("red", (0, 0, 10, 40))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "phone.jpg", exif=exif, quality=100)
    assert size_of(tmp_path / "phone.jpg", "") == (60, 40)
    seen = np.asarray(load(tmp_path / "phone.jpg", "")).astype(int)
    assert seen.shape == (60, 40, 3)
    assert abs(seen[2:8] - [255, 0, 0]).max() < 10 and abs(seen[20:] - 255).max() < 10


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif", "a.avif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_size_and_pixels_turn_as_pillow_turns_them(name, orientation, tmp_path):
    """Of a PNG, a TIFF and an AVIF only the pixels turned: the row was planned for another grid than the picture had."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    noise().save(tmp_path / name, exif=exif)
    with Image.open(tmp_path / name) as picture:
        wanted = ImageOps.exif_transpose(picture).convert("RGB")
    seen = load(tmp_path / name, "")
    assert size_of(tmp_path / name, "") == (seen.height, seen.width) == (wanted.height, wanted.width)
    assert seen.tobytes() == wanted.tobytes()


def test_sixteen_bits_look_like_eight(tmp_path):
    """Pillow's own convert("RGB") cuts 16 bits off at 255: everything but black turns white."""
    grey = np.arange(60 * 90, dtype=np.uint16).reshape(60, 90) % 256
    Image.fromarray(grey * 257).save(tmp_path / "16.png")
    Image.fromarray(grey.astype(np.uint8)).save(tmp_path / "8.png")
    assert load(tmp_path / "16.png", "").tobytes() == load(tmp_path / "8.png", "").tobytes()


def test_a_float_picture_runs_from_zero_to_its_maximum(tmp_path):
    Image.fromarray(np.array([[0, 0.125, 0.25, np.nan, -1]], dtype=np.float32)).save(tmp_path / "f.tif")
    assert np.asarray(load(tmp_path / "f.tif", ""))[0, :, 0].tolist() == [0, 128, 255, 0, 0]


def test_transparency_is_seen_on_white(tmp_path):
    Image.fromarray(np.array([[[255, 0, 0, 255], [255, 0, 0, 0], [0, 0, 0, 51]]], dtype=np.uint8)).save(tmp_path / "a.png")
    assert np.asarray(load(tmp_path / "a.png", "")).tolist() == [[[255, 0, 0], [255, 255, 255], [204, 204, 204]]]


def test_a_transparent_palette_entry_is_seen_on_white(tmp_path):
    picture = Image.new("P", (2, 1))
    picture.putpalette([255, 0, 0, 0, 0, 255])
    picture.putpixel((1, 0), 1)
    for name in ("a.png", "a.gif"):
        picture.save(tmp_path / name, transparency=0)
        assert np.asarray(load(tmp_path / name, "")).tolist() == [[[255, 255, 255], [0, 0, 255]]]


def test_cmyk_and_one_bit_become_rgb(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "ink.tif")
    Image.new("1", (8, 8), 1).save(tmp_path / "fax.png")
    assert [load(tmp_path / name, "").getpixel((3, 3)) for name in ("ink.tif", "fax.png")] == [(255, 0, 0), (255, 255, 255)]


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
@pytest.mark.parametrize("share", [0.3, 0.9, 0.99])
def test_a_file_that_was_cut_off_is_refused_from_its_header_and_tail(name, share, tmp_path):
    noise(200, 200).save(tmp_path / "whole", format={"a.jpg": "JPEG", "a.png": "PNG"}[name])
    whole = (tmp_path / "whole").read_bytes()
    (tmp_path / name).write_bytes(whole[: int(len(whole) * share)])
    assert refused(tmp_path / name) == f"{name} ends before its picture does: the file was cut off"


def test_a_photo_with_a_film_behind_it_is_no_cut_off_file(tmp_path):
    """Phones append megabytes to a JPEG; its end mark is then nowhere near the end of the file."""
    noise().save(tmp_path / "motion.jpg")
    with (tmp_path / "motion.jpg").open("ab") as file:
        file.write(bytes(100_000))
    assert size_of(tmp_path / "motion.jpg", "") == (60, 90)


def test_damaged_data_behind_a_good_header_is_refused_when_it_is_decoded(tmp_path):
    with pytest.raises(UserError, match=r"empty\.png is not a picture that can be read"):
        load(png_header(tmp_path / "empty.png", 50, 40), "here")


def test_what_is_no_picture_is_refused(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("a picture")
    (tmp_path / "folder.png").mkdir()
    assert refused(tmp_path / "empty.png") == "empty.png is empty"
    for name in ("text.png", "folder.png", "missing.png"):
        assert refused(tmp_path / name) == f"{name} is not a picture that can be read"


def test_a_side_may_be_two_hundred_times_the_other_and_no_more(tmp_path):
    """The processors refuse more: smart_resize raises."""
    assert size_of(png_header(tmp_path / "a.png", 1000, 5), "") == (5, 1000)
    assert refused(png_header(tmp_path / "a.png", 5, 1001)) == "a.png is 5 x 1001 px: one side is over 200 times the other"


def test_more_than_a_hundred_megapixels_are_refused_undecoded(tmp_path):
    """Pillow warns from 89 megapixels on and raises from 179 on; neither may reach the user."""
    assert size_of(png_header(tmp_path / "a.png", 10_000, 10_000), "") == (10_000, 10_000)
    assert refused(png_header(tmp_path / "a.png", 10_001, 10_000)) == "a.png has 10001 x 10000 px, more than 100 megapixels"
    assert refused(png_header(tmp_path / "a.png", 50_000, 50_000)) == "a.png has more than 100 megapixels"


@pytest.mark.timeout(20)
def test_a_named_pipe_in_the_folder_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    turns = [{"from": "user", "value": "<img>pipe.png</img>q"}, {"from": "assistant", "value": "a"}]
    (tmp_path / "train.json").write_text(json.dumps([{"conversations": turns}]))
    records, (problem,), _ = read_records(tmp_path / "train.json", tmp_path)
    assert (records, problem.what) == ([], "pipe.png is not a regular file")


def test_a_large_picture_of_16_bits_is_scaled_in_strips():
    """A hundred kilobytes of PNG can be fifty megapixels: several float64 of it would be gigabytes."""
    picture = Image.fromarray(np.full((2000, 4000), 40_000, np.uint16))
    tracemalloc.start()
    seen = as_seen(picture)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seen.getpixel((3999, 1999)) == (156, 156, 156)
    assert peak < 16 * 8_000_000, "one float64 of it has 64 MB, and there were five"
