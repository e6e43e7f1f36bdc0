"""Reads a conversation in the form that people send: OpenAI's, Qwen's or DashScope's parts, mixed as they like.

    read_messages([{"role": "user", "content": [{"type": "image", "image": "chart.png"}, {"type": "text", "text": "read"}]}])

A picture is a path, file://, data:, http(s) or a PIL image; a video a file of the same kinds or a list of pictures.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from qwenvl_ft.data.brought import decoded
from qwenvl_ft.data.fetch import fetch
from qwenvl_ft.data.formats.keys import OF_QWEN
from qwenvl_ft.data.pictures import as_seen, check_aspect, decode
from qwenvl_ft.data.reading import AS_FOUND, Reading
from qwenvl_ft.data.records import Part, Picture, Turn, Video
from qwenvl_ft.data.sources import paths_of
from qwenvl_ft.data.videos import OPTIONS, Allowance, Drawing, check_number, read_video, several_sizes
from qwenvl_ft.errors import Problem, UserError

MOST_MESSAGES, MOST_PARTS = 1000, 10_000
ROLES = ("system", "user", "assistant")
FRAMES = "data:video/jpeg;base64,"
Fetch = Callable[[str], bytes]


def open_anywhere(source: str) -> bytes:
    """The bytes of a path, file:// or http(s) URL: for a user's own messages, never for those that come over a network."""
    if source.startswith(("http://", "https://")):
        return fetch(source)
    paths = paths_of(source)
    path = Path(next(filter(os.path.exists, paths), paths[0]))
    if os.path.isdir(path):
        raise UserError(Problem(source, "is a folder", "name a file of it, or of a film's frames the list of their files"))
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in it
        what = error.strerror if isinstance(error, OSError) else error
        raise UserError(Problem(source, f"cannot be read ({what})", "give the path of a file")) from error


def read_messages(messages: Sequence[Any], open_source: Fetch = open_anywhere, allowance: Allowance | None = None,
                  reading: Reading = AS_FOUND, tools: bool = False, goes_on: bool = False) -> list[Turn]:  # fmt: skip
    """The messages with their pictures and videos open. `open_source` brings what is not a data: URL; `reading` says how videos
    are drawn that do not say it themselves. With `tools` there may be their answers, and calls, which the caller keeps; with
    `goes_on` the assistant's text at the end is what an answer begins with.

    Raises UserError with the problems of all messages.
    """
    opening = _Opening(open_source, allowance or Allowance(), reading)
    problems: list[Problem] = []
    found = []
    if not isinstance(messages, list | tuple) or not messages:
        raise UserError(Problem("messages", "is no list of messages", 'send [{"role": "user", "content": "..."}]'))
    contents = [message.get("content") for message in messages if isinstance(message, dict)]
    if len(messages) > MOST_MESSAGES or sum(len(content) for content in contents if isinstance(content, list)) > MOST_PARTS:
        raise UserError(Problem("messages", f"are more than {MOST_MESSAGES}, or have over {MOST_PARTS} parts", "send fewer"))
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ROLES and not (tools and role == "tool"):
            problems.append(Problem(f"{where}.role", f"is {str(role)[:40]!r}", f"write one of {', '.join(ROLES)}"))
            continue
        if message.get("tool_calls") and not tools:
            problems.append(Problem(f"{where}.tool_calls", "are not read", "ask with a Record of its turns and tools"))
            continue
        try:
            parts = tuple(opening.parts(message.get("content"), f"{where}.content"))
        except UserError as error:
            problems += error.problems
            continue
        if role != "user" and not all(isinstance(part, str) for part in parts):
            problems.append(Problem(f"{where}.content", f"shows a picture to the {role}", "show it in a message of the user"))
        found.append(Turn(role, parts))
    if problems:
        raise UserError(*problems)
    if (found[-1].role == "assistant") != goes_on:
        what, fix = ("end with the assistant", "end with a message of the user")
        if goes_on:
            what, fix = (
                "do not end with the assistant",
                "end with what the answer is to begin with, or leave continue_final_message out",
            )
        raise UserError(Problem("messages", what, fix))
    return found


