"""Opens pictures the one way that training, evaluation and answering share.

What is on the screen is what the model sees: EXIF orientation applied, transparency on white, more than 8 bits scaled to 8.
Stock loaders leave phone photos lying on their side and turn 16-bit pictures white, both without a word.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from io import SEEK_END, BytesIO
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from qwenvl_ft.data import sources
from qwenvl_ft.data.geometry import MAX_ASPECT, Limits, resized
from qwenvl_ft.data.magic import HEAD_BYTES, what_it_is
from qwenvl_ft.data.records import Picture, Source
from qwenvl_ft.errors import Problem, UserError

MAX_PIXELS = 100_000_000  # a larger picture is taken for a decompression bomb
LARGE_PIXELS = 16_000_000  # of which one at a time is opened for others: its copies take a gigabyte
LARGE = Lock()
STRIP_ROWS = 256  # of a picture of more than 8 bits that are in memory as float64
ORIENTATION = 0x0112
TIFF_BITS, TIFF_WHITE, TIFF_KIND = 258, 262, 339  # its tags: bits a sample, what white is, the samples' kind
TIFF_WHITE_IS_ZERO, TIFF_SIGNED = 0, 2
TURN = Image.Transpose
TURNS = {  # by EXIF orientation, as PIL.ImageOps.exif_transpose has them
    2: TURN.FLIP_LEFT_RIGHT, 3: TURN.ROTATE_180, 4: TURN.FLIP_TOP_BOTTOM, 5: TURN.TRANSPOSE,
    6: TURN.ROTATE_270, 7: TURN.TRANSVERSE, 8: TURN.ROTATE_90,
}  # fmt: skip
LIES_ON_ITS_SIDE = (TURN.TRANSPOSE, TURN.ROTATE_270, TURN.TRANSVERSE, TURN.ROTATE_90)
TAIL_BYTES = 4096  # of a file, in which its end mark stands
# What is opened of the formats that Pillow knows, in training as in serving: others run programs (EPS) or are rare.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM", "JPEG2000")
OPENED = f"{', '.join(FORMATS)} are opened"
END_MARKS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}  # MPO: a phone's JPEG with a second one behind it


class PictureChanged(UserError):
    """A picture is not the one whose header was read: what was planned with it cannot be done any more, nor done again."""


def size_of(source: Source, where: str) -> tuple[int, int]:
    """(height, width) in px as it will be seen, from the header alone. Raises UserError where it cannot become a picture."""
    file = _file(source, where)
    with _opened(file, where, source.name) as picture:
        width, height = picture.size
        mark = END_MARKS.get(picture.format or "")
        sideways = _turn(picture) in LIES_ON_ITS_SIDE
    if width * height > MAX_PIXELS:
        raise UserError(Problem(where, f"{source.name} has {width} x {height} px, more than 100 megapixels", "make it smaller"))
    check_aspect(width, height, where, source.name)
    if mark and not _ends(file, mark):
        what = f"{source.name} ends before its picture does: the file was cut off"
        raise UserError(Problem(where, what, "copy it again from its source"))
    return (width, height) if sideways else (height, width)


def load(source: Source, where: str) -> Image.Image:
    """The picture in RGB, EXIF orientation applied, on white. Raises UserError where its data is damaged."""
    return _load(_file(source, where), where, source.name)


def _load(file: Path | BytesIO, where: str, name: str) -> Image.Image:
    with _opened(file, where, name) as picture:
        _check_sums(picture, file)
        return as_seen(picture)


def _file(source: Source, where: str) -> Path | BytesIO:
    """What Pillow opens."""
    try:
        return sources.opened(source)
    except OSError as error:  # of a tar or a table, which are read here
        what = f"cannot be read from {sources.holder(source).name}: {error.strerror or error}"
        raise UserError(Problem(where, f"{source.name} {what}", "copy that file again from its source")) from error


def opened(picture: Picture, where: str = "") -> Image.Image:
    """The picture in memory, as `load` brings it where it is a file; `where` is named in place of the file's path.

    Raises UserError where its data is damaged, PictureChanged where the file is gone or another than was planned with.
    """
    source = picture.source
    if isinstance(source, Image.Image):
        return source
    where, changed = where or sources.place(source), ""
    try:
        image = load(source, where)
    except UserError as error:
        if not (holder := sources.holder(source)).is_file():
            changed = f"{holder.name} is gone"
        elif _is_bad(source):  # its header could be read before
            changed = error.problems[0].what
        if not changed:
            raise
    else:
        if image.size != (picture.width, picture.height):
            changed = f"{source.name} was {picture.width} x {picture.height} px and is {image.width} x {image.height} px"
        elif picture.num_bytes is not None and picture.num_bytes != sources.num_bytes(source):
            changed = f"{source.name} is another file of the same size in px"
        if not changed:
            return image
    raise PictureChanged(
        Problem(where, f"since the records were read it changed: {changed}", "put it back as it was and go on, or start again")
    )


def _is_bad(source: Source) -> bool:
    try:
        size_of(source, "")
    except UserError:
        return True
    return False


def decode(data: bytes, where: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """`load` of a file's bytes, with the checks of `size_of` before anything is decoded."""
    file = BytesIO(data)
    with _opened(file, where, "") as picture:
        width, height = picture.size
        if width * height > max_pixels:
            raise UserError(Problem(where, f"has {width} x {height} px, more than {max_pixels:,}", "make it smaller"))
        check_aspect(width, height, where)
        with LARGE if width * height > LARGE_PIXELS else nullcontext():
            _check_sums(picture, file)
            return as_seen(picture)


