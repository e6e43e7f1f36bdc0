"""Pictures as they are seen, against Pillow; and every way in which a file is no picture."""

import json
import os
import signal
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from qwenvl_ft.data.magic import what_it_is
from qwenvl_ft.data.meta_file import read_records
from qwenvl_ft.data.pictures import PictureChanged, _opened, as_seen, decode, load, opened, size_of
from qwenvl_ft.data.records import Picture
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


def tiff(path: Path, values: np.ndarray, bits: int, kind: int, white: int = 1) -> Path:
    """A grey TIFF of one strip; `kind` 1 is unsigned, 2 signed, 3 float; `white` 0: zero is white."""
    (height, width), data = values.shape, values.tobytes()
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: white, 273: 8, 277: 1, 278: height, 279: len(data), 339: kind}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    path.write_bytes(b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4))
    return path


def grey(path: Path) -> list[int]:
    """The first row of a picture that is grey, as it is seen."""
    seen = np.asarray(load(path, ""))
    assert (seen == seen[:, :, :1]).all()
    return seen[0, :, 0].tolist()


@pytest.mark.parametrize("dtype", ["<i4", "<u4"])
def test_a_ramp_of_32_bits_is_a_ramp_and_neither_white_nor_black(dtype, tmp_path):
    """Its values were taken for 16 bits: all but two of them came out white."""
    down, right = np.mgrid[:64, :96]
    seen = np.asarray(load(tiff(tmp_path / "a.tif", (3840 * down + 40 * right).astype(dtype), 32, 2 if "i" in dtype else 1), ""))
    wanted = np.round((3840 * down + 40 * right) * 255 / 245720)
    assert (seen[:, :, 0] == wanted).all() and len(np.unique(seen)) == 256


@pytest.mark.parametrize(
    ("values", "dtype", "bits", "kind", "wanted"),
    [
        ([0, 2**31, 2**32 - 1], "<u4", 32, 1, [0, 128, 255]),  # Pillow reads the last two as negative
        ([0, 51, 255], "<i4", 32, 2, [0, 51, 255]),
        ([0, 500, 1000], "<i4", 32, 2, [0, 128, 255]),
        ([-1000, 0, 1000, 3000], "<i4", 32, 2, [0, 64, 128, 255]),
        ([-1024, 0, 3072], "<i2", 16, 2, [0, 64, 255]),  # a CT's, in Hounsfield units
        ([-2, -1, 1], "<i1", 8, 2, [0, 85, 255]),
        ([-3, -2, -1], "<i4", 32, 2, [0, 128, 255]),
        ([0, 0, 0], "<i4", 32, 2, [0, 0, 0]),
        ([-80, -40, 0], "<f4", 32, 3, [0, 128, 255]),  # decibels: all of it was black
        ([0, 4095, 65535], "<u2", 16, 1, [0, 16, 255]),  # 12 bits in a file that says 16 are not brightened
    ],
)
def test_values_outside_8_bits_are_scaled_by_their_depth_or_by_what_they_hold(values, dtype, bits, kind, wanted, tmp_path):
    assert grey(tiff(tmp_path / "a.tif", np.array([values]).astype(dtype), bits, kind)) == wanted


def test_a_file_of_12_bits_is_scaled_by_12_bits(tmp_path):
    """It was scaled as if it had 16, to almost black: two values of 12 bits are three bytes."""
    packed = np.frombuffer(b"\x00\x07\xff" + b"\xff\xf0\x00", np.uint8)[None]
    path = tiff(tmp_path / "a.tif", packed, 12, 1)
    content = bytearray(path.read_bytes())
    at = content.index(struct.pack("<HHII", 256, 4, 1, 6))
    content[at : at + 12] = struct.pack("<HHII", 256, 4, 1, 4)
    path.write_bytes(content)
    assert grey(path) == [0, 127, 255, 0]


def test_where_zero_is_white_it_is_white_above_8_bits_too(tmp_path):
    """Pillow turns round 1 to 8 bits and leaves 16 bits and floats as they are: scans came as negatives."""
    assert grey(tiff(tmp_path / "a.tif", np.array([[0, 65535]], "<u2"), 16, 1, white=0)) == [255, 0]
    assert grey(tiff(tmp_path / "b.tif", np.array([[0, 2]], "<f4"), 32, 3, white=0)) == [255, 0]
    assert grey(tiff(tmp_path / "c.tif", np.array([[0, 255]], "<u1"), 8, 1, white=0)) == [255, 0]


