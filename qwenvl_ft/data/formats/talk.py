"""What a reader of a form makes of an entry, before it is checked: its turns as they are said, and what stands beside them."""

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from qwenvl_ft.data.records import Picture, Source, Video

Named = str | Source  # a medium by its file's name, or where its bytes lie
Options = Mapping[str, Any]  # fps, nframes, min_pixels, max_pixels ... of one medium

NO_OPTIONS: Options = MappingProxyType({})


class Finder(Protocol):
    """Finds the media of a record. Both raise UserError for what is no readable one."""

    def picture(self, name: Named, where: str) -> Picture:
        """The picture of that name."""

    def video(self, name: Named | Sequence[Named], where: str, options: Options) -> Video:
        """The film of that name, or that of those frames."""


class Listed(NamedTuple):
    """A medium beside the turns, or as a part of one."""

    name: Any
    place: str
    options: Options = NO_OPTIONS


class Shown(NamedTuple):
    """A part of a user's turn that is a medium; without `listed` it is the next of those beside the turns."""

    kind: str  # image or video
    listed: Listed | None


class Said(NamedTuple):
    """One turn. `role` is that of a Turn, "call" for a turn that only calls tools, None for one that nobody knows.

    `content` is its text, or a user's texts and media in their order. None: it cannot be read, which has been said.
    """

    place: str
    role: str | None
    content: str | list[str | Shown] | None
    taught: bool | None = None
    calls: tuple[str, ...] = ()


class Talk(NamedTuple):
    """One entry. Where `front` is true and no text holds a placeholder, the media come before the first user's text.

    OpenAI's own examples have a user's text and pictures in several turns: where turns are `in_parts`, a user may go on.
    """

    said: Iterator[Said]
    pictures: Sequence[Listed] = ()
    videos: Sequence[Listed] = ()
    tools: tuple[str, ...] = ()
    objects: Any = None
    metric: str = ""
    front: bool = False
    in_parts: bool = False
