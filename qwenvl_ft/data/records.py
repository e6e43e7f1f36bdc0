"""The nouns: a record is a conversation of turns, a turn has texts, pictures and videos in their order.

Record("train.json[3]", (Turn("user", (Picture(Path("a.png"), 40, 50), "How many?")), Turn("assistant", ("16",))))
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from PIL import Image

# What ends a turn or poses as a picture. Boxes and references (<|box_start|> ...) are left alone: Qwen2-VL reads and says them.
CONTROL_TOKEN = re.compile(r"<\|(?:endoftext|im_start|im_end|vision_start|vision_end|vision_pad|image_pad|video_pad)\|>")


@dataclass(frozen=True)
class Picture:
    """A picture: a file whose header was read, or an image in memory; its size in px as it will be seen, EXIF orientation applied.

    The bounds, in px, replace the processor's own for it. `num_bytes` is the file's size when its header was read.
    """

    source: Path | Image.Image
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
        return self.source.name if isinstance(self.source, Path) else ""


@dataclass(frozen=True)
class Video:
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


Medium = Picture | Video
Part = str | Medium


@dataclass(frozen=True)
class Turn:
    """`role` is system, user or assistant; `parts` are texts and media in their order; `taught` is false for an answer that is
    shown and not learnt.

    Neighbouring texts become one part: a control token in halves would be whole again once a template has joined them.
    """

    role: str
    parts: tuple[Part, ...]
    taught: bool = True

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
        return [part for part in self.parts if not isinstance(part, str)]

    @property
    def text(self) -> str:
        """Its texts, joined."""
        return "".join(part for part in self.parts if isinstance(part, str))


@dataclass(frozen=True)
class Record:
    """One conversation; `where` is its place in the meta-file, such as train.json[3]."""

    where: str
    turns: tuple[Turn, ...]

    @property
    def pictures(self) -> list[Picture]:
        """Every picture of the conversation in its order."""
        return [part for turn in self.turns for part in turn.media if isinstance(part, Picture)]
