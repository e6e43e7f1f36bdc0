"""What every container yields."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from qwenvl_ft.data.records import Source


class Entry(NamedTuple):
    """A record as it was found: `value` is what JSON can hold, with a Source in place of a name where a medium lies within the
    container; or a Problem.

    `where` is "" of a Problem of the whole file. `beside` are the media that lie with it, by name; where it is `shared`, other
    records have them, too. `empty` are the columns of a table that hold nothing here. It `has_unread` a json of a tar
    that is no talk, beside a text.
    """

    where: str
    value: Any
    beside: Mapping[str, Source] = {}
    shared: bool = False
    empty: Sequence[str] = ()
    has_unread: bool = False