def test_depths_that_pillow_scales_itself_stay_as_it_has_them(tmp_path):
    for most in (1023, 4095, 65535):
        (tmp_path / "a.pgm").write_bytes(b"P5 3 1 %d\n" % most + struct.pack(">3H", 0, most // 5, most))
        assert grey(tmp_path / "a.pgm") == [0, 51, 255]
    Image.fromarray(np.array([[0, 13107, 65535]] * 8, np.uint16)).save(tmp_path / "a.jp2")
    assert grey(tmp_path / "a.jp2") == [0, 51, 255]


def test_the_hidden_value_of_a_16_bit_png_is_white(tmp_path):
    raw = zlib.compress(b"\0" + struct.pack(">3H", 0, 300, 65535))
    chunks = (
        (b"IHDR", struct.pack(">2I5B", 3, 1, 16, 0, 0, 0, 0)),
        (b"tRNS", struct.pack(">H", 300)),
        (b"IDAT", raw),
        (b"IEND", b""),
    )
    packed = (struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks)
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(packed))
    assert grey(tmp_path / "a.png") == [0, 255, 255]


def test_a_picture_of_every_mode_is_seen(tmp_path):
    """Grey with alpha that is multiplied in already, as some TIFFs have it, was called unreadable."""
    modes = "1 L P RGB RGBA CMYK YCbCr LAB HSV I F LA PA RGBX RGBa La I;16 I;16L I;16B I;16N".split()
    assert {as_seen(Image.new(mode, (4, 3))).mode for mode in modes} == {"RGB"}
    red = Image.new("RGB", (8, 8), (200, 30, 40))
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    ImageCms.profileToProfile(red, *profiles, outputMode="LAB").save(tmp_path / "lab.tif")
    assert np.abs(np.asarray(load(tmp_path / "lab.tif", "")).astype(int) - [200, 30, 40]).max() <= 3


@pytest.mark.parametrize("name", ["a.tga", "a.ico", "a.pcx", "a.sgi", "a.dds", "a.eps"])
def test_training_opens_no_more_formats_than_the_server(name, tmp_path):
    """A meta-file could name an EPS, which Pillow hands to Ghostscript; and a model was trained on what it cannot be asked about."""
    noise(64, 64).save(tmp_path / name)
    assert refused(tmp_path / name).startswith(f"{name} is ")
    with pytest.raises(UserError) as error:
        decode((tmp_path / name).read_bytes(), "here")
    assert f"{name} {error.value.problems[0].what}" == refused(tmp_path / name)


NOT_PICTURES = {
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 12345\n": ("a git-lfs pointer", "git lfs pull"),
    b"<!DOCTYPE html>\n<html><body>404</body></html>": ("an HTML page", "download"),
    b"\xef\xbb\xbf\n <?xml version='1.0'?><!-- x -->\n<HTML>": ("an HTML page", "download"),
    b'<?xml version="1.0"?>\n<!-- Inkscape -->\n<svg xmlns="http://www.w3.org/2000/svg">': ("an SVG drawing", "PNG"),
    b"<svg/>": ("an SVG drawing", "PNG"),
    b"\0\0\0\x18ftypheic\0\0\0\0mif1heic": ("an HEIC photo", "JPEG"),
    b"\0\0\0\x20ftypisom\0\0\2\0isomiso2": ("a video", "frame"),
    b"\x1aE\xdf\xa3\x01\0\0\0": ("a video", "frame"),
    b"RIFF\0\0\0\0AVI LIST": ("a video", "frame"),
    b"%PDF-1.7\n": ("a PDF", "page"),
    b"8BPS\0\1": ("a Photoshop file", "PNG"),
    b"PK\x03\x04\x14\0": ("a zip archive, or a file that is one, such as .xlsx", "unpack"),
    b'{"error": "not found"}': ("JSON text", "download"),
    bytes(500): ("nothing but zero bytes", "copy"),
}


@pytest.mark.parametrize("content", NOT_PICTURES, ids=lambda content: content[:24].hex())
@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_a_file_that_is_no_picture_is_named_as_what_it_is(name, content, tmp_path):
    """All of them were to be opened in a viewer."""
    (tmp_path / name).write_bytes(content)
    what, fix = NOT_PICTURES[content]
    for look in (lambda: size_of(tmp_path / name, "here"), lambda: decode(content, "here")):
        with pytest.raises(UserError) as error:
            look()
        (problem,) = error.value.problems
        assert problem.what.endswith(f"is {what}, not a picture") and fix in problem.fix


@pytest.mark.timeout(20)
def test_no_first_bytes_take_long_to_look_at():
    for head in (
        b"\n" * 4096,
        b"<!--" * 1024,
        b"<?xml " * 600,
        b"<!---->" * 500,
        b"\n<?xml>" * 500,
        b"{" * 4096,
        bytes(4095) + b"x",
    ):
        what_it_is(head)


def test_a_picture_that_a_phone_wrote_in_two_is_cut_off_where_it_is(tmp_path):
    """With a second picture behind it Pillow calls it MPO, of which no end was looked for."""
    noise(200, 200).save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[noise(100, 100)])
    assert size_of(tmp_path / "a.jpg", "") == (200, 200)
    whole = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(whole[: len(whole) // 3])
    assert refused(tmp_path / "a.jpg") == "a.jpg ends before its picture does: the file was cut off"


def test_a_picture_that_changed_since_its_header_was_read_is_named_so(tmp_path):
    """Deleted, it was "not a picture that can be read"; replaced by another of its size, the row was trained with that."""

    def said() -> str:
        with pytest.raises(PictureChanged) as error:
            opened(picture, "train.json[0]")
        (problem,) = error.value.problems
        assert problem.where == "train.json[0]" and "put it back" in problem.fix
        return problem.what.removeprefix("since the records were read it changed: ")

    path = tmp_path / "a.png"
    noise().save(path)
    whole = path.read_bytes()
    picture = Picture(path, 60, 90, num_bytes=len(whole))
    assert opened(picture).size == (90, 60)
    noise(64, 64).save(path)
    assert said() == "a.png was 90 x 60 px and is 64 x 64 px"
    Image.new("RGB", (90, 60)).save(path)
    assert said() == "a.png is another file of the same size in px"
    path.write_bytes(whole[:2000])
    assert said() == "a.png is not a picture that can be read: it breaks while it is decoded"
    path.unlink()
    assert said() == "a.png is gone"
    path.write_bytes(whole)
    assert opened(picture).size == (90, 60)


@pytest.mark.parametrize("size", [1, 400])
def test_a_damaged_png_is_refused_wherever_the_damage_is(size, tmp_path):
    """Pillow decodes without a look at the check sums: of a chart whose second half was zeros the rest came out, without a word."""
    for path in (Path("data/sample/images") / name for name in ("two_col_103562.png", "two_col_2954.png", "mountains_m.png")):
        content = bytearray(path.read_bytes())
        at = content.index(b"IDAT") + 200
        content[at : at + size] = bytes([content[at] ^ 1]) if size == 1 else bytes(size)
        (tmp_path / path.name).write_bytes(content)
        assert size_of(tmp_path / path.name, "")
        for look in (lambda path=tmp_path / path.name: load(path, ""), lambda content=bytes(content): decode(content, "")):
            with pytest.raises(UserError, match="breaks while it is decoded"):
                look()


def test_a_killed_worker_is_not_taken_for_a_damaged_picture(tmp_path):
    """torch says of one in a handler of SIGCHLD, which may come while the main process decodes a picture."""
    noise().save(tmp_path / "a.png")
    before = signal.getsignal(signal.SIGCHLD)

    def say(number, frame):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    def killed(picture):
        os.kill(os.getpid(), signal.SIGCHLD)
        return picture.convert("RGB")

    signal.signal(signal.SIGCHLD, say)
    try:
        with pytest.raises(RuntimeError, match="pid 7"), _opened(tmp_path / "a.png", "here", "a.png") as picture:
            killed(picture)
    finally:
        signal.signal(signal.SIGCHLD, before)