@dataclass(frozen=True)
class _Opening:
    """How the media of one conversation are opened."""

    open_source: Fetch
    allowance: Allowance
    reading: Reading

    def parts(self, content: Any, where: str) -> Iterator[Part]:
        if isinstance(content, str):
            yield content
            return
        if not isinstance(content, list | tuple) or not content:
            fix = 'send "..." or [{"type": "text", "text": "..."}]'
            raise UserError(Problem(where, "is neither text nor a list of parts", fix))
        for number, part in enumerate(content):
            place = f"{where}[{number}]"
            if isinstance(part, str):
                yield part
                continue
            kind = _kind(part, place)
            _check_options(part, kind, place)
            source = part[kind]
            if isinstance(source, dict):  # OpenAI's {"image_url": {"url": ...}}
                source = source.get("url")
            if kind == "text":
                if not isinstance(source, str):
                    raise UserError(Problem(place, "its text is no text", "send a string"))
                yield source
                continue
            bounds: dict[str, Any] = {key: _count(part, key, place) for key in ("min_pixels", "max_pixels")}
            if kind.startswith("image"):
                yield Picture.of(self.image(source, _named(place, source)), **bounds)
            else:
                yield replace(self.video(part, source, _named(place, source)), **bounds)

    def image(self, source: Any, place: str) -> Image.Image:
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
        return decoded(source, place) if source.startswith("data:") else self.open_source(source)

    def video(self, part: dict[str, Any], source: Any, place: str) -> Video:
        """A video sampled as Qwen does: `fps` frames a second, or `nframes` of them, rounded to pairs."""
        drawing = Drawing.of(part, place, self.reading)
        if isinstance(source, str) and source.startswith(FRAMES):  # vLLM's form of a list of frames
            source = [f"data:image/jpeg;base64,{frame}" for frame in source[len(FRAMES) :].split(",", drawing.max_frames)]
        if not isinstance(source, list | tuple):
            return read_video(self.data(source, place), place, drawing, self.allowance)
        check_number(len(source), place, drawing)
        frames = tuple(self.image(one, f"{place}[{number}]") for number, one in enumerate(source))
        if len({frame.size for frame in frames}) > 1:
            raise several_sizes(place, [frame.size for frame in frames])
        return Video.of(frames, drawing.fps, range(len(frames)), len(frames))


def _named(place: str, source: Any) -> str:
    """The place, with the name that the caller gave."""
    return f"{place} ({source})" if isinstance(source, str | Path) and len(str(source)) < 200 else place


def _kind(part: Any, place: str) -> str:
    """The key that holds what the part is: its `type` says which, without one its only key does; null is none."""
    kinds = ("text", "image", "image_url", "video", "video_url")
    found = [key for key in kinds if isinstance(part, dict) and part.get(key) is not None]
    said = part.get("type") if isinstance(part, dict) else None
    if said is not None and said not in kinds:
        raise UserError(Problem(f"{place}.type", f"is {str(said)[:40]!r}", f"write one of {', '.join(kinds)}"))
    if len(found) != 1:
        raise UserError(Problem(place, "is not one part", "send text, image, image_url, video or video_url, one of them a part"))
    if said and said.removesuffix("_url") != found[0].removesuffix("_url"):
        raise UserError(Problem(place, f"its type is {said}, and it holds {found[0]}", "send what its type says"))
    return found[0]


def _check_options(part: dict[str, Any], kind: str, place: str) -> None:
    """Raises UserError for what would change what is seen, and is not followed, or not where it stands. Other keys are left alone:
    clients send many."""
    within = part[kind] if isinstance(part[kind], dict) else {}
    unread = {key: fix for key, fix in OF_QWEN.items() if part.get(key) is not None or within.get(key) is not None}
    unread |= {key: f'write it beside "{kind}", not within' for key in OPTIONS if within.get(key) is not None}
    if unread:
        raise UserError(*(Problem(place, f'has a key "{key}", which is not read', fix) for key, fix in unread.items()))


def _count(part: dict[str, Any], key: str, place: str) -> int | None:
    value = part.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise UserError(Problem(f"{place}.{key}", f"is {value!r}", "send a whole number of pixels"))
    return value
