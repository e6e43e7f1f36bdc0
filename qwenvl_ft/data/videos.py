"""Draws the frames of a video from its file, within what the media of a conversation may cost."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import av

from qwenvl_ft.data.pictures import MAX_PIXELS, check_aspect
from qwenvl_ft.data.records import Video
from qwenvl_ft.errors import Problem, UserError

FPS, FPS_MAX_FRAMES = 2.0, 768  # frames a second of a video unless it is said, and the most of one; source: qwen_vl_utils
# The demuxers that may open a video. Others open further files and URLs that a file names: a playlist, a list of parts.
CONTAINERS = "mov,matroska,webm,avi,mpegts,mpeg,asf,flv,ogg,gif"


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


def read_video(data: bytes, where: str, wanted: dict[str, float], allowance: Allowance | None = None) -> Video:
    """Decodes the frames that are wanted, `fps` or `nframes` by Qwen's rule, evenly spread from first to last."""
    from qwen_vl_utils.vision_process import smart_nframes  # which imports torch

    allowance = allowance or Allowance()
    try:
        # The first frames are decoded here already: the bound must be known to the decoder.
        options = {"format_whitelist": CONTAINERS, "max_pixels": str(int(allowance.picture_pixels))}
        with av.open(BytesIO(data), "r", options=options) as container:
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
    return Video(tuple(frames[at] for at in kept), rate, tuple(kept), total)


def _frames(container: Any, stream: Any, allowance: Allowance, where: str) -> Iterator[tuple[int, Any]]:
    """(number, frame) of each; raises UserError where one has another size than the stream said, or the time is up."""
    size = stream.width, stream.height  # which follows the frames as they are decoded
    for at, frame in enumerate(container.decode(stream)):
        allowance.take(where)
        if (frame.width, frame.height) != size:
            raise UserError(Problem(where, "has frames of several sizes", "send frames of one size"))
        yield at, frame
