"""Reads a conversation in the form that people send: OpenAI's, Qwen's or DashScope's parts, mixed as they like.

    read_messages([{"role": "user", "content": [{"type": "image", "image": "chart.png"}, {"type": "text", "text": "read"}]}])

A picture is a path, file://, data:, http(s) or a PIL image; a video a file of the same kinds or a list of pictures.
"""

import base64
import binascii
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

import av
from PIL import Image
from qwen_vl_utils.vision_process import FPS, FPS_MAX_FRAMES, smart_nframes

from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.fetch import fetch
from qwenvl_ft.geometry import Limits, resized
from qwenvl_ft.media import MAX_PIXELS, as_seen, check_aspect, decode

ROLES = ("system", "user", "assistant")
Fetch = Callable[[str], bytes]
# The demuxers that may open a video. Others open further files and URLs that a file names: a playlist, a list of parts.
CONTAINERS = "mov,matroska,webm,avi,mpegts,mpeg,asf,flv,ogg,gif"


@dataclass(frozen=True)
class Picture:
    """A picture in memory; the bounds, in px, replace the processor's own for it."""

    image: Image.Image
    min_pixels: int | None = None
    max_pixels: int | None = None
    kind: ClassVar[str] = "image"


@dataclass(frozen=True)
class Film:
    """Frames of one size, drawn from `num_frames` at `fps` a second; `indices` are their places there.

    The bounds, in px of a frame, replace the processor's own for it.
    """

    frames: tuple[Image.Image, ...]
    fps: float
    indices: tuple[int, ...]
    num_frames: int
    min_pixels: int | None = None
    max_pixels: int | None = None
    kind: ClassVar[str] = "video"


FRAMES = "data:video/jpeg;base64,"
Part = str | Picture | Film


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
class Message:
    """A turn whose media are open: what the engine takes. `role` is system, user or assistant."""

    role: str
    parts: tuple[Part, ...]


def open_anywhere(source: str) -> bytes:
    """The bytes of a path, file:// or http(s) URL: for a user's own messages, never for those that come over a network."""
    if source.startswith(("http://", "https://")):
        return fetch(source)
    path = Path(unquote(urlsplit(source).path) if source.startswith("file://") else source)
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(Problem(source, f"cannot be read ({error.strerror})", "give the path of a file")) from error


def read_messages(messages: Sequence[Any], open_source: Fetch = open_anywhere, allowance: Allowance | None = None) -> list[Message]:
    """The messages with their pictures and videos open. `open_source` brings what is not a data: URL.

    Raises UserError with the problems of all messages.
    """
    opening = _Opening(open_source, allowance or Allowance())
    problems: list[Problem] = []
    found = []
    if not isinstance(messages, list | tuple) or not messages:
        raise UserError(Problem("messages", "is no list of messages", 'send [{"role": "user", "content": "..."}]'))
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ROLES:
            problems.append(Problem(f"{where}.role", f"is {str(role)[:40]!r}", f"write one of {', '.join(ROLES)}"))
            continue
        try:
            parts = tuple(opening.parts(message.get("content"), f"{where}.content"))
        except UserError as error:
            problems += error.problems
            continue
        if role != "user" and not all(isinstance(part, str) for part in parts):
            problems.append(Problem(f"{where}.content", f"shows a picture to the {role}", "show it in a message of the user"))
        found.append(Message(role, parts))
    if problems:
        raise UserError(*problems)
    if found[-1].role == "assistant":
        raise UserError(Problem("messages", "end with the assistant", "end with a message of the user"))
    return found


@dataclass(frozen=True)
class _Opening:
    """How the media of one conversation are opened."""

    open_source: Fetch
    allowance: Allowance

    def parts(self, content: Any, where: str) -> Iterator[Part]:
        if isinstance(content, str):
            yield content
            return
        if not isinstance(content, list | tuple) or not content:
            raise UserError(
                Problem(where, "is neither text nor a list of parts", 'send "..." or [{"type": "text", "text": "..."}]')
            )
        for number, part in enumerate(content):
            place = f"{where}[{number}]"
            if isinstance(part, str):
                yield part
                continue
            kind = _kind(part, place)
            source = part[kind]
            if isinstance(source, dict):  # OpenAI's {"image_url": {"url": ...}}
                source = source.get("url")
            if kind == "text":
                if not isinstance(source, str):
                    raise UserError(Problem(place, "its text is no text", "send a string"))
                yield source
                continue
            bounds = {key: _count(part, key, place) for key in ("min_pixels", "max_pixels")}
            if kind.startswith("image"):
                yield Picture(self.picture(source, place), **bounds)
            else:
                yield replace(self.film(part, source, place), **bounds)

    def picture(self, source: Any, place: str) -> Image.Image:
        self.allowance.take(place, pictures=1)
        if isinstance(source, Image.Image):
            check_aspect(*source.size, place)
            return as_seen(source)
        most = min(self.allowance.picture_pixels, self.allowance.pixels)
        picture = decode(self.data(source, place), place, int(most))
        self.allowance.take(place, pixels=picture.width * picture.height)
        return picture

    def data(self, source: Any, place: str) -> bytes:
        if isinstance(source, Path):
            source = str(source)
        if not isinstance(source, str) or not source:
            raise UserError(Problem(place, "names no picture and no video", "send a URL, data: or the path of a file"))
        if not source.startswith("data:"):
            return self.open_source(source)
        try:
            return base64.b64decode(source.partition(",")[2], validate=True)
        except (binascii.Error, ValueError) as error:
            raise UserError(Problem(place, "is no base64", "send data:image/png;base64,... without line breaks")) from error

    def film(self, part: dict[str, Any], source: Any, place: str) -> Film:
        """A film sampled as Qwen does: `fps` (default 2) frames a second, or `nframes` of them, an even number, at most 768."""
        fps = part.get("fps")
        if fps is not None and (isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps <= 120):
            raise UserError(Problem(f"{place}.fps", "is no rate", "send frames a second, more than 0, at most 120"))
        wanted = {"nframes": nframes} if (nframes := _count(part, "nframes", place)) else {"fps": fps or FPS}
        if "nframes" in wanted and fps is not None:
            raise UserError(Problem(place, "has fps and nframes", "send one of them"))
        if isinstance(source, str) and source.startswith(FRAMES):  # vLLM's form of a list of frames
            source = [f"data:image/jpeg;base64,{frame}" for frame in source[len(FRAMES) :].split(",", FPS_MAX_FRAMES)]
        if not isinstance(source, list | tuple):
            return read_film(self.data(source, place), place, wanted, self.allowance)
        if not 2 <= len(source) <= FPS_MAX_FRAMES:
            raise UserError(Problem(place, f"has {len(source)} frames", f"send 2 to {FPS_MAX_FRAMES}"))
        frames = tuple(self.picture(one, f"{place}[{number}]") for number, one in enumerate(source))
        if len({frame.size for frame in frames}) > 1:
            sizes = ", ".join(sorted({f"{frame.width} x {frame.height}" for frame in frames}))
            raise UserError(Problem(place, f"its frames have {sizes} px", "send frames of one size"))
        return Film(frames, float(fps or FPS), tuple(range(len(frames))), len(frames))


