"""Draws the frames of a video from its file, within what the media of a conversation may cost."""

import math
import struct
import time
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import av
from PIL import Image

from qwenvl_ft.data.pictures import MAX_PIXELS, check_aspect
from qwenvl_ft.data.records import Video
from qwenvl_ft.errors import Problem, UserError

FPS, FPS_MAX_FRAMES = 2.0, 768  # frames a second of a video unless it is said, and the most of one; source: qwen_vl_utils
# The demuxers that may open a video. Others open further files and URLs that a file names: a playlist, a list of parts.
CONTAINERS = "mov,matroska,webm,avi,mpegts,mpeg,asf,flv,ogg,gif"
TURN = Image.Transpose
TURNS = {  # by the signs of a, b, c, d of a display matrix, as ffmpeg's display.h has them
    (1, 0, 0, 1): None, (-1, 0, 0, 1): TURN.FLIP_LEFT_RIGHT, (1, 0, 0, -1): TURN.FLIP_TOP_BOTTOM, (-1, 0, 0, -1): TURN.ROTATE_180,
    (0, 1, -1, 0): TURN.ROTATE_270, (0, -1, 1, 0): TURN.ROTATE_90, (0, 1, 1, 0): TURN.TRANSPOSE, (0, -1, -1, 0): TURN.TRANSVERSE,
}  # fmt: skip


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
            # Not those that an edit list leaves out. What is counted here need not be what is decoded: see below.
            due = [packet.pts for packet in container.demux(stream) if packet.size and not packet.is_discard]
            total = _enough(len(due), where)
            number = _number(wanted, total, rate, where)
            allowance.take(where, number, number * size)
            frames, found, end = _drawn(container, stream, _spread(number, total), allowance, where)
            times = [pts for pts in due if pts is not None]
            if found != total and len(times) == total and end is not None and end >= max(times):
                # Whole, for its end is there: some codecs have packets that show no frame of their own, or several frames.
                total, number = _enough(found, where), min(number, _number(wanted, found, rate, where))
                frames, _, _ = _drawn(container, stream, _spread(number, total), allowance, where)
    except (av.FFmpegError, IndexError, ValueError, AttributeError) as error:  # AttributeError: a codec that is not known
        raise UserError(Problem(where, "is not a video that can be read", "send an MP4 of at least two frames")) from error
    indices = _spread(number, total)
    kept = [at for at in indices if at in frames]  # the last packets of a damaged file give no frame
    if len(kept) < len(indices):
        raise UserError(Problem(where, f"ends after {len(frames)} of {len(indices)} frames", "send a whole file"))
    return Video.of([frames[at] for at in kept], rate, kept, total)


def _enough(total: int, where: str) -> int:
    if total < 2:
        raise UserError(Problem(where, f"has {total} frames", "send it as a picture"))
    return total


def _number(wanted: dict[str, float], total: int, rate: float, where: str) -> int:
    """How many frames are drawn. Raises UserError where qwen_vl_utils does, which rounds nframes to an even number."""
    from qwen_vl_utils.vision_process import smart_nframes  # which imports torch

    try:
        return int(smart_nframes(wanted, total, rate))
    except ValueError as error:
        if "nframes" not in wanted:
            raise
        what = f"nframes is {wanted['nframes']}, in pairs {round(wanted['nframes'] / 2) * 2}, and it has {total} frames"
        raise UserError(Problem(where, what, f"send an even number from 2 to {total // 2 * 2}")) from error


def _spread(number: int, total: int) -> list[int]:
    """Which frames, from first to last."""
    return [round(step * (total - 1) / (number - 1)) for step in range(number)]


def _drawn(
    container: Any, stream: Any, indices: list[int], allowance: Allowance, where: str
) -> tuple[dict[int, Image.Image], int, int | None]:
    """The frames at these places, upright; how many there are in all, and the time of the last one that has a time."""
    container.seek(0)
    keep, found, end = set(indices), 0, None
    frames: dict[int, Image.Image] = {}
    size = stream.width, stream.height  # which follows the frames as they are decoded
    for at, frame in enumerate(container.decode(stream)):
        allowance.take(where)
        if (frame.width, frame.height) != size:
            raise UserError(Problem(where, "has frames of several sizes", "send frames of one size"))
        if at in keep:
            frames[at] = _upright(frame, where)
        found, end = at + 1, frame.pts if frame.pts is not None else end
    return frames, found, end


def _upright(frame: Any, where: str) -> Image.Image:
    """A frame as a player shows it: phones film lying on their side and say so in a matrix."""
    image: Image.Image = frame.to_image()
    if (matrix := frame.side_data.get("DISPLAYMATRIX")) is None:
        return image
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(matrix))  # what is at (x, y) goes to (ax + cy, bx + dy), y downwards
    signs = tuple((value > 0) - (value < 0) for value in (a, b, c, d))
    if signs not in TURNS:
        raise UserError(Problem(where, "is turned by an angle that is no quarter of a circle", "turn it, and send it upright"))
    turn = TURNS[signs]
    return image if turn is None else image.transpose(turn)