def bounded(picture: Picture, limits: Limits) -> Picture:
    """A picture with bounds of its own, at the size that they give it: whole units, which whoever knows `limits` only leaves alone.

    Raises UserError for bounds that the limits would override.
    """
    if not (picture.min_pixels or picture.max_pixels):
        return picture
    height, width = resized(picture.height, picture.width, limits.of(picture))
    return Picture.of(opened(picture).resize((width, height), Image.Resampling.BICUBIC))


def check_aspect(width: int, height: int, where: str, name: str = "it") -> None:
    """Raises UserError where one side is so much longer than the other that the processor would refuse the picture."""
    if max(width, height) > MAX_ASPECT * min(width, height):
        what = f"{name} is {width} x {height} px: one side is over {MAX_ASPECT} times the other"
        raise UserError(Problem(where, what, "crop it or pad it"))


def as_seen(picture: Image.Image) -> Image.Image:
    """An open picture as RGB; what has more than 8 bits is scaled to 8 as `_in_8_bits` says."""
    turn = _turn(picture)
    picture.load()
    picture = _in_8_bits(picture)
    if turn is not None:
        picture = picture.transpose(turn)
    if picture.has_transparency_data:
        if picture.mode == "La":  # which Pillow turns into LA and nothing else
            picture = picture.convert("LA")
        picture = picture.convert("RGBA")
        paper = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(paper, picture)
    return picture if picture.mode == "RGB" else picture.convert("RGB")  # which would copy it


def _check_sums(picture: Image.Image, file: Path | BytesIO) -> None:
    """Raises SyntaxError for a PNG that is damaged: decoding it Pillow passes over the sums, and half the picture may be gone."""
    if picture.format == "PNG":
        with Image.open(file, formats=("PNG",)) as again:
            again.verify()


