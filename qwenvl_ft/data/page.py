"""Draws records as one page for a browser: each a card with its talk, its pictures as the model sees them, its problems.

Pure: pixels come as URLs in `Look`, and whatever a record holds is escaped here, in `text`. The page asks no network for anything,
and its policy lets no script run but its own.

    page("train.json", [Shown("train.json[0]", chat.write_scripts(record))], chat, looks, facts)
"""

import base64
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from pathlib import Path
from urllib.parse import quote

from qwenvl_ft.console import writable
from qwenvl_ft.data.chat import IGNORE, Chat, Script
from qwenvl_ft.data.geometry import tokens_of
from qwenvl_ft.data.records import Box, Medium, Picture, Video
from qwenvl_ft.errors import Problem

BEGINNING = "<!doctype html>"
START = "<|im_start|>"
COLOURS = 6  # of boxes, told apart by their labels
LABEL_PERCENT = 6  # of a picture's height: nearer to its top, a label stands within its box
WIDEST_PX, TALLEST_PX, NARROWEST_PX = 520, 420, 200  # of a picture in a card
LETTER_TOKENS = 4  # that a letter may take: UTF-8 has up to four bytes
BARS = 24  # of the histogram


@dataclass(frozen=True)
class Frame:
    """A picture, or what a video shows `at_s` seconds after its beginning."""

    url: str
    at_s: float = 0


@dataclass(frozen=True)
class Look:
    """How a medium looks at the size that the model sees: its frame, or some of its frames; else what keeps it from being shown."""

    frames: Sequence[Frame]
    problem: Problem | None = None


@dataclass(frozen=True)
class Shown:
    """What a card is drawn from: a record's examples, none where it could not be read; the boxes of its turns, its problems."""

    where: str
    scripts: Sequence[Script]
    boxes: Sequence[Box] = ()
    problems: Sequence[Problem] = ()


Looks = Mapping[int, Look]  # by the id() of a medium


def page(name: str, cards: Sequence[Shown], chat: Chat, looks: Looks, facts: Sequence[tuple[int, str]],
         problems: Sequence[Problem] = (), rest: str = "") -> str:  # fmt: skip
    """The whole page. `facts` are (number, of what) for its head; `problems` belong to no card; `rest` says where others are."""
    urls = dict.fromkeys(frame.url for look in looks.values() for frame in look.frames)
    numbers = {url: f"p{number}" for number, url in enumerate(urls)}
    said: dict[int, str] = {}
    drawn = [card(shown, chat, looks, numbers, said) for shown in cards]
    script = _asset("page.js")
    own = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    parts = {
        "policy": f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{own}'",
        "name": text(name),
        "style": _asset("page.css"),
        "unit": str(chat.limits.unit_px),
        "facts": "".join(f'<div data-of="{text(what)}"><dt>{text(what)}</dt><dd>{number:,}</dd></div>' for number, what in facts),
        "rest": text(rest),
        "histogram": _histogram([shown.scripts[-1].length for shown in cards if shown.scripts]),
        "problems": _problems(problems),
        "cards": "".join(drawn),
        "pictures": json.dumps({number: url for url, number in numbers.items()}).replace("<", "\\u003c"),
        "script": script,
    }
    # In one pass: what a record holds may look like the name of a part.
    return re.sub(r"\{\{(\w+)\}\}", lambda of: parts[of[1]], _asset("page.html"))


