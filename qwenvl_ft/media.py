"""Opens pictures the one way that training, evaluation and answering share.

What is on the screen is what the model sees: EXIF orientation applied, transparency on white, 16 bits scaled to 8.
Stock loaders leave phone photos lying on their side and turn 16-bit pictures white, both without a word.
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.geometry import MAX_ASPECT

MAX_PIXELS = 100_000_000  # a larger picture is taken for a decompression bomb
ORIENTATION = 0x0112
LIES_ON_ITS_SIDE = (5, 6, 7, 8)
TAIL_BYTES = 4096
END_MARKS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}
Image.MAX_IMAGE_PIXELS = None  # ours is checked from the header, before anything is decoded


def size_of(path: Path, where: str) -> tuple[int, int]:
    """(height, width) in px as it will be seen, from the header alone. Raises UserError where it cannot become a picture."""
    try:
        with Image.open(path) as picture:
            width, height = picture.size
            kind = picture.format
            # Only these keep their orientation where it can be read without decoding the picture.
            sideways = kind in ("JPEG", "MPO", "WEBP", "TIFF") and picture.getexif().get(ORIENTATION) in LIES_ON_ITS_SIDE
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(_unreadable(path, where)) from error
    if width * height > MAX_PIXELS:
        raise UserError(Problem(where, f"{path.name} has {width} x {height} px, more than 100 megapixels", "make it smaller"))
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise UserError(Problem(where, f"{path.name} is {width} x {height} px: one side is over {MAX_ASPECT} times the other",
                                "crop it or pad it"))  # fmt: skip
    if (mark := END_MARKS.get(kind or "")) and mark not in _tail(path):
        raise UserError(
            Problem(where, f"{path.name} ends before its picture does: the file was cut off", "copy it again from its source")
        )
    return (width, height) if sideways else (height, width)


def load(path: Path, where: str) -> Image.Image:
    """The picture in RGB, EXIF orientation applied, on white. Raises UserError where its data is damaged."""
    try:
        with Image.open(path) as picture:
            return as_seen(picture)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(_unreadable(path, where)) from error


def as_seen(picture: Image.Image) -> Image.Image:
    """An open picture as RGB. 16-bit grey is scaled by its depth; a float picture is taken to run from 0 to its maximum."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I;16"):
        picture = picture.convert("I")
    if picture.mode in ("I", "F"):
        values = np.asarray(picture, dtype=np.float64)
        top = 65535.0 if picture.mode == "I" else max(float(values.max()), 1e-9)
        picture = Image.fromarray(np.clip(values * (255 / top), 0, 255).round().astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        paper = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(paper, picture)
    return picture.convert("RGB")


def _tail(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        return file.read()


def _unreadable(path: Path, where: str) -> Problem:
    if path.stat().st_size == 0:
        return Problem(where, f"{path.name} is empty", "copy it again from its source")
    return Problem(where, f"{path.name} is not a picture that can be read", "open it in a viewer; save it again as PNG or JPEG")
