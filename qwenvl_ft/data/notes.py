"""What is allowed in records and probably not meant, counted while they go by: none of them is kept.

What looks like a box and is none is taught as it stands; white space before an answer is learnt, too.
"""

import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from qwenvl_ft.data.box_marks import has_numbers, has_tags
from qwenvl_ft.data.records import Record, Turn
from qwenvl_ft.data.template import split_thought


class Note(NamedTuple):
    """What is said of one, of several."""

    one: str
    several: str
    what: str


AS_JSON = "boxes in JSON, which are taught as they stand: set `boxes` to what the numbers are, pixels, unit or thousand"
JSON_BOX = Note("record holds", "records hold", AS_JSON)
TAGGED = Note("record holds", "records hold", "<ref> or <box> without the numbers of a box, which is taught as letters")
SPACED = Note("answer begins", "answers begin", "with white space, which is taught as it stands: take it out if it is not meant")
AS_TEXT = "with a thought, which is taught as text: the model's chat template knows none, and `thinking` changes nothing"
THOUGHT = Note("answer begins", "answers begin", AS_TEXT)
BLANK = Note("record is", "records are", "taught as text alone, since the key or column of pictures or videos is empty there")
UNREAD = Note("record is", "records are", "made of a txt, and the json beside it, which is no talk, is not read")
HTML = Note("question holds", "questions hold", "<img src=...>, which is text here: a picture is shown by <img>file.png</img>")
NOTES = (JSON_BOX, TAGGED, SPACED, THOUGHT, BLANK, UNREAD, HTML)
SOURCE = re.compile(r"<(?:img|image|video)\s[^<>]*src\s*=", re.IGNORECASE)


class Noted:
    """How often each was met, and where first."""

    def __init__(self, records: Iterable[Record] = ()):
        self.counts: Counter[Note] = Counter()
        self.first: dict[Note, str] = {}
        for record in records:
            self.add(record)

    def add_found(self, where: str, is_blank: bool, has_unread: bool) -> None:
        """What was found of a record besides: see `meta_file.Found`."""
        self._count(BLANK, is_blank, where)
        self._count(UNREAD, has_unread, where)

    def add(self, record: Record, thinks: bool = True) -> None:
        """One more record, for a template that knows thoughts, or not."""
        texts = [text for turn in record.turns for text in (turn.text, *turn.calls) if isinstance(text, str)]
        self._count(JSON_BOX, any(map(has_numbers, texts)), record.where)
        self._count(TAGGED, any(map(has_tags, texts)), record.where)
        asked = (turn.text for turn in record.turns if turn.role == "user")
        self._count(HTML, sum("<" in text and SOURCE.search(text) is not None for text in asked), record.where)
        answers = [turn for turn in record.turns if turn.role == "assistant" and turn.taught]
        self._count(SPACED, sum(map(_begins_with_space, answers)), record.where)
        self._count(THOUGHT, 0 if thinks else sum(bool(split_thought(turn.text)[0]) for turn in answers), record.where)

    def join(self, other: "Noted") -> None:
        """What was met behind it."""
        for note, count in other.counts.items():
            self._count(note, count, other.first[note])

    def _count(self, note: Note, count: int, where: str) -> None:
        if count:
            self.counts[note] += count
            self.first.setdefault(note, where)

    @property
    def lines(self) -> list[str]:
        """A line of each kind."""
        return [
            f"{(count := self.counts[note]):,} {note.several if count > 1 else note.one} {note.what} ({self.first[note]} for one)"
            for note in NOTES
            if note in self.counts
        ]


def _begins_with_space(turn: Turn) -> bool:
    first = turn.parts[0] if turn.parts else ""
    return isinstance(first, str) and first[:1].isspace()
