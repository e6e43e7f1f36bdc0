"""Whether a user's turn has its pictures and videos before its text or behind it, and a record with them moved to the other side.

A model that was only ever taught one of both may answer the other at random.
"""

from collections.abc import Sequence
from dataclasses import replace
from hashlib import blake2b
from itertools import pairwise

from qwenvl_ft.data.records import Part, Picture, Record, Turn, Video
from qwenvl_ft.values import MediaPosition


def placed(record: Record, position: MediaPosition) -> Record:
    """The record with the media of each user's turn where `position` has them, their order kept; with `both` one side for the whole
    record, always the same, drawn by its place in the meta-file. A turn whose media stand among its text is left as it is.

    The same object where nothing is moved.
    """
    if position == "both":
        drawn = blake2b(record.where.encode("utf-8", "surrogatepass"), digest_size=1).digest()[0]
        position = "first" if drawn % 2 else "last"
    if position == "as_written" or not any(_movable(turn, position) for turn in record.turns):
        return record
    return replace(record, turns=tuple(_moved(turn) if _movable(turn, position) else turn for turn in record.turns))


def beside(media: Sequence[Part], text: str, position: MediaPosition) -> tuple[Part, ...]:
    """What a user's turn is asked as by our own commands: its media first, but last where every record was taught so."""
    return (text, *media) if position == "last" else (*media, text)


def position_of(record: Record) -> str | None:
    """Where the media of the user's turns stand: `first`, `last`, or `mixed`. None where no turn has both media and text."""
    found = {side for turn in record.turns if (side := _side(turn))}
    return found.pop() if len(found) == 1 else "mixed" if found else None


def _side(turn: Turn) -> str | None:
    media = [_is_medium(part) for part in turn.parts]
    if turn.role != "user" or all(media) or not any(media):
        return None
    changes = sum(one != other for one, other in pairwise(media))
    return "mixed" if changes > 1 else "first" if media[0] else "last"


def _movable(turn: Turn, position: str) -> bool:
    return _side(turn) == {"first": "last", "last": "first"}[position]


def _moved(turn: Turn) -> Turn:
    """Its media on the other side of its text."""
    border = next(at for at, part in enumerate(turn.parts) if _is_medium(part) != _is_medium(turn.parts[0]))
    return replace(turn, parts=(*turn.parts[border:], *turn.parts[:border]))


def _is_medium(part: Part) -> bool:
    return isinstance(part, Picture | Video)
