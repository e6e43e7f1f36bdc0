"""What is allowed in records and probably not meant, counted while they go by: none of them is kept.

The tags that the first Qwen-VL's data has are no tokens of later families; white space before an answer is learnt, too.
"""

import re
from collections import Counter
from collections.abc import Iterable

from qwenvl_ft.data.records import Record

BOX_TAG = re.compile(r"</?(?:ref|box|quad)>")
NOTES = {
    ("record holds", "records hold"): "<ref> or <box>, which is taught as letters: Qwen2-VL and later have no such tokens",
    ("answer begins", "answers begin"): "with white space, which is taught as it stands: take it out if it is not meant",
}
Kind = tuple[str, str]  # one, several
TAGGED, SPACED = NOTES


class Noted:
    """How often each was met, and where first."""

    def __init__(self, records: Iterable[Record] = ()):
        self.counts: Counter[Kind] = Counter()
        self.first: dict[Kind, str] = {}
        for record in records:
            self.add(record)

    def add(self, record: Record) -> None:
        """One more record."""
        self._count(TAGGED, any(BOX_TAG.search(turn.text) for turn in record.turns), record.where)
        answers = [turn for turn in record.turns if turn.role == "assistant" and turn.taught]
        self._count(SPACED, sum(turn.text[:1].isspace() for turn in answers), record.where)

    def join(self, other: "Noted") -> None:
        """What was met behind it."""
        for kind, count in other.counts.items():
            self._count(kind, count, other.first[kind])

    def _count(self, kind: Kind, count: int, where: str) -> None:
        if count:
            self.counts[kind] += count
            self.first.setdefault(kind, where)

    @property
    def lines(self) -> list[str]:
        """A line of each kind."""
        return [
            f"{self.counts[kind]:,} {kind[self.counts[kind] > 1]} {what} ({self.first[kind]} for one)"
            for kind, what in NOTES.items()
            if kind in self.counts
        ]
