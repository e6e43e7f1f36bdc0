"""Records as the model sees them: one in the terminal, or many in a page for a browser."""

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from PIL import Image

from qwenvl_ft.console import Drawing, draw_panel
from qwenvl_ft.data.chat import IGNORE, PICTURE, Chat, Script
from qwenvl_ft.data.geometry import tokens_of
from qwenvl_ft.data.meta_file import Found, OnRecord, Tally
from qwenvl_ft.data.page import BEGINNING, Frame, Look, Shown, media_of, page, places
from qwenvl_ft.data.pictures import opened
from qwenvl_ft.data.records import Medium, Picture, Video
from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.folders.whole import writing

PAGE_BYTES = 45_000  # of a record in the page: 200 take 9 MB
TOKEN_BYTES = 8  # of them for a token's text and its borders
FRAMES = 8  # of a video that are drawn
FRAME_SHARE = 0.25  # of the bytes of a picture
MOST_SIDE_PX, LEAST_SIDE_PX = 768, 48
LEAST_BYTES = 800  # of a picture, in which something can be seen


def draw_record(script: Script, chat: Chat) -> Drawing:
    """The record as the model sees it: pictures as blocks with their tokens, what is taught in green."""
    pieces: list[tuple[str, str]] = []
    merge = chat.limits.merge_size
    rest = zip(places(script, merge), script.counts, strict=True)
    tokens = zip(script.ids, script.labels, strict=True)
    for (is_medium, is_taught), run in groupby(tokens, lambda of: (of[0] in script.placeholders, of[1] != IGNORE)):
        ids = [token for token, _ in run]
        if not is_medium:
            said = chat.said(ids)
            pieces.append((said, "bold green" if is_taught else "" if "<|" not in said else "bright_black"))
            continue
        for (number, is_first), count in islice(rest, len(ids)):
            medium, (frames, rows, columns) = script.media[number], script.grids[number]
            shape = f"{columns // merge} x {rows // merge}{f' x {frames}' * (frames > 1)}"
            size = f"{medium.name}: {medium.width} x {medium.height} px, {shape} = {tokens_of(script.grids[number], merge)} tokens"
            pieces.append((f" ▦ {size if is_first else f'{count} tokens'} ", "#101010 on #5fd7d7"))
    taught = sum(label != IGNORE for label in script.labels)
    return draw_panel(pieces, script.where, f"{script.length} tokens, {taught} taught (green); {PICTURE} widened")


def facts_of(script: Script, chat: Chat) -> dict[str, Any]:
    """What `qwenvl-ft show --json` prints: ids and labels with pictures at their real number of tokens."""
    ids, labels = script.widened()
    taught = chat.taught_texts(script)
    return {"ids": ids, "labels": labels, "text": chat.said(ids), "taught": taught, "grids": script.grids}


@dataclass(frozen=True)
class Page:
    """A page as HTML, how many records it shows, and how many of these have a problem."""

    html: str
    num_shown: int
    num_bad: int


@dataclass(frozen=True)
class Cut:
    """Some of a meta-file's entries, from number `start` on; problems of no single entry; whether more entries follow."""

    start: int
    found: Sequence[Found]
    elsewhere: Sequence[Problem]
    more: bool


def cut_out(found: Iterable[Found], tally: Tally, start: int, limit: int, on_record: OnRecord) -> Cut:
    """Reads no further than the page goes, or than one record more. Raises UserError where it would be empty.

    `on_record(done, total)` is called after each.
    """
    chosen: list[Found] = []
    elsewhere: list[Problem] = []
    number, last, more = 0, "", False
    for of in found:
        if not of.where:
            elsewhere += of.problems
            continue
        if more := len(chosen) == limit:
            break
        if number >= start:
            chosen.append(of)
        number, last = number + 1, of.where
        on_record(number, start + limit)
    if not chosen:
        fix = f"count from 0; the last one is {last}"
        raise UserError(*elsewhere, *([Problem("--start", f"there is no record {start}", fix)] if last else []))
    mine = [problem for of in chosen for problem in of.problems]
    folder = [problem for problem in tally.said_once(mine) if problem not in mine]  # where it is the wrong one
    return Cut(start, chosen, [*folder, *elsewhere], more)


def draw_page(name: str, cut: Cut, chat: Chat, on_medium: OnRecord = lambda done, total: None) -> Page:
    """These records as one page. `on_medium(done, total)` is called after each picture or video that was opened."""
    cards = [_shown(of, chat) for of in cut.found]
    looks = see([script for card in cards for script in card.scripts], chat, len(cards), on_medium)
    scripts = [card.scripts[-1] for card in cards if card.scripts]  # of a record's examples the last has the whole talk
    num_bad = sum(bool(card.problems) or any(looks[id(medium)].problem for medium in media_of(card)) for card in cards)
    facts = [
        (len(cards), "records"),
        (num_bad, "with problems"),
        (sum(script.length for script in scripts), "tokens"),
        (sum(label != IGNORE for card in cards for script in card.scripts for label in script.labels), "taught"),
    ]
    for kind, what in (("image", "pictures"), ("video", "videos")):
        facts.append((sum(medium.kind == kind for script in scripts for medium in script.media), what))
    last = cut.start + len(cards) - 1
    rest = f"Records {cut.start:,} to {last:,}; the next ones: --start {last + 1}" if cut.more or cut.start else ""
    rest = rest if cut.more else rest.split(";")[0]
    return Page(page(name, cards, chat, looks, [fact for fact in facts if fact[0]], cut.elsewhere, rest), len(cards), num_bad)


