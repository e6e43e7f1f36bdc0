"""What a file is, by its first bytes: its name often says otherwise.

>>> what_it_is(b"version https://git-lfs.github.com/spec/v1").what
'a git-lfs pointer'
"""

import re
from typing import NamedTuple


class Kind(NamedTuple):
    """A kind of file, and what to do about it in place of a picture and in place of a meta-file; None: it is what belongs there."""

    pattern: re.Pattern[bytes]
    what: str
    as_picture: str | None
    as_meta: str | None


PICTURE_ENDINGS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "ppm", "jp2")  # of the files that are opened
HEAD_BYTES = 4096  # of a file, that are looked at
PICTURE, CONVERSATIONS = "name a picture file", "give the JSON file of conversations"
UNPACK, UNPACK_META = "unpack it, and name the pictures in it", f"unpack it, and {CONVERSATIONS}"
ROWS = "write its records as JSON lines: "
# The first that matches counts. None backtracks much, since strangers send files.
KINDS = [Kind(re.compile(pattern, re.DOTALL | re.IGNORECASE), *about) for pattern, *about in (
    (rb"version https://git-lfs", "a git-lfs pointer", "bring the pictures themselves: `git lfs pull` in their repository",
     "run `git lfs pull` where it was cloned"),
    (rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF....WEBP|BM|II\*\x00|MM\x00\*|\x00\x00\x00\x0cjP|....ftypavi[fs]", "a picture", None,
     "give the file that names it"),
    (rb"....ftyp(hei|hev|mif1|msf1)", "an HEIC photo", "save it as JPEG, as with `heif-convert a.heic a.jpg`", CONVERSATIONS),
    (rb"....ftyp|....moov|\x1a\x45\xdf\xa3|RIFF....AVI |FLV\x01|\x00\x00\x01\xba", "a video",
     "save the frame that is meant as PNG or JPEG", CONVERSATIONS),
    (rb"(<\?xml[^>]*>|<!--.*?-->|<!doctype svg[^>]*>|\s)*+<svg", "an SVG drawing",
     "draw it as PNG, as with `rsvg-convert a.svg -o a.png`", CONVERSATIONS),
    (rb"(<\?xml[^>]*>|<!--.*?-->|\s)*+<(!doctype html|html|head|body)", "an HTML page",
     "download the picture itself: a page came in its place, such as a login or an error",
     "bring the file itself: a page came in its place, such as a login or an error"),
    (rb"%PDF", "a PDF", "draw the page that is meant as PNG, as with `pdftoppm -png a.pdf a`", CONVERSATIONS),
    (rb"%!PS", "a PostScript drawing", "draw it as PNG", CONVERSATIONS),
    (rb"8BPS", "a Photoshop file", "export it as PNG", CONVERSATIONS),
    (rb"PK\x03\x04", "a zip archive, or a file that is one, such as .xlsx", UNPACK, UNPACK_META),
    (rb"\x1f\x8b", "a gzip file", UNPACK,
     "unpack it, as with `gunzip FILE`: what is compressed as a whole cannot be read from the middle"),
    (rb"BZh", "a bzip2 file", UNPACK, UNPACK_META),
    (rb"\xfd7zXZ", "an xz file", UNPACK, UNPACK_META), (rb"\x28\xb5\x2f\xfd", "a zstd file", UNPACK, UNPACK_META),
    (rb"7z\xbc\xaf", "a 7z archive", UNPACK, UNPACK_META), (rb"Rar!", "a rar archive", UNPACK, UNPACK_META),
    (rb".{257}ustar", "a tar archive", UNPACK, None),
    (rb"\xff\x0a|\x00\x00\x00\x0cJXL ", "a JPEG XL picture", "save it as PNG or JPEG, as with `djxl a.jxl a.png`", CONVERSATIONS),
    (rb".{128}DICM", "a DICOM image", "export it as PNG", CONVERSATIONS),
    (rb"\x93NUMPY", "a NumPy array", "save it as PNG", CONVERSATIONS),
    (rb"PAR1", "a parquet file", PICTURE, None), (rb"ARROW1", "an Arrow file", PICTURE, None),
    (rb"\xff\xff\xff\xff", "an Arrow stream", PICTURE, None),
    (rb"FEA1", "a Feather file", PICTURE, ROWS + "pandas.read_feather(FILE).to_json(OUT, orient='records', lines=True)"),
    (rb"\x89HDF", "an HDF5 file", PICTURE, ROWS + "with h5py"),
    (rb"SQLite format 3", "an SQLite database", PICTURE, ROWS + "with sqlite3"),
    (rb"\x80[\x02-\x05]", "a pickle, which is never opened here: it may run any program", PICTURE,
     "write its records as JSON, where it was made"),
    (rb"\xff\xfe|\xfe\xff|\x00\x00\xfe\xff", "UTF-16 or UTF-32 text", PICTURE, "save the file as UTF-8"),
    (rb"\s*[{\[]\s*[\"{\[]", "JSON text", "download the picture itself: a server's answer came in its place", None),
    (rb"\x00+\Z", "nothing but zero bytes", "copy it again from its source", "copy it again from its source"),
)]  # fmt: skip


def what_it_is(head: bytes) -> Kind | None:
    """The kind of a file by its first HEAD_BYTES; None of what is not known."""
    text = head.removeprefix(b"\xef\xbb\xbf")
    return next((kind for kind in KINDS if kind.pattern.match(text)), None)
