"""What only a tool can find in records: looked for while they go by, none of them kept, a line of each kind at the end.

A record leaves 8 bytes here and a picture that is shrunk 12; what evaluation shows is held whole. `Checks.join` adds what was seen
of the records behind.
"""

import hashlib
import math
import re
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwenvl_ft.data import sources
from qwenvl_ft.data.chat import IGNORE, Script
from qwenvl_ft.data.geometry import Limits, resized, shrunk
from qwenvl_ft.data.media_position import placed
from qwenvl_ft.data.meta_file import Meta, stream_records
from qwenvl_ft.data.numbers import Spool
from qwenvl_ft.data.reading import AS_FOUND, Reading
from qwenvl_ft.data.records import Box, Medium, Part, Picture, Record, Source, Video
from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.folders.hashes import digests, user_cache

NEARLY_ALL = 0.95  # of a picture's area
LONG_ANSWER = 20  # letters; shorter ones stand in many a question that offers a choice
PICTURE_NUMBER = re.compile(r"(?:[Pp]icture|[Ii]mage) ([1-9][0-9]?)\b")  # more digits are a year, or a name
PLACE = re.compile(r"(.*?)(0|[1-9][0-9]{0,17})([^0-9]*)", re.DOTALL)  # its last number, as far as 8 bytes and its zeros allow
SORTED = 2**20  # hashes at a time, about
STRETCH = 2**16  # hashes that are read at a time
MOST_SHRUNK = 100_000  # showings of pictures, before those of the same one are made one
BARS = "▁▂▃▄▅▆▇█"
PICTURES, BOXES, ANSWERS = "numbered pictures", "boxes", "answers"
KINDS = {  # (one, several), what
    PICTURES: (("record speaks", "records speak"), "of a picture by a number that is more than it has pictures"),
    BOXES: (("box covers", "boxes cover"), f"{NEARLY_ALL:.0%} of its picture or more, so that it tells no place"),
    ANSWERS: (("answer stands", "answers stand"), "in the question before it word for word"),
}


class Against:
    """The records of evaluation: their hashes, and their media by size, each with the place of the first that shows it.

    `num_missed` are those that could not be read, and so are not compared.
    """

    def __init__(self) -> None:
        self.hashes: dict[int, str] = {}
        self.media: dict[Source, str] = {}
        self.sizes: dict[tuple[int, int], set[int | None]] = {}  # height, width: bytes, None where these are not known
        self.num_missed = 0

    @classmethod
    def read(cls, meta: Meta, data_dir: Path | None, reading: Reading = AS_FOUND) -> "Against":
        """Those of a meta-file. Raises UserError for a file that is not there or breaks."""
        against = cls()
        for found in stream_records(meta, data_dir, reading):
            if not found.where:
                raise UserError(*found.problems)
            if found.record:
                against.add(found.record)
            against.num_missed += bool(found.problems)
        return against

    def add(self, record: Record) -> None:
        """One more record."""
        self.hashes.setdefault(hash_of(record), record.where)
        for medium in record.media:
            if isinstance(medium.source, Source):
                self.media.setdefault(medium.source, record.where)
                self.sizes.setdefault((medium.height, medium.width), set()).add(medium.num_bytes)

    def may_show(self, medium: Medium) -> bool:
        """Whether one of its media has that size."""
        theirs = self.sizes.get((medium.height, medium.width), set())
        return bool(theirs) and (medium.num_bytes is None or medium.num_bytes in theirs or None in theirs)


class Places:
    """The places of records in their order; those of one file, numbered one after another, are one entry."""

    def __init__(self) -> None:
        self.runs: list[tuple[int, str, int, str]] = []  # the first record, what stands before its number, the number or -1, behind
        self.count = 0

    def add(self, where: str) -> None:
        """One more."""
        found = PLACE.fullmatch(where)
        before, number, behind = (found[1], int(found[2]), found[3]) if found else (where, -1, "")
        self._run(before, number, behind)
        self.count += 1

    def join(self, other: "Places") -> None:
        """Those behind it."""
        mine = self.count
        for start, before, number, behind in other.runs:
            self.count = mine + start
            self._run(before, number, behind)
        self.count = mine + other.count

    def _run(self, before: str, number: int, behind: str) -> None:
        if self.runs and number >= 0:
            start, *last = self.runs[-1]
            if last == [before, number - (self.count - start), behind]:  # the next one
                return
        self.runs.append((self.count, before, number, behind))

    def __getitem__(self, at: int) -> str:
        start, before, number, behind = self.runs[bisect_right(self.runs, at, key=lambda run: run[0]) - 1]
        return before if number < 0 else f"{before}{number + at - start}{behind}"