def _kind(part: Any, place: str) -> str:
    kinds = [key for key in ("text", "image", "image_url", "video", "video_url") if isinstance(part, dict) and key in part]
    if len(kinds) != 1:
        raise UserError(Problem(place, "is not one part", "send text, image, image_url, video or video_url, one of them a part"))
    return kinds[0]


def _count(part: dict[str, Any], key: str, place: str) -> int | None:
    value = part.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise UserError(Problem(f"{place}.{key}", f"is {value!r}", "send a whole number of pixels"))
    return value


def read_film(data: bytes, where: str, wanted: dict[str, float], allowance: Allowance | None = None) -> Film:
    """Decodes the frames that are wanted, `fps` or `nframes` by Qwen's rule, evenly spread from first to last."""
    allowance = allowance or Allowance()
    try:
        with av.open(BytesIO(data), options={"format_whitelist": CONTAINERS}) as container:
            stream = container.streams.video[0]
            check_aspect(stream.width, stream.height, where)
            size = stream.width * stream.height
            if size > allowance.picture_pixels:
                raise UserError(Problem(where, f"has frames of {stream.width} x {stream.height} px", "make it smaller"))
            rate = float(stream.average_rate or 24)
            total = sum(packet.size > 0 for packet in container.demux(stream))
            if total < 2:
                raise UserError(Problem(where, f"has {total} frames", "send it as a picture"))
            number = smart_nframes(wanted, total, rate)
            allowance.take(where, number, number * size)
            indices = [round(step * (total - 1) / (number - 1)) for step in range(number)]
            container.seek(0)
            keep = set(indices)
            frames = {at: frame.to_image() for at, frame in _frames(container, stream, allowance, where) if at in keep}
    except (av.FFmpegError, IndexError, ValueError) as error:
        raise UserError(Problem(where, "is not a video that can be read", "send an MP4 of at least two frames")) from error
    kept = [at for at in indices if at in frames]  # the last packets of a damaged file give no frame
    if len(kept) < len(indices):
        raise UserError(Problem(where, f"ends after {len(frames)} of {len(indices)} frames", "send a whole file"))
    return Film(tuple(frames[at] for at in kept), rate, tuple(kept), total)


def _frames(container: Any, stream: Any, allowance: Allowance, where: str) -> Iterator[tuple[int, Any]]:
    """(number, frame) of each; raises UserError where one is larger than the stream said, or the time is up."""
    for at, frame in enumerate(container.decode(stream)):
        allowance.take(where)
        if frame.width * frame.height > allowance.picture_pixels:
            raise UserError(Problem(where, f"has frames of {frame.width} x {frame.height} px", "make it smaller"))
        yield at, frame


def bounded(part: Picture | Film, limits: Limits) -> Picture | Film:
    """What has bounds of its own, at the size that they give it: whole units, which the processor then leaves alone.

    Raises UserError for bounds that the processor would not leave alone.
    """
    if not (part.min_pixels or part.max_pixels):
        return part
    if part.max_pixels and part.max_pixels < max(limits.min_pixels, part.min_pixels or 0):
        raise UserError(
            Problem(
                f"a {part.kind}'s max_pixels",
                f"is {part.max_pixels}, below the least that it may have, {max(limits.min_pixels, part.min_pixels or 0)}",
                "raise it, or leave it out",
            )
        )
    most = min(part.max_pixels or limits.max_pixels, limits.max_pixels)
    own = Limits(limits.patch_size, limits.merge_size, min(max(part.min_pixels or 0, limits.min_pixels), most), most)
    frames = [part.image] if isinstance(part, Picture) else part.frames
    height, width = resized(frames[0].height, frames[0].width, own)
    frames = tuple(frame.resize((width, height), Image.Resampling.BICUBIC) for frame in frames)
    return Picture(*frames) if isinstance(part, Picture) else replace(part, frames=frames)