def card(
    shown: Shown, chat: Chat, looks: Looks, numbers: Mapping[str, str] | None = None, said: dict[int, str] | None = None
) -> str:
    """One record. `numbers` are the keys of the URLs that stand elsewhere in the page; `said` caches the texts of ids."""
    numbers, said = numbers or {}, {} if said is None else said
    media = media_of(shown)
    problems = [*shown.problems, *(problem for of in media if id(of) in looks and (problem := looks[id(of)].problem))]
    facts = []
    if shown.scripts:
        script = shown.scripts[-1]
        num_taught = sum(label != IGNORE for of in shown.scripts for label in of.labels)
        facts = [f"{script.length:,} tokens", f'<span class="taught">{num_taught:,} taught</span>']
        for kind, what in (("image", "picture"), ("video", "video")):
            if number := sum(medium.kind == kind for medium in script.media):
                facts.append(f"{number:,} {what}{'s' * (number > 1)}")
    *earlier, last = [example(script, shown.boxes, chat, looks, numbers, said) for script in shown.scripts] or [""]
    if earlier:
        what = f"{len(shown.scripts)} examples, since the template writes earlier turns otherwise; the last one is below"
        earlier = [f"<details><summary>{what}</summary>{'<hr>'.join(earlier)}</details>"]
    where = text(shown.where)
    kinds = ["bad"] * bool(problems) + ["seen"] * bool(media) + ["text"] * bool(shown.scripts and not media)
    return f"""<article class="{" ".join(["card", *kinds])}" id="{where}" aria-label="{where}">
<div class="head"><h2><a href="#{quote(shown.where.encode(errors="replace"))}">{where}</a></h2><p>{" · ".join(facts)}</p></div>
{_problems(problems)}{"".join(earlier)}{last}</article>
"""


def example(
    script: Script, boxes: Sequence[Box], chat: Chat, looks: Looks, numbers: Mapping[str, str], said: dict[int, str]
) -> str:
    """The turns of one example, taught tokens told from others; each medium where its first token stands."""
    special = {id for id, token in chat.tokenizer.get_added_tokens_decoder().items() if token.special}
    start = chat.tokenizer.token_to_id(START)
    figures = _figures(script, boxes, chat, looks, numbers)
    turns: list[list[tuple[int, bool]]] = []
    for token, label in zip(script.ids, script.labels, strict=True):
        if token == start or not turns:
            turns.append([])
        turns[-1].append((token, label != IGNORE))
    return f'<div class="talk">{"".join(_turn(turn, special, figures, script, chat, said) for turn in turns)}</div>'


def _turn(
    tokens: Sequence[tuple[int, bool]], special: set[int], figures: Iterator[str], script: Script, chat: Chat, said: dict[int, str]
) -> str:
    opening = chat.said([token for token, _ in tokens[:8]]).removeprefix(START)
    role = opening.split("\n")[0].strip()
    role = role if role in ("system", "user", "assistant", "tool") else "other"
    end = _head_length(tokens, chat)
    head = _run([tokens[0][0]], "control", chat, said) + _run([token for token, _ in tokens[1:end]], "name", chat, said)
    runs = []
    kinds = groupby(tokens[end:], lambda of: (of[0] in script.placeholders, of[0] in special, of[1]))
    for (is_medium, is_special, is_taught), run in kinds:
        ids = [token for token, _ in run]
        if is_medium:
            runs += [next(figures) for _ in ids]
        else:
            runs.append(_run(ids, " ".join(["control"] * is_special + ["taught"] * is_taught), chat, said))
    return f'<section class="turn {role}"><p class="role">{head}</p><div class="said" dir="auto">{"".join(runs)}</div></section>'


def _head_length(tokens: Sequence[tuple[int, bool]], chat: Chat) -> int:
    """How many tokens say whose turn it is: up to the first line's end, where nothing of it is taught."""
    for number in range(1, min(8, len(tokens)) + 1):
        if tokens[number - 1][1]:
            return number - 1
        if chat.said([tokens[number - 1][0]]).endswith("\n"):
            return number
    return 1


def _run(ids: Sequence[int], kind: str, chat: Chat, said: dict[int, str]) -> str:
    """Tokens of one kind; where one ends stands in UTF-16 units, as the page's script counts letters."""
    if not ids:
        return ""
    pieces = list(letters(ids, chat, said))
    ends = " ".join(f"{_utf16(piece)}{f'*{count}' * (count > 1)}" for piece, count in pieces)
    return f'<span class="run {kind}" data-ends="{ends}">{text("".join(piece for piece, _ in pieces))}</span>'


def letters(ids: Sequence[int], chat: Chat, said: dict[int, str]) -> Iterator[tuple[str, int]]:
    """(text, number of tokens) of each token, or of the few that make one letter together."""
    at = 0
    while at < len(ids):
        if ids[at] not in said:
            said[ids[at]] = chat.said([ids[at]])
        piece, count = said[ids[at]], 1
        while "\ufffd" in piece and count < LETTER_TOKENS and at + count < len(ids):
            count += 1
            piece = chat.said(ids[at : at + count])
        yield piece, count
        at += count