class Checks:
    """`limits` and scripts are those of a model, where there is one; `against` are the records of evaluation, if there are."""

    def __init__(self, limits: Limits | None = None, against: Against | None = None):
        self.limits, self.against = limits, against
        self.hashes = Spool("u8")  # of each record
        self.places = Places()
        self.taught: Counter[int] = Counter()  # records by the tokens that they teach
        self.bins: Counter[int] = Counter()  # scripts by the number of bits of their length
        self.shrunk, self.factors = array("Q"), array("f")  # the hash of each picture that is, and how often its side is longer
        self.most_shrunk = MOST_SHRUNK
        self.worst: tuple[float, str, str] = (0, "", "")
        self.counts: Counter[str] = Counter()
        self.first: dict[str, str] = {}
        self.media: dict[Source, str] = {}  # those that may be evaluation's, too

    def add(self, record: Record, scripts: Sequence[Script] = ()) -> None:
        """One more record, once however often it counts by its weight."""
        self.hashes.extend(np.array([hash_of(record)], np.uint64))
        self.places.add(record.where)
        if scripts:
            self.taught[sum(len(script.labels) - script.labels.count(IGNORE) for script in scripts)] += 1
        for script in scripts:
            self.bins[script.length.bit_length()] += 1
        pictures = record.pictures
        if self.limits and scripts:  # without, some bound cannot be kept
            for picture in pictures:
                self._shrunk(picture, self.limits.of(picture))
        if self.against:
            for medium in record.media:
                if isinstance(medium.source, Source) and self.against.may_show(medium):
                    self.media.setdefault(medium.source, record.where)
        self._count(PICTURES, any(_numbered_above(turn.text, len(pictures)) for turn in record.turns), record.where)
        boxes = [box for turn in record.turns for box in turn.boxes]
        self._count(BOXES, sum(_covers(box, pictures) for box in boxes), record.where)
        for asked, answer in zip(record.turns, record.turns[1:], strict=False):
            if answer.role == "assistant" and answer.taught and asked.role == "user":
                said = answer.text.strip()
                self._count(ANSWERS, len(said) >= LONG_ANSWER and said in asked.text, record.where)

    def join(self, other: "Checks") -> None:
        """What was seen of the records behind these."""
        self.places.join(other.places)
        self.hashes.extend(other.hashes[:])
        self.shrunk.extend(other.shrunk)
        self.factors.extend(other.factors)
        self.taught.update(other.taught)
        self.bins.update(other.bins)
        self.worst = max(self.worst, other.worst)
        for kind, count in other.counts.items():
            self._count(kind, count, other.first[kind])
        if len(self.shrunk) > self.most_shrunk:
            self._once_each()
            self.most_shrunk = max(MOST_SHRUNK, 2 * len(self.shrunk))
        self.media = other.media | self.media

    def facts(self) -> dict[str, Any]:
        """For a program: by its name what was found of each kind with its `note`, and what is so of any records as it is `shown`.

        Files that may be the same are hashed here. Raises UserError for what cannot be read any more.
        """
        found: dict[str, Any] = {}
        if self.against:
            found["pictures_of_evaluation"] = self._same_media(self.against)
            found["records_of_evaluation"] = self._same_records(self.against)
            if missed := self.against.num_missed:
                what = (
                    "records of evaluation cannot be read and are" if missed > 1 else "record of evaluation cannot be read and is"
                )
                note = f"{missed:,} {what} not compared"
                found["not_compared"] = {"count": missed, "note": note}
        found["duplicate_records"] = self._duplicates()
        for kind, ((one, several), what) in KINDS.items():
            if count := self.counts[kind]:
                note = f"{count:,} {several if count > 1 else one} {what} ({self.first[kind]} for one)"
                found[kind.replace(" ", "_")] = {"count": count, "first": self.first[kind], "note": note}
        found["pictures_shrunk"] = self._shrinking()
        if self.taught:
            least, middle, most = min(self.taught), median(self.taught), max(self.taught)
            shown = f"{least:,} to {most:,} a record, median {middle:,}"
            found["taught_tokens"] = {"min": least, "median": middle, "max": most, "shown": shown}
            found["tokens"] = self._histogram()
        return {name: fact for name, fact in found.items() if fact}

    def _count(self, kind: str, count: int, where: str) -> None:
        if count:
            self.counts[kind] += count
            self.first.setdefault(kind, where)

    def _shrunk(self, picture: Picture, limits: Limits) -> None:
        factor = _factor(picture.height, picture.width, limits)
        if factor > 1 and isinstance(picture.source, Source):
            name = sources.key(picture.source)
            self.shrunk.append(_hash(name.encode("utf-8", "surrogatepass")))
            self.factors.append(factor)
            if factor > self.worst[0]:
                height, width = resized(picture.height, picture.width, limits)
                size = f"{picture.width} x {picture.height} px becomes {width} x {height}"
                self.worst = max(self.worst, (factor, f"{picture.name}, {size}", picture.name))

    def _shrinking(self) -> dict[str, Any] | None:
        if not self.shrunk:
            return None
        self._once_each()
        count, middle = len(self.shrunk), float(np.median(np.frombuffer(self.factors, np.float32)))
        some = f"{count:,} pictures are" if count > 1 else "1 picture is"
        note = f"{some} shrunk, each side to 1/{middle:.1f} at the median, to 1/{self.worst[0]:.1f} at worst: {self.worst[1]}"
        return {
            "count": count,
            "median": round(middle, 3),
            "worst": round(self.worst[0], 3),
            "first": self.worst[2],
            "note": note,
        }

    def _once_each(self) -> None:
        """Forgets of a picture that is shown again all but the first."""
        hashes, at = np.unique(np.frombuffer(self.shrunk, np.uint64), return_index=True)
        factors = np.frombuffer(self.factors, np.float32)[at]
        self.shrunk, self.factors = array("Q", hashes.tobytes()), array("f", factors.tobytes())

    def _duplicates(self) -> dict[str, Any] | None:
        count, again = _repeated(self.hashes)
        if not count:
            return None
        first, where = self.places[_place(self.hashes, int(self.hashes[again : again + 1][0]))], self.places[again]
        some = f"{count:,} records repeat earlier ones" if count > 1 else "1 record repeats an earlier one"
        note = f"{some}, turns and pictures alike ({where} is {first} again)"
        return {"count": count, "first": where, "note": note}

    def _same_records(self, against: Against) -> dict[str, Any] | None:
        theirs, count, first = np.fromiter(against.hashes, np.uint64), 0, len(self.hashes)
        for start, mine in _stretches(self.hashes):
            same = np.flatnonzero(np.isin(mine, theirs))
            count, first = count + len(same), min(first, start + int(same.min(initial=first)))
        if not count:
            return None
        where, other = self.places[first], against.hashes[int(self.hashes[first : first + 1][0])]
        some = f"{count:,} records are" if count > 1 else "1 record is"
        note = f"{some} in evaluation, too, turns and pictures alike ({where} is {other})"
        return {"count": count, "first": where, "note": note}

    def _same_media(self, against: Against) -> dict[str, Any] | None:
        """By content. A file that cannot be read is left to those who name such files."""
        theirs = _digests(against.media) if self.media else {}
        by_digest: dict[str, Source] = {}
        for source, digest in theirs.items():
            by_digest.setdefault(digest, source)
        same = [(source, by_digest[digest]) for source, digest in _digests(self.media).items() if digest in by_digest]
        if not same:
            return None
        mine, other = same[0]
        some = f"{len(same):,} pictures or videos are" if len(same) > 1 else "1 picture or video is"
        places = f"{self.media[mine]} shows {mine.name}, and {against.media[other]} the same as {other.name}"
        return {"count": len(same), "first": self.media[mine], "note": f"{some} in evaluation, too, by content: {places}"}

    def _histogram(self) -> dict[str, Any]:
        bits = range(min(self.bins), max(self.bins) + 1)
        most = max(self.bins.values())
        bars = [BARS[math.ceil(self.bins[of] / most * len(BARS)) - 1] if self.bins[of] else " " for of in bits]
        shown = "  ".join(f"{2 ** (of - 1):,} {bar} {self.bins[of]:,}" for of, bar in zip(bits, bars, strict=True))
        return {"from": {str(2 ** (of - 1)): self.bins[of] for of in bits}, "shown": f"from tokens up, how many examples: {shown}"}


