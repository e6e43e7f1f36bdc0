"""Films for the tests, each with a bar that says which frame it is, and the boxes of an MP4 rewritten."""

import struct
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

ONE = 1 << 16  # in a track's matrix
WIDTH, HEIGHT = 112, 84


def picture(number: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """Black, a white mark at the top left, and below it a grey bar whose left edge is at 40 + number px."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:20, :20], pixels[40:50, 40 + number : 60 + number] = 255, 160
    return pixels


def number_of(frame) -> int:
    """Which frame it is, as its bar says."""
    line = np.asarray(frame.convert("L")).astype(int)[42:48, 30:].mean(axis=0)
    return int(np.argmax(line > 80)) - 10


def write(
    path: Path, count: int = 20, codec: str = "mpeg4", rate: Fraction | int = 10, size: tuple[int, int] = (WIDTH, HEIGHT),
    pix: str = "yuv420p", gop: int = 10, at: Callable[[int], int] | None = None, options: dict[str, str] | None = None,
) -> Path:  # fmt: skip
    """`at` says when each frame begins, in ms."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = *size, pix, gop
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(picture(number, *size), format="rgb24")
            if at:
                frame.pts, frame.time_base = at(number), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def boxes(film: Path, kind: bytes, at: int, form: str, *values: int) -> Path:
    """The film with these values written into its (only) box of this kind, `at` bytes after the kind's name."""
    content = bytearray(film.read_bytes())
    assert content.count(kind) == 1
    struct.pack_into(form, content, content.index(kind) + 4 + at, *values)
    film.write_bytes(content)
    return film


def turned(film: Path, a: int, b: int, c: int, d: int) -> Path:
    """The film with this matrix, as ISO 14496-12 has it."""
    return boxes(film, b"tkhd", 40, ">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)


def moved_to_front(film: Path, target: Path) -> Path:
    """The film with its index before its frames, so that it opens when it is cut."""
    with av.open(str(film)) as source, av.open(str(target), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                container.mux(packet)
    return target


def cut(film: Path, share: float) -> Path:
    """The film's first part, in place."""
    content = film.read_bytes()
    film.write_bytes(content[: int(len(content) * share)])
    return film


def sound(path: Path) -> Path:
    """A file of sound alone."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 16000
        for number in range(8):
            frame.pts = number * 1024
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def of_sizes(path: Path, sizes: Sequence[tuple[int, int]], codec: str = "mjpeg") -> Path:
    """A film whose frames have these sizes."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = *sizes[0], "yuvj420p" if codec == "mjpeg" else "rgb24"
        packets = []
        for width, height in sizes:  # an encoder for each size: the container takes what it gets
            encoder = av.CodecContext.create(codec, "w")
            encoder.width, encoder.height, encoder.pix_fmt, encoder.time_base = width, height, stream.pix_fmt, Fraction(1, 10)
            frame = av.VideoFrame.from_ndarray(np.zeros((height, width, 3), np.uint8), format="rgb24")
            packets += [*encoder.encode(frame.reformat(format=stream.pix_fmt)), *encoder.encode()]
        for number, packet in enumerate(packets):
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, number, number, Fraction(1, 10)
            container.mux(packet)
    return path