def media_of(shown: Shown) -> list[Medium]:
    """Every medium of a record's examples, once."""
    return list({id(medium): medium for script in shown.scripts for medium in script.media}.values())


def places(script: Script, merge_size: int) -> Iterator[tuple[int, bool]]:
    """(number of its medium, whether it is the medium's first) of each placeholder: a video has one for each time step where
    times stand between them."""
    counts = iter(script.counts)
    for number, grid in enumerate(script.grids):
        left = tokens_of(grid, merge_size)
        yield number, True
        left -= next(counts)
        while left > 0:
            yield number, False
            left -= next(counts)


def _figures(script: Script, boxes: Sequence[Box], chat: Chat, looks: Looks, numbers: Mapping[str, str]) -> Iterator[str]:
    """What stands for each placeholder: the medium at its first, a count of tokens at the others."""
    pictures = [number for number, medium in enumerate(script.media) if isinstance(medium, Picture)]
    for (number, is_first), count in zip(places(script, chat.limits.merge_size), script.counts, strict=True):
        if is_first:
            medium = script.media[number]
            mine = [box for box in boxes if number in pictures and pictures.index(number) == box.picture]
            yield figure(medium, script.grids[number], mine, chat, looks.get(id(medium), Look(())), numbers)
        else:
            yield f'<span class="more">{count:,} tokens</span>'


def figure(
    medium: Medium, grid: tuple[int, int, int], boxes: Sequence[Box], chat: Chat, look: Look,
    numbers: Mapping[str, str],
) -> str:  # fmt: skip
    """A medium at the size that the model sees, with its grid of tokens, its boxes, and a line of facts."""
    height, width = grid[1] * chat.limits.patch_size, grid[2] * chat.limits.patch_size
    rows, columns = grid[1] // chat.limits.merge_size, grid[2] // chat.limits.merge_size
    name = text(medium.name or f"a {'picture' if isinstance(medium, Picture) else 'video'} in memory")
    scale = min(WIDEST_PX / width, TALLEST_PX / height, max(1, NARROWEST_PX / width))
    style = f"--width:{width * scale:.0f}px;--ratio:{width}/{height};--columns:{columns};--rows:{rows}"
    resized = f" → {width} × {height}" * ((medium.width, medium.height) != (width, height))
    facts = f"{medium.width} × {medium.height}{resized} px · {tokens_of(grid, chat.limits.merge_size):,} tokens"
    if isinstance(medium, Video):
        facts = f"{len(medium.indices):,} of {medium.num_frames:,} frames, {medium.fps:.4g} a second · {facts}"
    else:
        facts = f"{facts} ({columns} × {rows})"
    seen = []
    for frame in look.frames:
        at = _time(frame.at_s) if isinstance(medium, Video) else ""
        source = f'data-src="{numbers[frame.url]}"' if frame.url in numbers else f'src="{text(frame.url)}"'
        alt = f"{name} at {at}" if at else name
        shown = f'<img {source} alt="{alt}" width="{width}" height="{height}" decoding="async">'
        button = f'<button type="button" aria-label="Enlarge {alt}"></button>'
        drawn = f'<div class="see">{shown}{_boxes(medium, boxes)}{button}</div>'
        seen.append(f'<div class="frame">{drawn}<span class="at">{at}</span></div>' if at else drawn)
    if look.problem:
        seen = [f'<div class="see broken"><b>cannot be shown</b> {text(look.problem.what)}</div>']
    elif not seen:
        seen = ['<div class="see broken">not shown here</div>']
    if len(look.frames) > 1:
        seen = [f'<div class="strip" role="group" aria-label="Frames of {name}">{"".join(seen)}</div>']
    return f'<figure class="{medium.kind}" style="{style}">{"".join(seen)}<figcaption><b>{name}</b> {facts}</figcaption></figure>'


