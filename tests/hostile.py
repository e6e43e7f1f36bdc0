"""Bodies of requests that mean harm, or are just broken."""

import base64
import io
import zlib
from pathlib import Path

from PIL import Image

from tests.serving import CHARTS, data_url


def picture(width: int, height: int, kind: str = "PNG") -> str:
    file = io.BytesIO()
    Image.new("L", (width, height)).save(file, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def bomb() -> str:
    """A PNG of two gigapixels in a kilobyte or two."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")

    header = (45_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(10**6))) + chunk(b"IEND", b"")
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def as_data(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def shown(*sources, kind: str = "image") -> dict:
    return {"messages": [{"role": "user", "content": [*({kind: source} for source in sources), {"text": "read"}]}]}


def said(content, role: str = "user") -> dict:
    return {"messages": [{"role": role, "content": content}]}


def hostile(secret: Path, port: int) -> dict[str, object]:
    """Bodies by name: a dict is sent as JSON, bytes as they are."""
    here, good, hello = f"http://127.0.0.1:{port}", data_url(CHARTS[0]), said("hi")
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{here}/a.ts\n#EXTINF:1,\nfile://{secret}\n#EXT-X-ENDLIST\n".encode()
    return {
        "a file's URL": shown(f"file://{secret}"), "a path": shown(str(secret)), "a relative path": shown("../../../etc/passwd"),
        "a path in OpenAI's form": shown({"url": f"file://{secret}"}, kind="image_url"), "a path of a video": shown(str(secret), kind="video"),
        "paths of frames": shown([f"file://{secret}"] * 2, kind="video"), "a private URL": shown(f"{here}/picture.png"),
        "the metadata service": shown("http://169.254.169.254/latest/meta-data/"), "an IPv6 loopback URL": shown(f"http://[::1]:{port}/"),
        "another scheme": shown(f"gopher://127.0.0.1:{port}/"), "ffmpeg's concat": shown(f"concat:{secret}|{secret}", kind="video"),
        "a URL of a video": shown({"url": f"{here}/v.mp4"}, kind="video_url"), "an upload of nobody": shown("oss://uploads/0/a.png"),
        "an upload's path out": shown(f"oss://../../..{secret}"), "a number as a picture": shown(5), "no picture": shown(None),
        "a bomb": shown(bomb()), "a large picture": shown(picture(2500, 2500)), "a thin picture": shown(picture(1000, 2)),
        "too many pixels together": shown(*[picture(1900, 1900)] * 3), "10,000 pictures": shown(*[good] * 10_000),
        "no picture in base64": shown(as_data(b"nothing")), "no base64": shown("data:image/png;base64,@@@"), "no data": shown("data:"),
        "half a picture": shown(as_data(CHARTS[0].read_bytes()[:400])), "a picture that runs a program": shown(picture(50, 50, "EPS")),
        "a drawing": shown(as_data(b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>", "image/svg+xml")),
        "a playlist as a video": shown(as_data(playlist, "video/mp4"), kind="video"),
        "a list of files as a video": shown(as_data(f"ffconcat version 1.0\nfile {secret}\n".encode(), "video/mp4"), kind="video"),
        "no video": shown(as_data(b"nothing" * 99, "video/mp4"), kind="video"), "10,000 frames": shown([good] * 10_000, kind="video"),
        "one frame": shown([good], kind="video"), "frames of two sizes": shown([picture(56, 56), picture(84, 84)], kind="video"),
        "no frames a second": {"messages": [{"role": "user", "content": [{"video": [good] * 2, "fps": 0}]}]},
        "two kinds in a part": said([{"image": good, "video": good}]), "a part of nothing": said([{}]), "parts of parts": said([[["a"]]]),
        "a picture for the system": {"messages": [*shown(good)["messages"] * 0, {"role": "system", "content": [{"image": good}]}, *hello["messages"]]},
        "bounds below zero": said([{"image": good, "min_pixels": -1}]), "an unknown role": said("hi", "root"), "no content": said(None),
        "a role of a megabyte": said("hi", "r" * 10**6), "the assistant at the end": said("hi", "assistant"), "no message": {"messages": []},
        "messages of text": {"messages": "hi"}, "no messages": {}, "a long text": said("word " * 5000), "letters without end": said("a" * 10**6),
        "tokens without end": hello | {"max_tokens": 10**9}, "no tokens": hello | {"max_tokens": 0}, "heat in words": hello | {"temperature": "hot"},
        "too hot": hello | {"temperature": 1e308}, "no number": b'{"messages": [{"role": "user", "content": "hi"}], "temperature": NaN}',
        "stops without end": hello | {"stop": ["a"] * 1000}, "an empty stop": hello | {"stop": [""]}, "many answers": hello | {"n": 100},
        "tools": hello | {"tools": [{"type": "function"}]}, "a seed of 1,000 digits": b'{"seed": ' + b"9" * 1000 + b"}",
        "a number of 10,000 digits": b'{"seed": ' + b"9" * 10_000 + b"}", "broken JSON": b'{"messages": [', "nothing": b"",
        "a list": b"[]", "millions of lists": b'{"x": [' + b"[]," * 10_000_000 + b"0]}", "deep JSON": b"[" * 200_000, "half a character": b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        "no UTF-8": b'{"messages": "\xff\xfe"}', "surrogates in bytes": b'{"messages": [{"role": "user", "content": "\xed\xa0\x80"}]}',
        "another model": hello | {"model": "../../etc/passwd"}, "a body of 100 MB": b'{"messages": "' + b"x" * 100_000_000 + b'"}',
    }  # fmt: skip
