"""Opens pictures the one way that training, evaluation and answering share.

What is on the screen is what the model sees: EXIF orientation applied, transparency on white, 16 bits scaled to 8.
Stock loaders leave phone photos lying on their side and turn 16-bit pictures white, both without a word.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from qwenvl_ft.data.geometry import MAX_ASPECT, Limits, resized
from qwenvl_ft.data.records import Medium, Picture
from qwenvl_ft.errors import Problem, UserError

MAX_PIXELS = 100_000_000  # a larger picture is taken for a decompression bomb
LARGE_PIXELS = 16_000_000  # of which one at a time is opened for others: its copies take a gigabyte
LARGE = Lock()
STRIP_ROWS = 256  # of a 16-bit picture that are in memory as float64
ORIENTATION = 0x0112
TURN = Image.Transpose
TURNS = {  # by EXIF orientation, as PIL.ImageOps.exif_transpose has them
    2: TURN.FLIP_LEFT_RIGHT, 3: TURN.ROTATE_180, 4: TURN.FLIP_TOP_BOTTOM, 5: TURN.TRANSPOSE,
    6: TURN.ROTATE_270, 7: TURN.TRANSVERSE, 8: TURN.ROTATE_90,
}  # fmt: skip
LIES_ON_ITS_SIDE = (TURN.TRANSPOSE, TURN.ROTATE_270, TURN.TRANSVERSE, TURN.ROTATE_90)
TAIL_BYTES = 4096
# What is opened of the formats that Pillow knows, when a file comes from elsewhere: others run programs (EPS) or are rare.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM", "JPEG2000")
END_MARKS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}


def size_of(path: Path, where: str) -> tuple[int, int]:
    """(height, width) in px as it will be seen, from the header alone. Raises UserError where it cannot become a picture."""
    with _opened(path, where) as picture:
        width, height = picture.size
        mark = END_MARKS.get(picture.format or "")
        sideways = _turn(picture) in LIES_ON_ITS_SIDE
    if width * height > MAX_PIXELS:
        raise UserError(Problem(where, f"{path.name} has {width} x {height} px, more than 100 megapixels", "make it smaller"))
    check_aspect(width, height, where, path.name)
    if mark and not _ends(path, mark):
        what = f"{path.name} ends before its picture does: the file was cut off"
        raise UserError(Problem(where, what, "copy it again from its source"))
    return (width, height) if sideways else (height, width)


def load(path: Path, where: str) -> Image.Image:
    """The picture in RGB, EXIF orientation applied, on white. Raises UserError where its data is damaged."""
    with _opened(path, where) as picture:
        return as_seen(picture)


def opened(picture: Picture, where: str = "") -> Image.Image:
    """The picture in memory, as `load` brings it where it is a file; `where` is named in place of the file's path."""
    return load(picture.source, where or str(picture.source)) if isinstance(picture.source, Path) else picture.source


def decode(data: bytes, where: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """`load` of a file's bytes, with the checks of `size_of` before anything is decoded."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(BytesIO(data), formats=FORMATS) as picture:
                width, height = picture.size
                if width * height > max_pixels:
                    raise UserError(Problem(where, f"has {width} x {height} px, more than {max_pixels:,}", "make it smaller"))
                check_aspect(width, height, where)
                with LARGE if width * height > LARGE_PIXELS else nullcontext():
                    return as_seen(picture)
    except (OSError, ValueError, SyntaxError, RuntimeError, Image.DecompressionBombError) as error:
        raise UserError(Problem(where, "is not a picture that can be read", "send a PNG or a JPEG")) from error


def bounded(part: Medium, limits: Limits) -> Medium:
    """What has bounds of its own, at the size that they give it: whole units, which the processor then leaves alone.

    Raises UserError for bounds that the processor would not leave alone.
    """
    if not (part.min_pixels or part.max_pixels):
        return part
    least, most = max(limits.min_pixels, part.min_pixels or 0), min(part.max_pixels or limits.max_pixels, limits.max_pixels)
    if part.max_pixels and part.max_pixels < least:
        what = f"is {part.max_pixels}, below the least that it may have, {least}"
        raise UserError(Problem(f"a {part.kind}'s max_pixels", what, "raise it, or leave it out"))
    own = replace(limits, min_pixels=min(least, most), max_pixels=most)
    frames = [opened(part)] if isinstance(part, Picture) else part.frames
    height, width = resized(frames[0].height, frames[0].width, own)
    sized = tuple(frame.resize((width, height), Image.Resampling.BICUBIC) for frame in frames)
    return Picture.of(sized[0]) if isinstance(part, Picture) else replace(part, frames=sized)


def check_aspect(width: int, height: int, where: str, name: str = "it") -> None:
    """Raises UserError where one side is so much longer than the other that the processor would refuse the picture."""
    if max(width, height) > MAX_ASPECT * min(width, height):
        what = f"{name} is {width} x {height} px: one side is over {MAX_ASPECT} times the other"
        raise UserError(Problem(where, what, "crop it or pad it"))


def as_seen(picture: Image.Image) -> Image.Image:
    """An open picture as RGB. 16-bit grey is scaled by its depth; a float picture is taken to run from 0 to its maximum."""
    turn = _turn(picture)
    picture.load()
    if turn is not None:
        picture = picture.transpose(turn)
    if picture.mode.startswith("I;16"):
        picture = picture.convert("I")
    if picture.mode in ("I", "F"):
        values = np.asarray(picture)
        grey = np.empty(values.shape, np.uint8)
        rows = [slice(start, start + STRIP_ROWS) for start in range(0, len(values), STRIP_ROWS)]
        top = 65535.0 if picture.mode == "I" else max(1e-9, *(float(_finite(values[some]).max()) for some in rows))
        for some in rows:
            grey[some] = np.clip(_finite(values[some]) * (255 / top), 0, 255).round()
        picture = Image.fromarray(grey)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        paper = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(paper, picture)
    return picture.convert("RGB")


def _finite(values: NDArray[Any]) -> NDArray[np.float64]:
    """In float64; one NaN would turn all of a picture black."""
    return np.nan_to_num(values.astype(np.float64), posinf=0, neginf=0)


@contextmanager
def _opened(path: Path, where: str) -> Iterator[Image.Image]:
    """The picture, undecoded. Pillow warns above 89 megapixels and refuses above 178; MAX_PIXELS, between them, is our own."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as picture:
                yield picture
    except Image.DecompressionBombError as error:
        raise UserError(Problem(where, f"{path.name} has more than 100 megapixels", "make it smaller")) from error
    except (OSError, ValueError, SyntaxError, RuntimeError) as error:  # RuntimeError: a damaged AVIF
        if path.is_file() and path.stat().st_size == 0:
            raise UserError(Problem(where, f"{path.name} is empty", "copy it again from its source")) from error
        fix = "open it in a viewer; save it again as PNG or JPEG"
        raise UserError(Problem(where, f"{path.name} is not a picture that can be read", fix)) from error


def _turn(picture: Image.Image) -> Image.Transpose | None:
    """How an undecoded picture must be turned. Of a TIFF Pillow itself turns the size when it opens, the pixels when it decodes."""
    if picture.format == "TIFF":
        return None
    # Not picture.getexif(): of a PNG without EXIF that decodes the whole picture, to look for some behind it.
    return TURNS.get(Image.Image.getexif(picture).get(ORIENTATION, 1))


def _ends(path: Path, mark: bytes) -> bool:
    """Whether a file is whole: its end mark near its end, or else it decodes (phones append videos and depth maps to photos)."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        if mark in file.read():
            return True
    try:
        load(path, "")
    except UserError:
        return False
    return True