def _boxes(medium: Medium, boxes: Sequence[Box]) -> str:
    """Rectangles and points over a picture, a colour for each label, which stands at the box's upper corner."""
    if not boxes:
        return ""
    kinds = list(dict.fromkeys(box.label for box in boxes))
    shapes, labels = [], []
    for box in boxes:
        colour = f"c{kinds.index(box.label) % COLOURS}"
        x1, y1, x2, y2 = (*box.corners, *box.corners)[:4]
        x1, x2, y1, y2 = min(x1, x2), max(x1, x2), min(y1, y2), max(y1, y2)
        if len(box.corners) == 2:
            shapes.append(f'<path class="point" d="M{x1:g} {y1:g}h0"/><path class="point {colour}" d="M{x1:g} {y1:g}h0"/>')
        else:
            line = f"M{x1:g} {y1:g}H{x2:g}V{y2:g}H{x1:g}Z"
            shapes.append(f'<path class="halo" d="{line}"/><path class="{colour}" d="{line}"/>')
        left, top, right = (100 * at / of for at, of in ((x1, medium.width), (y1, medium.height), (x2, medium.width)))
        side = f"left:{left:.2f}%" if left < 70 else f"right:{100 - right:.2f}%"
        inside = " inside" if top < LABEL_PERCENT else ""
        if box.label:
            labels.append(f'<span class="label {colour}{inside}" style="{side};top:{top:.2f}%">{text(box.label)}</span>')
    view = f'viewBox="0 0 {medium.width} {medium.height}" preserveAspectRatio="none" aria-hidden="true"'
    return f"<svg {view}>{''.join(shapes)}</svg>{''.join(labels)}"


def _problems(problems: Sequence[Problem]) -> str:
    if not problems:
        return ""
    lines = [
        f"<li><b>{text(problem.where)}</b> {text(problem.what)}<br><span>fix: {text(problem.fix)}</span></li>"
        for problem in problems
    ]
    return f'<ul class="problems">{"".join(lines)}</ul>'


def _histogram(lengths: Sequence[int]) -> str:
    """How many records have how many tokens."""
    if len(lengths) < 2:
        return ""
    step = nice_step((max(lengths) - min(lengths) + 1) / BARS)
    first = min(lengths) // step
    counts = [0] * (max(lengths) // step - first + 1)
    for length in lengths:
        counts[length // step - first] += 1
    bars = []
    for number, count in enumerate(counts):
        low = (first + number) * step
        high = max(1.5, 56 * count / max(counts)) if count else 0.0
        of = f"{low:,}" if step == 1 else f"{low:,} to {low + step - 1:,}"
        bars.append(f'<g><rect class="reach" x="{number * 10}" width="10" height="60"/>'
                    f'<rect x="{number * 10 + 1}" y="{60 - high:.1f}" width="8" height="{high:.1f}" rx="1.5"/>'
                    f"<title>{of} tokens: {count:,} record{'s' * (count != 1)}</title></g>")  # fmt: skip
    ends = f"{first * step:,}", f"{(first + len(counts)) * step - 1:,}"
    label = f"Tokens a record, from {min(lengths):,} to {max(lengths):,}"
    return (f'<figure class="histogram"><svg viewBox="0 0 {10 * len(counts)} 60" preserveAspectRatio="none" role="img" '
            f'aria-label="{label}">{"".join(bars)}</svg><figcaption><span>{ends[0]}</span><span>tokens a record</span>'
            f"<span>{ends[1]}</span></figcaption></figure>")  # fmt: skip


def nice_step(step: float) -> int:
    """The least of 1, 2, 5, 10, 20, 50 ... that is not below `step`."""
    power = 10 ** max(0, math.floor(math.log10(max(1.0, step))))
    return next(int(power * factor) for factor in (1, 2, 5, 10) if power * factor >= step)


def text(said: str) -> str:
    """A text of somebody's for between tags and within quoted attributes: nothing of it is markup."""
    return escape(writable(said)).replace("\r", "&#13;").replace("\0", "␀")  # which a browser would change, and leave out


def _utf16(said: str) -> int:
    return len(said) if said.isascii() else len(said.encode("utf-16-le")) // 2


def _time(at_s: float) -> str:
    """4.5 s; from a minute on 1:04.5."""
    return f"{at_s:.1f} s" if at_s < 60 else f"{int(at_s // 60)}:{at_s % 60:04.1f}"


def _asset(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")
