"""The texts of the documented form: media named in tags where they are seen, and placeholders of media that stand beside the turns.

The newline after a tag or a placeholder belongs to it.

    {"conversations": [{"from": "user", "value": "<img>two_col_103562.png</img>\\nHow many titles had Ferrari won?"},
                       {"from": "assistant", "value": "16"}]}
"""

import re
from collections.abc import Iterator
from typing import Protocol

from qwenvl_ft.data.formats.keys import Complaints
from qwenvl_ft.data.records import CONTROL_TOKEN, Part

OPEN, CLOSE = "<img>", "</img>"
OPEN_VIDEO, CLOSE_VIDEO = "<video>", "</video>"
PLACEHOLDERS = {"<image>": "image", "<video>": "video"}
TAG = re.compile(r"<img>|<image>|<video>")
# Tags that peers read, in another case, too: what a user meant as a picture would train as text. HTML's have attributes.
FOREIGN_TAG = re.compile(r"<(?:(?i:image|video|audio)|(?!img)(?i:img))>|</(?i:image)>")
TAG_FIXES = {
    "<video>": "write <video>clip.mp4</video>",
    "<audio>": "sound is not trained on: leave the record out, or take the tag out if the talk needs none",
}
SURROGATE = re.compile("[\ud800-\udfff]")


class TagMedia(Protocol):
    """Gives the scanner what its tags stand for; None for what has been complained about."""

    def named(self, kind: str, name: str, place: str) -> Part | None:
        """The medium of a tag."""

    def next(self, kind: str) -> Part | None:
        """The medium of a placeholder."""

    def lists(self, kind: str) -> bool:
        """Whether there are media beside the turns, for which placeholders stand."""


def check_text(text: str, place: str, complaints: Complaints) -> None:
    """Says what no text may hold, whoever speaks."""
    if "<|" in text and (match := CONTROL_TOKEN.search(text)):
        complaints.say(place, f"holds the control token {match[0]}", "take it out: it would end the turn or pose as a picture")
    if not text.isascii() and SURROGATE.search(text):
        fix = "write the character itself, in UTF-8"
        complaints.say(place, "holds half of a surrogate pair, which no tokenizer can read", fix)


def check_untagged(text: str, role: str, place: str, media: TagMedia, complaints: Complaints) -> None:
    """Says where a text that is not the user's names a picture."""
    if OPEN in text or CLOSE in text:
        complaints.say(place, f"an <img> tag stands in the {role}'s turn", "name pictures in the user's turns only")
    for tag, kind in PLACEHOLDERS.items():
        if media.lists(kind) and tag in text:
            complaints.say(place, f"{tag} stands in the {role}'s turn", "show pictures and videos in the user's turns only")
            for _ in range(text.count(tag)):  # so that it is not said to be missing, too
                media.next(kind)


def read_parts(text: str, place: str, media: TagMedia, complaints: Complaints) -> Iterator[Part]:
    """Texts and media of a user's text. A scanner of linear time: the obvious regular expression is quadratic in unclosed tags."""
    if "<" not in text:
        if text:
            yield text
        return
    at, foreign = 0, ""
    while at < len(text):
        found = TAG.search(text, at)
        said = text[at:] if found is None else text[at : found.start()]
        if CLOSE in said:
            complaints.say(place, "an </img> has no <img> before it", "write <img>file.png</img>")
        if said:
            foreign = foreign or ("" if (match := FOREIGN_TAG.search(said)) is None else match[0])
            yield said
        if found is None:
            break
        part: Part | None = None
        at = found.end()
        if found[0] == OPEN:
            end = text.find(CLOSE, at)
            if end < 0:
                complaints.say(place, "an <img> tag is not closed", "write <img>file.png</img>")
                break
            part = media.named("image", text[at:end].strip(), place)
            at = end + len(CLOSE)
        elif found[0] == OPEN_VIDEO and (end := _video_end(text, at)) > at:
            part = media.named("video", text[at:end].strip(), place)
            at = end + len(CLOSE_VIDEO)
        elif media.lists(PLACEHOLDERS[found[0]]):
            part = media.next(PLACEHOLDERS[found[0]])
            closing = f"</{found[0][1:]}"  # which some write directly behind it
            at += len(closing) * text.startswith(closing, at)
        else:
            foreign = foreign or found[0]
            part = found[0]
        if text.startswith("\r\n", at):
            at += 2
        elif text.startswith("\n", at):
            at += 1
        if part is not None:
            yield part
    if foreign:
        fix = TAG_FIXES.get(foreign.lower(), "write <img>file.png</img>")
        complaints.say(place, f"holds {foreign}, which is no tag here: it would be read as text", fix)


def _video_end(text: str, at: int) -> int:
    """Where the tag that was opened before `at` is closed; -1 for a placeholder, after which another one may come."""
    following = text.find(OPEN_VIDEO, at)
    return text.find(CLOSE_VIDEO, at, len(text) if following < 0 else following)
