"""Which media entries name, before any of them is looked at: those of a folder at an address are brought many at a time."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path

from qwenvl_ft.data.brought import is_elsewhere
from qwenvl_ft.data.files.entry import Entry
from qwenvl_ft.data.formats import read_entry
from qwenvl_ft.data.formats.talk import Named, Options
from qwenvl_ft.data.media import MOST_LETTERS, Media
from qwenvl_ft.data.reading import Reading
from qwenvl_ft.data.records import Picture, Video
from qwenvl_ft.errors import Problem, UserError

ENTRIES = 512  # whose media are brought together
SIDE = 1000  # px, of every picture that was not seen yet


class Names:
    """Stands for a folder of media, and only notes what is asked of it."""

    def __init__(self, reading: Reading):
        self.reading, self.found = reading, list[str]()

    def picture(self, name: Named, where: str) -> Picture:
        """One that nobody has seen."""
        self._note(name)
        return Picture(Path(), SIDE, SIDE)

    def video(self, name: Named | Sequence[Named], where: str, options: Options) -> Video:
        """One that nobody has seen."""
        for one in [name] if isinstance(name, str) or not isinstance(name, Sequence) else name:
            self._note(one)
        return Video(Path(), SIDE, SIDE, 1.0, (0, 1), 2)

    def _note(self, name: Named) -> None:
        if isinstance(name, str) and len(name) <= MOST_LETTERS and not is_elsewhere(name):
            self.found.append(name)


def brought(entries: Iterator[Entry], media: Media) -> Iterator[Entry]:
    """The entries, with the media that they name; where the folder of these is no copy of one elsewhere, as they come."""
    if media.mirror is None:
        yield from entries
        return
    while some := list(islice(entries, ENTRIES)):
        wanted = dict[str, None]()
        for entry in some:
            names = Names(media.reading)
            if not isinstance(entry.value, Problem):
                with suppress(UserError):
                    read_entry(entry.value, entry.where, names, [], media.reading)
            wanted |= dict.fromkeys(name for name in names.found if name not in entry.beside)
        media.bring(wanted)
        yield from some
