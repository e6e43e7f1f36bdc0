"""What a file is that is no picture, by its first bytes: its name often says otherwise.

>>> what_it_is(b"version https://git-lfs.github.com/spec/v1")[0]
'a git-lfs pointer'
"""

import re

# What the first bytes match, what such a file is, and what to do about it. The first that matches counts. None backtracks much,
# since strangers send files.
KINDS = [(re.compile(pattern, re.DOTALL | re.IGNORECASE), what, fix) for pattern, what, fix in (
    (rb"version https://git-lfs", "a git-lfs pointer", "bring the pictures themselves: `git lfs pull` in their repository"),
    (rb"....ftyp(hei|hev|mif1|msf1)", "an HEIC photo", "save it as JPEG, as with `heif-convert a.heic a.jpg`"),
    (rb"....ftyp(?!avi[fs])|....moov|\x1a\x45\xdf\xa3|RIFF....AVI |FLV\x01|\x00\x00\x01\xba", "a video",
     "save the frame that is meant as PNG or JPEG"),
    (rb"(<\?xml[^>]*>|<!--.*?-->|<!doctype svg[^>]*>|\s)*+<svg", "an SVG drawing",
     "draw it as PNG, as with `rsvg-convert a.svg -o a.png`"),
    (rb"(<\?xml[^>]*>|<!--.*?-->|\s)*+<(!doctype html|html|head|body)", "an HTML page",
     "download the picture itself: a page came in its place, such as a login or an error"),
    (rb"%PDF", "a PDF", "draw the page that is meant as PNG, as with `pdftoppm -png a.pdf a`"),
    (rb"%!PS", "a PostScript drawing", "draw it as PNG"),
    (rb"8BPS", "a Photoshop file", "export it as PNG"),
    (rb"PK\x03\x04|Rar!|7z\xbc\xaf\x27\x1c|\x1f\x8b|BZh|\xfd7zXZ", "an archive", "unpack it, and name the pictures in it"),
    (rb"\xff\x0a|\x00\x00\x00\x0cJXL ", "a JPEG XL picture", "save it as PNG or JPEG, as with `djxl a.jxl a.png`"),
    (rb".{128}DICM", "a DICOM image", "export it as PNG"),
    (rb"\x93NUMPY", "a NumPy array", "save it as PNG"),
    (rb"\s*[{\[]\s*[\"{\[]", "JSON text", "download the picture itself: a server's answer came in its place"),
    (rb"\x00+\Z", "nothing but zero bytes", "copy it again from its source"),
)]  # fmt: skip


def what_it_is(head: bytes) -> tuple[str, str] | None:
    """(what, fix) of a file by its first bytes; None of what is not known, and of pictures."""
    text = head.removeprefix(b"\xef\xbb\xbf")
    return next(((what, fix) for pattern, what, fix in KINDS if pattern.match(text)), None)
