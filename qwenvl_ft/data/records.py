"""The nouns: a record is a conversation of turns, a turn has texts, boxes, pictures and videos in their order.

Record("train.json[3]", (Turn("user", (Picture(Path("a.png"), 40, 50), "How many?")), Turn("assistant", ("16",))))
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from PIL import Image

# What ends a turn or poses as a picture. Boxes and references (<|box_start|> ...) are left alone: Qwen2-VL reads and says them.
CONTROL_TOKEN = re.compile(r"<\|(?:endoftext|im_start|im_end|vision_start|vision_end|vision_pad|image_pad|video_pad)\|>")


@dataclass(frozen=True)
class InTar:
    """A file within a tar that is not unpacked: its `num_bytes` begin at `offset`."""

    path: Path
    name: str
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class InTable:
    """The bytes that a row of a parquet or Arrow file holds in `column`; `item` counts where the column holds lists, else -1."""

    path: Path
    name: str
    column: str
    row: int
    item: int = -1


Source = Path | InTar | InTable  # where the bytes of a picture or a video lie


@dataclass(frozen=True)
class Picture:
    """A picture: a source whose header was read, or an image in memory; its size in px as it will be seen, EXIF applied.

    The bounds, in px, replace the processor's own for it. `num_bytes` is the file's size when its header was read.
    """

    source: Source | Image.Image
    height: int
    width: int
    min_pixels: int | None = None
    max_pixels: int | None = None
    num_bytes: int | None = field(default=None, compare=False)
    kind: ClassVar[str] = "image"

    @classmethod
    def of(cls, image: Image.Image, min_pixels: int | None = None, max_pixels: int | None = None) -> "Picture":
        """An image in memory."""
        return cls(image, image.height, image.width, min_pixels, max_pixels)

    @property
    def name(self) -> str:
        """The file's name; nothing for an image in memory."""
        return "" if isinstance(self.source, Image.Image) else self.source.name


@dataclass(frozen=True)
class Video:
    """Frames of one size, `height` x `width` px as they will be seen: those at `indices` of the `num_frames` that pass at `fps` a
    second.

    `source` is the film, or the frames themselves, each a source or an image in memory. The bounds, in px of a frame, replace
    the processor's own for it. `num_bytes` is the film's size when its header was read.
    """

    source: Source | tuple[Source | Image.Image, ...]
    height: int
    width: int
    fps: float
    indices: tuple[int, ...]
    num_frames: int
    min_pixels: int | None = None
    max_pixels: int | None = None
    num_bytes: int | None = field(default=None, compare=False)
    kind: ClassVar[str] = "video"

    @classmethod
    def of(cls, frames: Sequence[Image.Image], fps: float, indices: Sequence[int], num_frames: int) -> "Video":
        """Frames in memory."""
        return cls(tuple(frames), frames[0].height, frames[0].width, fps, tuple(indices), num_frames)

    @property
    def images(self) -> list[Image.Image]:
        """Its frames that are in memory."""
        frames = self.source if isinstance(self.source, tuple) else ()
        return [frame for frame in frames if isinstance(frame, Image.Image)]

    @property
    def name(self) -> str:
        """The film's name, or its first frame's; nothing for frames in memory."""
        source = self.source[0] if isinstance(self.source, tuple) else self.source
        return "" if isinstance(source, Image.Image) else source.name


@dataclass(frozen=True)
class Box:
    """A place in a picture, in px of the picture as it is seen and before it is resized: x1, y1, x2, y2, or a point x, y. Without
    corners it names what is somewhere and does not say where.

    `label` is what is there. `picture` counts the record's pictures from 0. Of a `bare` one only the numbers are written: the JSON
    around them, which says more than a box and a label, is text of the record.
    """

    corners: tuple[float, ...]
    label: str = ""
    picture: int = 0
    bare: bool = False


Medium = Picture | Video
Part = str | Medium | Box
Call = str | tuple[str | Box, ...]  # a JSON object of name and arguments; where there are boxes in it, in pieces


@dataclass(frozen=True)
class Turn:
    """`role` is system, user, assistant or tool; `parts` are texts, boxes and media in their order; `taught` is false for an answer
    that is shown and not learnt; `calls` are an assistant's calls of tools.

    Neighbouring texts become one part: a control token in halves would be whole again once a template has joined them.
    """

    role: str
    parts: tuple[Part, ...]
    taught: bool = True
    calls: tuple[Call, ...] = ()

    def __post_init__(self) -> None:
        joined: list[Part] = []
        for part in self.parts:
            if joined and isinstance(part, str) and isinstance(joined[-1], str):
                joined[-1] += part
            else:
                joined.append(part)
        object.__setattr__(self, "parts", tuple(joined))

    @property
    def media(self) -> list[Medium]:
        """Its pictures and videos in their order."""
        return [part for part in self.parts if isinstance(part, Picture | Video)]

    @property
    def boxes(self) -> list[Box]:
        """Its boxes in their order, those of its calls last."""
        pieces = [*self.parts, *(piece for call in self.calls if not isinstance(call, str) for piece in call)]
        return [piece for piece in pieces if isinstance(piece, Box)]

    @property
    def text(self) -> str:
        """Its texts, joined, without its boxes: those are text once `Chat.written` has written them for a model."""
        return "".join(part for part in self.parts if isinstance(part, str))


@dataclass(frozen=True)
class Record:
    """One conversation; `where` is its place in the meta-file, such as train.json[3]; `tools` are those that the model is told of,
    each a JSON object; `metric` is how its answers are scored, where it says so.
    """

    where: str
    turns: tuple[Turn, ...]
    tools: tuple[str, ...] = ()
    metric: str = ""

    @property
    def media(self) -> list[Medium]:
        """Every picture and video of the conversation in its order."""
        return [medium for turn in self.turns for medium in turn.media]

    @property
    def pictures(self) -> list[Picture]:
        """Every picture of the conversation in its order."""
        return [medium for medium in self.media if isinstance(medium, Picture)]
