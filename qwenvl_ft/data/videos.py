"""Pictures and films in memory, what they may cost, and how a film's frames are drawn from its file."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from io import BytesIO
from typing import Any, ClassVar

import av
from PIL import Image
from qwen_vl_utils.vision_process import smart_nframes

from qwenvl_ft.data.geometry import Limits, resized
from qwenvl_ft.data.pictures import MAX_PIXELS, check_aspect
from qwenvl_ft.errors import Problem, UserError

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


def read_film(data: bytes, where: str, wanted: dict[str, float], allowance: Allowance | None = None) -> Film:
    """Decodes the frames that are wanted, `fps` or `nframes` by Qwen's rule, evenly spread from first to last."""
    allowance = allowance or Allowance()
    try:
        # The first frames are decoded here already: the bound must be known to the decoder.
        options = {"format_whitelist": CONTAINERS, "max_pixels": str(int(allowance.picture_pixels))}
        with av.open(BytesIO(data), options=options) as container:
            stream = container.streams.video[0]
            size = stream.width * stream.height
            if not 0 < size <= allowance.picture_pixels:  # 0: the decoder refused its first frame
                raise UserError(Problem(where, f"has frames of more than {allowance.picture_pixels:,} px", "make it smaller"))
            check_aspect(stream.width, stream.height, where)
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
    except (av.FFmpegError, IndexError, ValueError, AttributeError) as error:  # AttributeError: a codec that is not known
        raise UserError(Problem(where, "is not a video that can be read", "send an MP4 of at least two frames")) from error
    kept = [at for at in indices if at in frames]  # the last packets of a damaged file give no frame
    if len(kept) < len(indices):
        raise UserError(Problem(where, f"ends after {len(frames)} of {len(indices)} frames", "send a whole file"))
    return Film(tuple(frames[at] for at in kept), rate, tuple(kept), total)


def _frames(container: Any, stream: Any, allowance: Allowance, where: str) -> Iterator[tuple[int, Any]]:
    """(number, frame) of each; raises UserError where one has another size than the stream said, or the time is up."""
    size = stream.width, stream.height  # which follows the frames as they are decoded
    for at, frame in enumerate(container.decode(stream)):
        allowance.take(where)
        if (frame.width, frame.height) != size:
            raise UserError(Problem(where, "has frames of several sizes", "send frames of one size"))
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
