"""Finds the pictures and videos that records name: each once, its header read, its name set right where that can be.

A name is resolved against one folder and must lie inside it.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from unicodedata import normalize
from urllib.parse import unquote

from qwenvl_ft.data import sources
from qwenvl_ft.data.brought import bring, is_elsewhere
from qwenvl_ft.data.formats.documented import OPEN
from qwenvl_ft.data.formats.talk import Named, Options
from qwenvl_ft.data.mirror import called, mirror_of
from qwenvl_ft.data.pictures import size_of
from qwenvl_ft.data.reading import Reading
from qwenvl_ft.data.records import Picture, Source, Video
from qwenvl_ft.data.sizes import Sizes
from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.folders.cache import cache_folder

NUMBER, ZEROS = re.compile(r"\d+"), re.compile(r"(?<!\d)0+(?=\d)")
MOST_FOLDERS = 8  # of a name, the last of which may be what is meant
MAX_COMPARED = 200_000  # file names that missing ones are compared with, 50 µs each: a folder of them must not take hours
MOST_SEEN = 50_000  # names that are remembered: a million of them would be half a gigabyte, and to look again takes 15 µs
MOST_LETTERS = 4096  # of a name that is remembered
FOLDER_KEYS = "(train_data_dir, --data-dir)"  # what a config calls it, and the commands without one


class Media:
    """The pictures and videos of one folder; of each file the header is read once, and never again while the file stays as it is.

    `beside` are the media that lie with the entry that is being read, by name: they come first.
    """

    def __init__(self, folder: Path, reading: Reading):
        self.folder, self.reading = called(folder), reading
        self.root = folder.resolve()
        self.mirror = mirror_of(folder)
        self.sizes = Sizes(cache_folder())
        self.beside: Mapping[str, Source] = {}
        self.seen: dict[str, Picture] = {}
        self.real: dict[str, str] = {}  # of a name's folder, what it is in truth; nothing for one that is not inside
        self.stamps: dict[Path, sources.Stamp] = {}  # of tars and tables
        self.one_is_there = False
        self.missing: dict[Problem, str] = {}  # of each its name
        self.misspelt: set[str] = set()  # of them those that are there in another spelling
        self.compared = 0

    def bring(self, names: Iterable[str]) -> None:
        """Has the copies of these here, where the folder is elsewhere; those that are not there, or not within it, are left out.

        Raises UserError where whoever has them cannot be reached.
        """
        if self.mirror and (wanted := list(filter(None, names))):
            self.mirror.bring(wanted)

    @cached_property
    def files(self) -> list[tuple[str, list[str]]]:
        """(name, its numbers) of every file below the folder."""
        if self.mirror and self.mirror.listing:
            return [(name, NUMBER.findall(_plain(name))) for name in self.mirror.listing]
        found = [os.path.relpath(os.path.join(top, file), self.root) for top, _, files in os.walk(self.root) for file in files]
        return [(name, NUMBER.findall(_plain(name))) for name in found]

    @cached_property
    def by_plain_name(self) -> dict[str, list[str]]:
        """The files by their plain names, with their folders and without."""
        found: dict[str, list[str]] = {}
        for name, _ in self.files:
            for plain in {_plain(name), _plain(name).rpartition("/")[2]}:
                found.setdefault(plain, []).append(name)
        return found

    def meant(self, name: str) -> str | None:
        """The one file whose plain name is that of `name`, or of `name` without its first folders, first in the same ones."""
        parts = [part for part in _plain(name).split("/") if part not in ("", ".")][-MOST_FOLDERS:]
        for start in range(len(parts)):
            plain = "/".join(parts[start:])
            names = self.by_plain_name.get(plain, [])
            for some in ([of for of in names if _plain(of) == plain], names):
                if len(some) == 1:
                    return some[0]
        return None

    def close_to(self, name: str) -> str | None:
        """A file with a name like it, never one with another number; of the first missing ones only, see MAX_COMPARED."""
        self.compared += len(self.files)
        if self.compared > MAX_COMPARED:
            return None
        numbers = NUMBER.findall(_plain(name))
        candidates = [file for file, of_file in self.files if not numbers or not of_file or of_file == numbers]
        return next(iter(get_close_matches(name, candidates, 1, cutoff=0.8)), None)

    def none_is_there(self, problems: list[Problem]) -> list[Problem]:
        """The problems, with one in place of each picture's where none was found: the folder is the wrong one.

        Not where most names stand there in another spelling: then the folder is right.
        """
        names = list(dict.fromkeys(self.missing.values()))
        if self.one_is_there or len(names) < 2 or 2 * len(self.misspelt) > len(names):
            return problems
        what = f"none of the {len(names):,} pictures is in this folder, {names[0][:120]} for one"
        fix = f"is it the right folder {FOLDER_KEYS}?"
        if (first := next(iter(self.missing))).fix.startswith("did you mean"):
            fix += f" For that one: {first.fix}"
        return [Problem(str(self.folder), what, fix), *(problem for problem in problems if problem not in self.missing)]

    def picture(self, name: Named, where: str) -> Picture:
        """Raises UserError where the name is no readable picture inside the folder."""
        source = name if not isinstance(name, str) else self.beside.get(name)
        if source is not None:
            return self._measured(source, where)
        assert isinstance(name, str)
        if name in self.seen:
            return self.seen[name]
        if len(self.seen) >= MOST_SEEN:
            self.seen.clear()
        try:
            if len(name) > MOST_LETTERS:  # it holds the file itself
                return self._measured(self._file(name, where), where)
            return self.seen.setdefault(name, self._known(name) or self._measured(self._file(name, where), where))
        except UserError as error:  # alike but for the name
            raise _alike(error, name) from None

    def video(self, name: Named | Sequence[Named], where: str, options: Options) -> Video:
        """A film, or the frames of one: by name, in a list, or all pictures of a folder in their natural order.

        Raises UserError where it is none that can be read, or is not inside the folder.
        """
        from qwenvl_ft.data.videos import measured  # and PyAV, which pictures can do without

        if isinstance(name, Sequence) and not isinstance(name, str):
            found: Source | list[Source] = [self._source(frame, where) for frame in name]
        else:
            source = self._source(name, where, or_folder=True)
            found = self._frames(source, where) if isinstance(source, Path) and source.is_dir() else source
        if found == []:
            raise UserError(Problem(where, f"{name} is a folder without pictures", "name a film, or a folder of its frames"))
        return measured(found, where, options, self.reading)

    def _frames(self, folder: Path, where: str) -> list[Source]:
        """The frames of a folder, none of which may be a link out of ours."""
        found = sources.frames_of(folder)
        return [self._file(str(path.relative_to(self.root)), where) if path.is_symlink() else path for path in found]

    def _source(self, name: Named, where: str, or_folder: bool = False) -> Source:
        if not isinstance(name, str):
            return name
        try:
            return self.beside.get(name) or self._file(name, where, or_folder)
        except UserError as error:
            raise _alike(error, name) from None

    def _known(self, name: str) -> Picture | None:
        """A file whose header was read before and that is as it was then: no look at it but one for its size and time."""
        parent, _, file = name.rpartition("/")
        folder = self.real.get(parent)
        if folder is None:
            if len(self.real) >= MOST_SEEN:
                self.real.clear()
            folder = self.real.setdefault(parent, self._real(parent))
        if not folder:
            return None
        path = f"{folder}{os.sep}{file}"
        try:
            state = os.stat(path)
        except (OSError, ValueError):
            return None
        size = self.sizes.get(f"{path}\0{state.st_size}\0{state.st_mtime_ns}")
        if size is None:  # so are links, folders and pipes: sizes are kept by the names of real files
            return None
        self.one_is_there = True
        return Picture(Path(path), *size, num_bytes=state.st_size)

    def _real(self, parent: str) -> str:
        try:
            path = (self.root / parent).resolve()
            return str(path) if path.is_relative_to(self.root) and path.is_dir() else ""
        except (OSError, ValueError, RuntimeError):
            return ""

    def _measured(self, source: Source, where: str) -> Picture:
        """The picture of a source; its size is kept for the next run."""
        stamp = self._stamp(source)
        text = f"{sources.key(source)}\0{stamp.num_bytes}\0{stamp.mtime_ns}" if stamp else ""
        size = self.sizes.get(text) if text else None
        if size is None:
            size = size_of(source, where)
            if text:
                self.sizes.add(text, *size)
        return Picture(source, *size, num_bytes=sources.num_bytes(source))

    def _stamp(self, source: Source) -> sources.Stamp | None:
        try:
            if isinstance(source, Path):
                return sources.stamp(source)
            if source.path not in self.stamps:
                self.stamps[source.path] = sources.stamp(source)
            return self.stamps[source.path]
        except OSError:
            return None

    def _file(self, name: str, where: str, or_folder: bool = False) -> Path:
        """The file of a name."""
        if not name:
            raise UserError(Problem(where, "an <img> tag is empty", "write <img>file.png</img>"))
        if OPEN in name:
            raise UserError(Problem(where, "an <img> tag stands inside another", "close the first one: <img>file.png</img>"))
        if name.startswith("file://"):
            paths = sources.paths_of(name)
            name = next((path for path in paths if os.path.exists(self.root / path)), paths[0])
        if is_elsewhere(name):
            if self.reading.fetch_media:
                return bring(name, where)
            what = "holds the file itself" if name.startswith("data:") else "is not a file name"
            fix = f"put the file into {self.folder} and name it"
            if name.startswith(("data:", "http://", "https://")):
                fix = f"set fetch_media: true to bring such files once, or {fix}"
            raise UserError(Problem(where, f"{name[:60]} {what}", fix))
        try:
            path = (self.root / name).resolve()
            inside = path.is_relative_to(self.root)
            if self.mirror and inside and not path.exists():
                self.bring([name])
            there = inside and path.exists()
        except (OSError, ValueError, RuntimeError):  # a NUL, a name too long, a loop of links
            inside, there = True, False
        if not inside:
            raise UserError(Problem(where, f"{name} lies outside {self.folder}", "copy it into that folder"))
        if not there:
            if meant := self.meant(name):
                self.misspelt.add(name)
            close = meant or self.close_to(name)
            fix = f"did you mean {close}?" if close else f"copy it there, or give the right folder {FOLDER_KEYS}"
            kind = "missing, with a name like it" if close else "missing"
            problem = Problem(where, f"{name[:120]} is not in {self.folder}", fix, kind)
            self.missing[problem] = name
            raise UserError(problem)
        self.one_is_there = True
        if not path.is_file() and not (or_folder and path.is_dir()):
            raise UserError(Problem(where, f"{name} is not a regular file", "name a picture file"))
        return path


def _alike(error: UserError, name: str) -> UserError:
    """The problems of several names as of one kind."""
    ours = (name[:120], name[:60], Path(name).name)
    return UserError(*(replace(problem, kind=problem.kind or _without(problem, ours)) for problem in error.problems))


def _plain(name: str) -> str:
    """A name without what differs between machines: case, %20, the form of accents, \\ for /, zeros before a number."""
    plain = normalize("NFC", unquote(name)).casefold().replace("\\", "/")
    return ZEROS.sub("", plain.removeprefix("./"))


def _without(problem: Problem, names: Sequence[str]) -> str:
    text = f"{problem.what}\n{problem.fix}"
    for name in names:
        text = text.replace(name, "") if name else text
    return NUMBER.sub("0", text)