def _repeated(hashes: Spool) -> tuple[int, int]:
    """How many of the hashes stood there before, and the place of the first that did. A share of them is sorted at a time."""
    shares = np.uint64(2 ** (len(hashes) // SORTED).bit_length())
    count, first = 0, len(hashes)
    for share in range(int(shares)):
        places, found = [np.zeros(0, np.int64)], [np.zeros(0, np.uint64)]
        for start, some in _stretches(hashes):
            mine = np.flatnonzero(some % shares == share)
            places.append(start + mine)
            found.append(some[mine])
        at, of = np.concatenate(places), np.concatenate(found)
        order = np.argsort(of, kind="stable")
        again = at[order[1:][of[order[1:]] == of[order[:-1]]]]
        count, first = count + len(again), int(again.min(initial=first))
    return count, first


def _place(hashes: Spool, wanted: int) -> int:
    """Of the first that is so."""
    return next(start + int(found[0]) for start, some in _stretches(hashes) if len(found := np.flatnonzero(some == wanted)))


def _stretches(hashes: Spool) -> Iterator[tuple[int, NDArray[np.uint64]]]:
    """All of them, some at a time, each time with the place of the first."""
    for start in range(0, len(hashes), STRETCH):
        yield start, hashes[start : start + STRETCH]


def median(counts: Counter[int]) -> int:
    """Of numbers that are counted; between two of them, rounded down."""
    numbers = sorted(counts)
    until = np.cumsum([counts[number] for number in numbers])
    total = int(until[-1])
    low, high = (numbers[int(np.searchsorted(until, at, side="right"))] for at in ((total - 1) // 2, total // 2))
    return (low + high) // 2


def token_counts(lengths: Counter[int]) -> dict[str, int]:
    """min, median, max and total of lengths that are counted, as the commands print them."""
    lengths = lengths or Counter([0])
    total = sum(length * count for length, count in lengths.items())
    return {"min": min(lengths), "median": median(lengths), "max": max(lengths), "total": total}


def notes_of(facts: dict[str, Any]) -> list[str]:
    """What was found, a line each."""
    return [fact["note"] for fact in facts.values() if "note" in fact]


def hash_of(record: Record) -> int:
    """8 bytes of all that a record shows and says, its media on whichever side of the text; the same in every process."""
    texts = [*record.tools]
    for turn in placed(record, "first").turns:
        texts += [turn.role, *map(str, turn.calls), *map(_named, turn.parts)]
    return _hash("\0".join(texts).encode("utf-8", "surrogatepass"))


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def _named(part: Part) -> str:
    if not isinstance(part, Picture | Video):
        return part if isinstance(part, str) else f"\0{part}"
    files = part.source if isinstance(part.source, tuple) else (part.source,)
    names = [sources.key(file) if isinstance(file, Source) else str(id(file)) for file in files]
    return "\0".join(["", part.kind, *names, *([str(part.fps), str(len(part.indices))] if isinstance(part, Video) else [])])


@lru_cache(4096)
def _factor(height: int, width: int, limits: Limits) -> float:
    """How often a side of the picture is longer than what the model sees of it; 1 where nothing but rounding was done."""
    return math.sqrt(height * width / math.prod(resized(height, width, limits))) if shrunk(height, width, limits) else 1.0


def _numbered_above(text: str, number: int) -> bool:
    """Whether the text speaks of a picture by a higher number. Looks for the bare word first, which is much quicker."""
    if "icture " not in text and "mage " not in text:
        return False
    return any(int(found) > number for found in PICTURE_NUMBER.findall(text))


def _covers(box: Box, pictures: Sequence[Picture]) -> bool:
    if len(box.corners) != 4 or not 0 <= box.picture < len(pictures):
        return False
    picture, (left, top, right, bottom) = pictures[box.picture], box.corners
    return (right - left) * (bottom - top) >= NEARLY_ALL * picture.height * picture.width


def _digests(media: Iterable[Source]) -> dict[Source, str]:
    """Raises UserError for what cannot be read any more."""
    files = [source for source in media if isinstance(source, Path)]
    hashed = digests(files, user_cache(), "comparing with evaluation") if files else {}
    found: dict[Source, str] = dict(hashed.items())
    for source in media:
        if not isinstance(source, Path):
            try:
                found[source] = hashlib.sha256(sources.read(source)).hexdigest()
            except OSError as error:
                raise UserError(Problem(sources.place(source), f"cannot be read ({error})", "copy it again")) from error
    return found
