"""Draws the frames of a video: which ones is known from its container alone, before a second one is decoded.

`measured` reads the packets of a film and plans; `frames` decodes, and keeps of the frames in between nothing. A film whose rate
varies is drawn by its times, so that the n-th frame stands at n / fps seconds in every film.

    video = measured(Path("film.mp4"), "train.json[3]", {"fps": 1.0})
    images = frames(video, lambda image: image)
"""

import math
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from statistics import median
from threading import Thread
from typing import Any, TypeVar

from PIL import Image

from qwenvl_ft.data import sources
from qwenvl_ft.data.pictures import LIES_ON_ITS_SIDE, MAX_PIXELS, PictureChanged, check_aspect, opened, size_of
from qwenvl_ft.data.reading import AS_FOUND, Reading
from qwenvl_ft.data.records import Picture, Source, Video
from qwenvl_ft.errors import Problem, UserError

# The demuxers that may open a video. Others open further files and URLs that a file names: a playlist, a list of parts.
CONTAINERS = "mov,matroska,webm,avi,mpegts,mpeg,asf,flv,ogg,gif"
MOST_SECONDS = 600.0  # that reading a film may take: a decoder, or a disk, that does not come to an end holds up a whole run
OPTIONS = ("fps", "nframes", "max_frames", "min_pixels", "max_pixels")  # that a video may have of its own
MOST_FPS = 120
FEWEST_FRAMES, FRAME_PAIR = 4, 2  # of a film drawn at a rate; frames go in pairs. Source: qwen_vl_utils
UNEVEN = 1.5  # times the usual gap between two frames: a film of a larger one is drawn by its times
TURN = Image.Transpose
TURNS = {  # by the signs of a, b, c, d of a display matrix, as ffmpeg's display.h has them
    (1, 0, 0, 1): None, (-1, 0, 0, 1): TURN.FLIP_LEFT_RIGHT, (1, 0, 0, -1): TURN.FLIP_TOP_BOTTOM, (-1, 0, 0, -1): TURN.ROTATE_180,
    (0, 1, -1, 0): TURN.ROTATE_270, (0, -1, 1, 0): TURN.ROTATE_90, (0, 1, 1, 0): TURN.TRANSPOSE, (0, -1, -1, 0): TURN.TRANSVERSE,
}  # fmt: skip
T = TypeVar("T")


@dataclass
class Allowance:
    """What the media of a conversation may still cost: it counts down as they are opened. `until` is of time.monotonic."""

    pictures: float = math.inf
    picture_pixels: int = MAX_PIXELS
    pixels: float = math.inf
    until: float = math.inf

    def take(self, place: str, pictures: int = 0, pixels: int = 0) -> None:
        """Raises UserError where it does not suffice."""
        self.pictures, self.pixels = self.pictures - pictures, self.pixels - pixels
        if self.pictures < 0:
            raise UserError(Problem(place, "is one picture or frame too many", "send fewer"))
        if self.pixels < 0:
            raise UserError(Problem(place, "brings more pixels than all pictures together may have", "send smaller ones"))
        if time.monotonic() > self.until:
            raise UserError(Problem(place, "takes too long to open", "send less"))