def _in_8_bits(picture: Image.Image) -> Image.Image:
    """Grey of 12 or 16 bits is scaled by its depth. Of more bits, or signed, it is scaled by what it holds: from 0, or from its
    least value below 0, to its greatest. Floats run from 0 to their greatest; only where none is above 0, from their least.

    Pillow itself cuts all of these off at 0 and 255. The other modes have 8 bits already.
    """
    tags = picture.tag_v2 if isinstance(picture, TiffImageFile) else {}
    bits, signed = tags.get(TIFF_BITS, (0,))[0], tags.get(TIFF_KIND, (0,))[0] == TIFF_SIGNED
    if picture.mode not in ("I", "F") and not picture.mode.startswith("I;16") and not (picture.mode == "L" and signed):
        return picture
    values = np.asarray(picture)
    if signed and bits == 8:
        values = values.view(np.int8)
    if bits == 32 and not signed and picture.mode == "I":  # Pillow keeps the bytes and takes them for signed ones
        values = values.view(np.uint32)
    strips = [slice(start, start + STRIP_ROWS) for start in range(0, len(values), STRIP_ROWS)]
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format == "PPM"):
        low, high = 0.0, 2.0 ** (bits or 16) - 1
    else:
        low = min(float(_finite(values[strip]).min()) for strip in strips)
        high = max(float(_finite(values[strip]).max()) for strip in strips)
        low = 0.0 if picture.mode == "F" and high > 0 else min(0.0, low)
    grey = np.empty(values.shape, np.uint8)
    for strip in strips:
        grey[strip] = np.clip((_finite(values[strip]) - low) * (255 / max(1e-9, high - low)), 0, 255).round()
    if tags.get(TIFF_WHITE) == TIFF_WHITE_IS_ZERO:  # Pillow sees to it up to 8 bits only
        grey = 255 - grey
    seen = Image.fromarray(grey)
    if isinstance(hidden := picture.info.get("transparency"), int):  # the one value of a PNG that is not seen
        seen.putalpha(Image.fromarray(np.where(values == hidden, 0, 255).astype(np.uint8)))
    return seen


def _finite(values: NDArray[Any]) -> NDArray[np.float64]:
    """In float64; one NaN would turn all of a picture black."""
    return np.nan_to_num(values.astype(np.float64), posinf=0, neginf=0)


@contextmanager
def _opened(file: Path | BytesIO, where: str, name: str) -> Iterator[Image.Image]:
    """The picture, undecoded; raises UserError for what is none, or breaks while the caller decodes it.

    Pillow warns above 89 megapixels and refuses above 178; MAX_PIXELS, between them, is our own.
    """
    name, again, begun = f"{name} ".lstrip(), "copy it again from its source", False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is refused here in our own words
            with Image.open(file, formats=FORMATS) as picture:
                begun = True
                yield picture
    except Image.DecompressionBombError as error:
        raise UserError(Problem(where, f"{name}has more than 100 megapixels", "make it smaller")) from error
    except (OSError, ValueError, SyntaxError, RuntimeError) as error:  # RuntimeError: a damaged AVIF
        if "DataLoader worker" in str(error):  # torch raises it in whatever the main process does when another was killed
            raise
        what, fix = f"{name}is not a picture that can be read", "save it again as PNG or JPEG; " + OPENED
        if begun:
            what, fix = f"{what}: it breaks while it is decoded", again
        elif isinstance(error, PermissionError):
            what, fix = f"{name}may not be read ({error.strerror})", "let your account read it"
        elif (head := _head(file)) is not None:
            if not head:
                what, fix = f"{name}is empty", again
            elif (kind := what_it_is(head)) and kind.as_picture:
                what, fix = f"{name}is {kind.what}, not a picture", kind.as_picture
        raise UserError(Problem(where, what, fix)) from error


def _head(file: Path | BytesIO) -> bytes | None:
    """The first bytes; None of what is no file."""
    if isinstance(file, BytesIO):
        return file.getvalue()[:HEAD_BYTES]
    if not file.is_file():
        return None
    with file.open("rb") as opened_file:
        return opened_file.read(HEAD_BYTES)


def _turn(picture: Image.Image) -> Image.Transpose | None:
    """How an undecoded picture must be turned. Of a TIFF Pillow itself turns the size when it opens, the pixels when it decodes."""
    if picture.format == "TIFF":
        return None
    # Not picture.getexif(): of a PNG without EXIF that decodes the whole picture, to look for some behind it.
    return TURNS.get(Image.Image.getexif(picture).get(ORIENTATION, 1))


def _ends(source: Path | BytesIO, mark: bytes) -> bool:
    """Whether a file is whole: its end mark near its end, or else it decodes (phones append videos and depth maps to photos)."""
    with source.open("rb") if isinstance(source, Path) else nullcontext(source) as file:
        file.seek(0, SEEK_END)
        file.seek(max(0, file.tell() - TAIL_BYTES))
        if mark in file.read():
            return True
    try:
        _load(source, "", "")
    except UserError:
        return False
    return True
