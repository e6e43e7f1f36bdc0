"""Records as the model sees them: one in the terminal, or many in a page for a browser."""

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from PIL import Image

from qwenvl_ft.console import Drawing, draw_panel
from qwenvl_ft.data.chat import IGNORE, PICTURE, Chat, Script
from qwenvl_ft.data.meta_file import MetaFile, OnRecord
from qwenvl_ft.data.page import BEGINNING, Frame, Look, Shown, page
from qwenvl_ft.data.pictures import opened
from qwenvl_ft.data.records import Box, Medium, Picture, Record
from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.folders.whole import writing

PLACE = re.compile(r"(.*?)(?:\[(\d+)\]|:(\d+))(?![^.:\s])")  # a record's, with which the places within it begin
PAGE_BYTES = 45_000  # of a record in the page: 200 take 9 MB
TOKEN_BYTES = 8  # of them for a token's text and its borders
FRAMES = 8  # of a video that are drawn
FRAME_SHARE = 0.25  # of the bytes of a picture
MOST_SIDE_PX, LEAST_SIDE_PX = 768, 48
LEAST_BYTES = 800  # of a picture, in which something can be seen


def draw_record(script: Script, chat: Chat) -> Drawing:
    """The record as the model sees it: pictures as blocks with their tokens, what is taught in green."""
    pieces: list[tuple[str, str]] = []
    pictures = zip(script.media, script.grids, script.counts, strict=True)
    merge = chat.limits.merge_size
    tokens = zip(script.ids, script.labels, strict=True)
    for (is_picture, is_taught), run in groupby(tokens, lambda of: (of[0] in script.placeholders, of[1] != IGNORE)):
        ids = [token for token, _ in run]
        if not is_picture:
            said = chat.said(ids)
            pieces.append((said, "bold green" if is_taught else "" if "<|" not in said else "bright_black"))
            continue
        for picture, (_, rows, columns), count in islice(pictures, len(ids)):
            size = f"{picture.width} x {picture.height} px, {columns // merge} x {rows // merge} = {count} tokens"
            pieces.append((f" ▦ {picture.name}: {size} ", "#101010 on #5fd7d7"))
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


def draw_page(
    name: str, found: MetaFile, chat: Chat, start: int, limit: int, on_medium: OnRecord = lambda done, total: None
) -> Page:
    """The records from number `start` on, in the order of their file, those that cannot be read, too, `limit` of them at most.

    `on_medium(done, total)` is called after each picture or video that was opened. Raises UserError where there is no record.
    """
    places, elsewhere = in_order(found)
    chosen = places[start : start + limit]
    if not chosen:
        last = f"; the last one is {places[-1][0]}" if places else ""
        raise UserError(
            *elsewhere, *[Problem(name, f"has no record {start}", f"count from 0{last}")] * bool(places or not elsewhere)
        )
    cards = [_shown(where, of, chat) for where, of in chosen]
    looks = see([script for card in cards for script in card.scripts], chat, len(cards), on_medium)
    scripts = [card.scripts[-1] for card in cards if card.scripts]
    bad = [card for card in cards if card.problems or any(looks[id(of)].problem for script in card.scripts for of in script.media)]
    taught = sum(label != IGNORE for card in cards for script in card.scripts for label in script.labels)
    total = sum(script.length for script in scripts)
    facts = [
        (f"{found.num_records:,}", "records in the file"),
        (f"{len(cards):,}", "shown here"),
        (f"{len(bad):,}", "with problems"),
        (f"{total:,}", "tokens"),
        (f"{taught:,}", "taught"),
    ]
    for kind, what in (("image", "pictures"), ("video", "videos")):
        if number := sum(medium.kind == kind for script in scripts for medium in script.media):
            facts.append((f"{number:,}", what))
    return Page(page(name, cards, chat, looks, facts, elsewhere), len(cards), len(bad))


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


def in_order(found: MetaFile) -> tuple[list[tuple[str, Record | list[Problem]]], list[Problem]]:
    """Each record of the file, or what keeps it from being read, with its place; and the problems of no record."""
    places: dict[str, Record | list[Problem]] = {record.where: record for record in found.records}
    elsewhere: list[Problem] = []
    for problem in found.problems:
        place = PLACE.match(problem.where)
        held = places.setdefault(place[0], []) if place and found.num_records else elsewhere
        if isinstance(held, list):
            held.append(problem)
        else:
            elsewhere.append(problem)
    files = {name: number for number, name in enumerate(dict.fromkeys(map(_file_of, places)))}
    return sorted(places.items(), key=lambda of: (files[_file_of(of[0])], _number_of(of[0]))), elsewhere


def _file_of(where: str) -> str:
    place = PLACE.match(where)
    return place[1] if place else where


def _number_of(where: str) -> int:
    place = PLACE.match(where)
    return int(place[2] or place[3]) if place else 0


def _shown(where: str, of: Record | list[Problem], chat: Chat) -> Shown:
    if isinstance(of, list):
        return Shown(where, [], problems=of)
    try:
        scripts = chat.write_scripts(of)
    except UserError as error:
        return Shown(where, [], problems=error.problems)
    return Shown(where, scripts, [part for turn in of.turns for part in turn.parts if isinstance(part, Box)])


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
        images = medium.images
        chosen = sorted({round(step * (len(images) - 1) / (FRAMES - 1)) for step in range(FRAMES)}) if images else []
        return Look([Frame(_small(images[at], size, most_bytes), medium.indices[at] / medium.fps) for at in chosen])
    except UserError as error:
        return Look([], error.problems[0])


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