@dataclass(frozen=True)
class Drawing:
    """How many frames of a video are drawn: `nframes` of them, or `fps` a second and `max_frames` at most."""

    fps: float
    max_frames: int
    nframes: float | None = None

    @classmethod
    def of(cls, options: Mapping[str, Any], where: str, reading: Reading = AS_FOUND) -> "Drawing":
        """What a video's own options say, else the config. Raises UserError for what is no number of frames."""
        fps, nframes, most = (options.get(key) for key in ("fps", "nframes", "max_frames"))
        if fps is not None and not (_is_number(fps) and 0 < fps <= MOST_FPS):
            raise UserError(Problem(f"{where}.fps", "is no rate", f"send frames a second, more than 0, at most {MOST_FPS}"))
        if nframes is not None and not (_is_number(nframes) and nframes > 0):
            raise UserError(Problem(f"{where}.nframes", f"is {nframes!r}", "send how many frames are drawn, an even number"))
        if most is not None and not (_is_number(most) and most >= FRAME_PAIR):
            raise UserError(Problem(f"{where}.max_frames", f"is {most!r}", "send how many frames are drawn at most, 2 or more"))
        if nframes is not None and fps is not None:
            raise UserError(Problem(where, "has fps and nframes", "send one of them"))
        return cls(float(fps or reading.video_fps), int(most or reading.video_max_frames), nframes)

    def number(self, total: int, rate: float, where: str) -> int:
        """Of `total` frames at `rate` a second; even. Raises UserError where qwen_vl_utils' `smart_nframes` refuses."""
        if self.nframes is None:
            most = min(self.max_frames, total) // FRAME_PAIR * FRAME_PAIR
            return int(min(max(total / rate * self.fps, FEWEST_FRAMES), most) // FRAME_PAIR * FRAME_PAIR)
        number = round(self.nframes / FRAME_PAIR) * FRAME_PAIR
        if not FRAME_PAIR <= number <= total:
            what = f"nframes is {self.nframes}, in pairs {number}, and it has {total} frames"
            raise UserError(Problem(where, what, f"send an even number from 2 to {total // 2 * 2}"))
        return number


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def measured(
    source: Source | Sequence[Source], where: str, options: Mapping[str, Any] | None = None, reading: Reading = AS_FOUND
) -> Video:
    """A film, or a list of frames that are files, as it will be drawn; `options` are its own, among OPTIONS.

    Of a film one frame is decoded, which says how it is turned. Raises UserError for what cannot be drawn.
    """
    options = {key: value for key, value in (options or {}).items() if value is not None}
    drawing = Drawing.of(options, where, reading)
    if unknown := sorted(options.keys() - set(OPTIONS)):
        raise UserError(Problem(where, f'has "{unknown[0]}", which is not read', f"delete it: {', '.join(OPTIONS)} are read"))
    for key in ("min_pixels", "max_pixels"):
        if key in options and not (isinstance(options[key], int) and not isinstance(options[key], bool) and options[key] > 0):
            raise UserError(Problem(f"{where}.{key}", f"is {options[key]!r}", "write a whole number of pixels"))
    least, most = options.get("min_pixels"), options.get("max_pixels")
    if not isinstance(source, list | tuple):
        assert isinstance(source, Source)
        try:
            film = _in_time(lambda: _measured(source, _stamp(source), drawing), where)
        except UserError as error:
            raise UserError(*(replace(problem, where=problem.where or where) for problem in error.problems)) from error
        return replace(film, min_pixels=least, max_pixels=most)
    check_number(len(source), where, drawing)
    sizes = [size_of(frame, where) for frame in source]
    if len(set(sizes)) > 1:
        raise several_sizes(where, [(width, height) for height, width in sizes])
    height, width = sizes[0]
    return Video(tuple(source), height, width, drawing.fps, tuple(range(len(sizes))), len(sizes), least, most)


def check_number(number: int, where: str, drawing: Drawing) -> None:
    """Raises UserError for a list of frames that is too short for a video, or too long, or of which some are to be drawn."""
    if not FRAME_PAIR <= number <= drawing.max_frames:
        raise UserError(Problem(where, f"has {number} frames", f"send {FRAME_PAIR} to {drawing.max_frames}"))
    if drawing.nframes is not None:
        raise UserError(Problem(where, "has nframes and is a list of frames", "delete it: all frames of a list are shown"))


def several_sizes(where: str, sizes: Sequence[tuple[int, int]]) -> UserError:
    """What is wrong with frames of these sizes, (width, height)."""
    text = ", ".join(sorted({f"{width} x {height}" for width, height in sizes}))
    return UserError(Problem(where, f"has frames of several sizes: {text} px", "send frames of one size"))


def frames(video: Video, keep: Callable[[Image.Image], T], where: str = "") -> list[T]:
    """What `keep` makes of each of its frames, in RGB and upright; no other frame is in memory.

    Raises UserError where it breaks, PictureChanged where a file is gone or another than was measured.
    """
    where = where or video.name
    if isinstance(source := video.source, tuple):
        pictures = (of if isinstance(of, Image.Image) else Picture(of, video.height, video.width) for of in source)
        return [keep(of if isinstance(of, Image.Image) else opened(of, where)) for of in pictures]
    if not (is_there := sources.holder(source).is_file()) or video.num_bytes not in (None, sources.num_bytes(source)):
        what = f"since the records were read it changed: {video.name} is {'another film' if is_there else 'gone'}"
        raise PictureChanged(Problem(where, what, "put it back as it was and go on, or start again"))
    return _in_time(lambda: _drawn(source, video, where, Allowance(), keep), where)


def read_video(data: bytes, where: str, drawing: Drawing, allowance: Allowance | None = None) -> Video:
    """A film in memory with its frames decoded, within what they may cost."""
    allowance = allowance or Allowance()
    video = _plan(BytesIO(data), where, drawing, allowance)
    images = _drawn(BytesIO(data), video, where, allowance, lambda image: image)
    return Video.of(images, video.fps, video.indices, video.num_frames)


def _stamp(source: Source) -> sources.Stamp | None:
    try:
        return sources.stamp(source)
    except OSError:
        return None


@lru_cache(maxsize=10_000)  # of a film there are several questions
def _measured(source: Source, stamp: sources.Stamp | None, drawing: Drawing) -> Video:
    return _plan(source, "", drawing, Allowance())


def _in_time(job: Callable[[], T], where: str) -> T:
    """What the job returns or raises; UserError where it takes longer than MOST_SECONDS. Its thread is then left to itself."""
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(job())
        except BaseException as error:
            result.set_exception(error)
            if not isinstance(error, Exception):
                raise

    Thread(target=run, daemon=True).start()  # of a pool Python itself would wait for the thread when it ends
    try:
        return result.result(MOST_SECONDS)
    except TimeoutError:
        what = f"did not come to an end in {MOST_SECONDS:g} seconds"
        raise UserError(Problem(where, what, "write the film anew (ffmpeg -i FILE NEW.mp4), or leave it out")) from None


@contextmanager
def _opened(source: Source | BytesIO, where: str, allowance: Allowance) -> Iterator[tuple[Any, Any]]:
    """(container, its video stream). Raises UserError for what is no video, or breaks while the caller decodes it."""
    import av

    try:
        # The first frames are decoded here already: the bound must be known to the decoder.
        options = {"format_whitelist": CONTAINERS, "max_pixels": str(int(allowance.picture_pixels))}
        file = source if isinstance(source, BytesIO) else sources.opened(source)
        with av.open(f"file:{file}" if isinstance(file, Path) else file, "r", options=options) as container:
            if not container.streams.video:
                raise UserError(Problem(where, "holds no pictures, only sound or nothing", "name a film"))
            yield container, container.streams.video[0]
    except OSError as error:
        if isinstance(error, av.FFmpegError) and not isinstance(error, FileNotFoundError | PermissionError):
            raise _no_video(where) from error
        raise UserError(Problem(where, f"cannot be read ({error.strerror or error})", "put it back, or leave it out")) from error
    except (av.FFmpegError, IndexError, ValueError, AttributeError) as error:  # AttributeError: a codec that is not known
        raise _no_video(where) from error


def _no_video(where: str) -> UserError:
    return UserError(Problem(where, "is not a video that can be read", "send an MP4 of at least two frames"))


@dataclass(frozen=True)
class _Timeline:
    """The frames of a film as its packets say: how many, how many a second, the times of each where they are known, in ticks of
    the stream, and whether these are even."""

    total: int
    rate: float
    times: list[int]
    even: bool


def _timeline(container: Any, stream: Any, where: str, allowance: Allowance) -> _Timeline:
    # Not the packets that an edit list leaves out.
    times, total, corrupt = [], 0, False
    for packet in container.demux(stream):
        allowance.take(where)
        if packet.size:
            corrupt = packet.is_corrupt
        if packet.size and not packet.is_discard:
            total += 1
            times += [packet.pts] if packet.pts is not None else []
    if corrupt:
        raise UserError(Problem(where, "ends before its last frame does: the file was cut off", "copy it again from its source"))
    if total < FRAME_PAIR:
        raise UserError(Problem(where, f"has {total} frames", "send it as a picture"))
    said = float(stream.average_rate or 0)
    times = sorted(times) if len(times) == total else []
    gaps = [after - before for before, after in pairwise(times)]
    if not times or times[-1] == times[0]:
        return _Timeline(total, said or 24.0, [], even=True)
    usual = median(gaps)
    found = (total - 1) / float((times[-1] - times[0]) * stream.time_base)
    even = max(gaps) <= UNEVEN * usual + 1 and said > 0 and abs(found / said - 1) < 0.05
    return _Timeline(total, said if even else found, times, even)


def _plan(source: Source | BytesIO, where: str, drawing: Drawing, allowance: Allowance) -> Video:
    with _opened(source, where, allowance) as (container, stream):
        size = stream.width * stream.height
        if not 0 < size <= allowance.picture_pixels:  # 0: the decoder refused its first frame
            raise UserError(Problem(where, f"has frames of more than {allowance.picture_pixels:,} px", "make it smaller"))
        check_aspect(stream.width, stream.height, where)
        line = _timeline(container, stream, where, allowance)
        number = drawing.number(line.total, line.rate, where)
        allowance.take(where, number, number * size)
        container.seek(0)
        first = next(iter(container.decode(stream)), None)
        if first is None:
            raise UserError(Problem(where, "has no frame that can be decoded", "write it anew (ffmpeg -i FILE NEW.mp4)"))
        lies = _turn(first, where) in LIES_ON_ITS_SIDE
        width, height = (first.height, first.width) if lies else (first.width, first.height)
    num_bytes = None if isinstance(source, BytesIO) else sources.num_bytes(source)
    kept = source if isinstance(source, Source) else ()
    return Video(kept, height, width, line.rate, _spread(number, line.total), line.total, num_bytes=num_bytes)


def _spread(number: int, total: int) -> tuple[int, ...]:
    """Which frames, from first to last."""
    return tuple(round(step * (total - 1) / (number - 1)) for step in range(number))


def _drawn(source: Source | BytesIO, video: Video, where: str, allowance: Allowance, keep: Callable[[Image.Image], T]) -> list[T]:
    """The frames that were planned: by their places, or by their times where these are uneven, or some packets show none."""
    with _opened(source, where, allowance) as (container, stream):
        line = _timeline(container, stream, where, allowance)
        if line.total != video.num_frames:
            raise UserError(Problem(where, f"has {line.total} frames and had {video.num_frames}", "put the old film back"))

        def shown(frame: Any) -> T:
            if (image := _upright(frame, where)).size != (video.width, video.height):
                raise several_sizes(where, [image.size, (video.width, video.height)])
            return keep(image)

        found: list[T] = []
        if line.even:
            found, decoded, in_order = _pass(container, stream, video.indices, None, line.total - 1, shown, where, allowance)
        if not line.even or (decoded != line.total and line.times and in_order):
            start, ticks = line.times[0], float(1 / stream.time_base)
            times = [start + at / line.rate * ticks + 0.5 for at in video.indices]  # the half: above what was rounded
            found, _, _ = _pass(container, stream, times, line.times, line.times[-1], shown, where, allowance)
    if len(found) < len(video.indices):
        what = f"ends after {len(found)} of {len(video.indices)} frames"
        raise UserError(Problem(where, what, "send a whole file"))
    return found


def _pass(
    container: Any, stream: Any, wanted: Sequence[float], times: Sequence[int] | None, last: int, shown: Callable[[Any], T],
    where: str, allowance: Allowance,
) -> tuple[list[T], int, bool]:  # fmt: skip
    """Of each wanted place, or time if `times` are given, the frame that is then on the screen: the last that began before it.

    Behind the end it is the last frame, which is at `last` in a whole film. Also how many frames there are, and whether they came
    in the order of their times.
    """
    container.seek(0)
    found: list[T] = []
    before, now, end, total, in_order = None, -1, None, 0, True
    size = stream.width, stream.height  # which follows the frames as they are decoded
    for frame in container.decode(stream):
        allowance.take(where)
        if (frame.width, frame.height) != size:
            raise several_sizes(where, [size, (frame.width, frame.height)])
        if frame.pts is not None:
            in_order &= end is None or frame.pts >= end
            end = frame.pts
        now = total if times is None or end is None else end
        while len(found) < len(wanted) and now > wanted[len(found)]:
            found.append(shown(before or frame))
        before, total = frame, total + 1
    if before is not None and now >= last:
        found += [shown(before) for _ in wanted[len(found) :]]
    return found, total, in_order


def _turn(frame: Any, where: str) -> Image.Transpose | None:
    """How a frame must be turned to stand as a player shows it: phones film lying on their side and say so in a matrix."""
    if (matrix := frame.side_data.get("DISPLAYMATRIX")) is None:
        return None
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(matrix))  # what is at (x, y) goes to (ax + cy, bx + dy), y downwards
    signs = tuple((value > 0) - (value < 0) for value in (a, b, c, d))
    if signs not in TURNS:
        raise UserError(Problem(where, "is turned by an angle that is no quarter of a circle", "turn it, and send it upright"))
    return TURNS[signs]


def _upright(frame: Any, where: str) -> Image.Image:
    image: Image.Image = frame.to_image()
    turn = _turn(frame, where)
    return image if turn is None else image.transpose(turn)