def check_page(out: Path) -> None:
    """Raises UserError where a page would replace what is no page, such as the meta-file."""
    if out.is_dir():
        raise UserError(Problem(str(out), "is a folder", "give the name of a file in it: page.html"))
    if out.is_file():
        with out.open("rb") as file:
            if not file.read(len(BEGINNING)).startswith(BEGINNING.encode()):
                raise UserError(Problem(str(out), "is there and is no page of this command", "give another name, or delete it"))


def write_page(drawn: Page, out: Path) -> None:
    """Raises UserError where the disk refuses it."""
    with writing(out):
        out.write_text(drawn.html, encoding="utf-8")


def _shown(found: Found, chat: Chat) -> Shown:
    record = found.record
    if record is None:
        return Shown(found.where, [], problems=found.problems)
    try:
        scripts = chat.write_scripts(record)
    except UserError as error:
        return Shown(found.where, [], problems=error.problems)
    boxes = [box for turn in record.turns for box in turn.boxes if box.corners]
    return Shown(found.where, scripts, boxes)


def see(scripts: Sequence[Script], chat: Chat, num_records: int, on_medium: OnRecord) -> dict[int, Look]:
    """How each medium of the scripts looks, by its id(), small enough that the page keeps to its size; each file is opened once."""
    media = {id(medium): (medium, grid) for script in scripts for medium, grid in zip(script.media, script.grids, strict=True)}
    distinct = {_key(medium, grid): (medium, grid) for medium, grid in media.values()}
    text_bytes = TOKEN_BYTES * sum(len(script.ids) for script in scripts)
    shares = sum(1 if isinstance(medium, Picture) else FRAME_SHARE * FRAMES for medium, _ in distinct.values())
    most_bytes = (PAGE_BYTES * max(200, num_records) - text_bytes) / max(1.0, shares)
    looks: dict[Any, Look] = {}
    for done, (key, (medium, grid)) in enumerate(distinct.items(), start=1):
        size = grid[2] * chat.limits.patch_size, grid[1] * chat.limits.patch_size
        looks[key] = _look(medium, size, most_bytes * (1 if isinstance(medium, Picture) else FRAME_SHARE))
        on_medium(done, len(distinct))
    return {number: looks[_key(medium, grid)] for number, (medium, grid) in media.items()}


def _key(medium: Medium, grid: tuple[int, int, int]) -> Any:
    """The same for media that look the same. An image in memory, which cannot be hashed, is like itself alone."""

    def of(source: Any) -> Any:
        return id(source) if isinstance(source, Image.Image) else source

    source = medium.source
    return (tuple(map(of, source)) if isinstance(source, tuple) else of(source)), medium.kind, grid, getattr(medium, "indices", ())


def _look(medium: Medium, size: tuple[int, int], most_bytes: float) -> Look:
    try:
        if isinstance(medium, Picture):
            return Look([Frame(_small(opened(medium), size, most_bytes))])
        from qwenvl_ft.data.videos import frames  # and PyAV, which pictures can do without

        some = few_frames(medium)
        urls = frames(some, lambda image: _small(image, size, most_bytes))
        return Look([Frame(url, at / some.fps) for url, at in zip(urls, some.indices, strict=True)])
    except UserError as error:
        return Look([], error.problems[0])


def few_frames(video: Video) -> Video:
    """The video with FRAMES of its frames at most, from the first to the last."""
    last = len(video.indices) - 1
    chosen = sorted({round(step * last / (FRAMES - 1)) for step in range(FRAMES)})
    source = tuple(video.source[at] for at in chosen) if isinstance(video.source, tuple) else video.source
    return replace(video, source=source, indices=tuple(video.indices[at] for at in chosen))


def _small(image: Image.Image, size: tuple[int, int], most_bytes: float) -> str:
    """The image as the model sees it, made smaller until it takes `most_bytes` at most as a data: URL."""
    most = max(LEAST_BYTES, most_bytes * 3 / 4)  # base64 takes four letters for three bytes
    side = min(max(size), MOST_SIDE_PX)
    while True:
        scale = side / max(size)
        image = image.resize((max(1, round(size[0] * scale)), max(1, round(size[1] * scale))), Image.Resampling.BICUBIC)
        file = BytesIO()
        image.save(file, "WEBP", quality=78, method=2)
        if len(file.getvalue()) <= most or side <= LEAST_SIDE_PX:
            return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
        side = max(LEAST_SIDE_PX, int(side * min(0.9, (most / len(file.getvalue())) ** 0.6)))
