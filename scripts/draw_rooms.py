"""Draws docs/rooms.svg: the rooms of qwenvl_ft on their floors, and who imports whom, read from the source.

The floors are ORDER's in tests/test_floors.py, the ground at the bottom. An import of a room that the arrows lead to anyway has no
arrow of its own: it is named in the box, after "also".

    python scripts/draw_rooms.py [--out docs/rooms.svg]

The layout is Sugiyama's: an arrow that passes a floor has a place there, as a room has; places are sorted until few arrows
cross, then moved below what they are joined with.
"""

import argparse
import ast
import re
import textwrap
from collections import defaultdict
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "qwenvl_ft"
BOX, LANE, GAP, LINE, MARGIN = 276, 14, 26, 16, 24  # px: a box's and an arrow's width, between them, a text line, around all
LETTERS = 40  # of a text line in a box
Arrow = tuple[str, str]  # from, to
Place = tuple[str, ...]  # (room,), or (from, to, floor) where an arrow passes a floor


@dataclass(frozen=True)
class Room:
    """A folder of the package, or a file beside them. `imports`: the other rooms that it imports."""

    name: str
    sentence: str
    num_files: int
    num_lines: int
    imports: frozenset[str]


def order() -> list[list[str]]:
    """The names of the rooms, a list for each floor, from the ground up."""
    for node in ast.parse((ROOT / "tests" / "test_floors.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "ORDER":
            return [floor.split() for floor in ast.literal_eval(node.value).split(" | ")]
    raise ValueError("tests/test_floors.py has no ORDER")


def read_room(name: str) -> Room:
    """A room as its files are now. Its sentence is the first one of its docstring."""
    folder = PACKAGE / name
    files = sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]
    texts = [path.read_text(encoding="utf-8") for path in files]
    described = ast.parse(texts[files.index(folder / "__init__.py") if folder.is_dir() else 0])
    first = " ".join((ast.get_docstring(described) or "").split("\n\n")[0].split())
    imported: set[str] = set()
    for node in (node for text in texts for node in ast.walk(ast.parse(text))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported |= {f"{node.module}.{alias.name}" for alias in node.names}
    rooms = {path.split(".")[1] for path in imported if path.startswith("qwenvl_ft.")}
    return Room(
        name=name,
        sentence=re.split(r"(?<=\.) ", first)[0],
        num_files=len(files),
        num_lines=sum(len(text.splitlines()) for text in texts),
        imports=frozenset(rooms & {room for floor in order() for room in floor} - {name}),
    )


def direct(rooms: dict[str, Room]) -> list[Arrow]:
    """The imports that no chain of other imports stands for."""

    def reached(name: str) -> frozenset[str]:
        return rooms[name].imports.union(*(reached(other) for other in rooms[name].imports))

    return [
        (name, other)
        for name, room in rooms.items()
        for other in sorted(room.imports)
        if not any(other in reached(third) for third in room.imports - {other})
    ]


def sort_floors(floors: list[list[Place]], joined: dict[Place, list[Place]]) -> list[list[Place]]:
    """The floors with their places from left to right, in the order of the fewest crossings that was met."""

    def crossings(floors: list[list[Place]]) -> int:
        found = 0
        for below, floor in pairwise(floors):
            at = {place: number for number, place in enumerate(below)}
            ends = [at[other] for place in floor for other in sorted(joined[place], key=lambda p: at.get(p, -1)) if other in at]
            found += sum(left > right for number, left in enumerate(ends) for right in ends[number + 1 :])
        return found

    best = floors = [list(floor) for floor in floors]
    for sweep in range(24):
        numbers = range(len(floors)) if sweep % 2 else range(len(floors) - 1, -1, -1)
        for number in numbers:
            near = floors[number - 1 : number] if sweep % 2 else floors[number + 1 : number + 2]
            at = {place: index / len(floor) for floor in near for index, place in enumerate(floor)}

            def middle(place: Place, floor: list[Place] = floors[number], at: dict[Place, float] = at) -> float:
                ends = [at[other] for other in joined[place] if other in at]
                return sum(ends) / len(ends) if ends else floor.index(place) / len(floor)

            floors[number] = sorted(floors[number], key=middle)
        if crossings(floors) < crossings(best):
            best = [list(floor) for floor in floors]
    return best


def width(place: Place) -> int:
    return BOX if len(place) == 1 else LANE


def pull(place: Place, other: Place) -> int:
    """How strongly two joined places are drawn under each other: an arrow turns at its ends, not between."""
    return {2: 6, 4: 1, 6: 48}[len(place) + len(other)]


def settle(floor: list[Place], wanted: list[float], weights: list[int]) -> list[float]:
    """The middles of the floor's places: as wanted, but for what they need so that none overlaps (weighted least squares)."""
    offsets = [0.0]
    for left, right in pairwise(floor):
        offsets.append(offsets[-1] + width(left) / 2 + GAP + width(right) / 2)
    pools: list[tuple[float, int, int]] = []  # places that touch: the weighted sum of where they want to begin, weight, count
    for middle, offset, weight in zip(wanted, offsets, weights, strict=True):
        pool = ((middle - offset) * weight, weight, 1)
        while pools and pools[-1][0] / pools[-1][1] >= pool[0] / pool[1]:
            total, heavy, count = pools.pop()
            pool = (total + pool[0], heavy + pool[1], count + pool[2])
        pools.append(pool)
    starts = [total / weight for total, weight, count in pools for _ in range(count)]
    return [start + offset for start, offset in zip(starts, offsets, strict=True)]


def middles(floors: list[list[Place]], joined: dict[Place, list[Place]]) -> dict[Place, int]:
    """Where the middle of every place is, in px from the left."""
    at = {place: x for floor in floors for place, x in zip(floor, settle(floor, [0.0] * len(floor), [1] * len(floor)), strict=True)}
    for sweep in range(2000):
        for floor in floors if sweep % 2 else reversed(floors):
            weights = [sum(pull(place, other) for other in joined[place]) or 1 for place in floor]
            wanted = [
                sum(at[other] * pull(place, other) for other in joined[place]) / weight
                for place, weight in zip(floor, weights, strict=True)
            ]
            at.update(zip(floor, settle(floor, wanted, weights), strict=True))
    left = min(x - width(place) / 2 for place, x in at.items())
    return {place: round(x - left + MARGIN) for place, x in at.items()}


def draw(floors: list[list[str]], rooms: dict[str, Room]) -> str:
    """The drawing as SVG."""
    floor_of = {name: number for number, floor in enumerate(floors) for name in floor}
    upwards = [
        f"{room.name} imports {other}"
        for room in rooms.values()
        for other in room.imports
        if floor_of[other] >= floor_of[room.name]
    ]
    if upwards:
        raise ValueError(f"not from a room below: {', '.join(sorted(upwards))}")
    arrows = direct(rooms)
    paths: dict[Arrow, list[Place]] = {
        (start, end): [(start,), *((start, end, str(n)) for n in range(floor_of[start] - 1, floor_of[end], -1)), (end,)]
        for start, end in arrows
    }
    joined: dict[Place, list[Place]] = defaultdict(list)
    places: list[list[Place]] = [[(name,) for name in floor] for floor in floors]
    for path in paths.values():
        for upper, lower in pairwise(path):
            joined[upper].append(lower)
            joined[lower].append(upper)
        for passing in path[1:-1]:
            places[int(passing[2])].append(passing)
    at = middles(sort_floors(places, joined), joined)

    texts = {}
    for name, room in rooms.items():
        also = sorted(room.imports - {end for start, end in arrows if start == name}, key=lambda other: (-floor_of[other], other))
        texts[name] = [("sentence", line) for line in textwrap.wrap(room.sentence, LETTERS)]
        texts[name] += [("also", line) for line in textwrap.wrap("also " + ", ".join(also), LETTERS + 2) if also]
    heights = [LINE * max(len(texts[name]) for name in floor) + 38 for floor in floors]
    tops, y = {}, 78
    for number in range(len(floors) - 1, -1, -1):
        tops[number] = y
        y += heights[number] + 44

    def port(arrow: Arrow, room: str) -> float:
        """Where on its edge an arrow leaves or meets a room: beside the others there, in the order of where they go."""
        end = arrow.index(room)
        mine = [one for one in arrows if one[end] == room]
        mine.sort(key=lambda one: at[paths[one][1 if end == 0 else -2]])
        return at[(room,)] + (mine.index(arrow) - (len(mine) - 1) / 2) * min(40, BOX / len(mine))

    wide = max(at[place] + width(place) / 2 for place in at) + MARGIN
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide:g} {y - 20:g}" font-family="Helvetica, Arial, sans-serif" font-size="12">',
        "<!-- python scripts/draw_rooms.py -->",
        "<style>.room{fill:#f4f7fb;stroke:#5b7aa0}.name{font-size:15px;font-weight:bold;fill:#1d3557}.count,.also,.legend{fill:#6b7785}"
        ".sentence{fill:#222}.also{font-style:italic}.arrow{fill:none;stroke:#35506e;stroke-width:1.3}</style>",
        '<defs><marker id="head" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path d="M0 0.5 8 4 0 7.5z" fill="#35506e"/></marker></defs>',
        '<rect width="100%" height="100%" rx="8" fill="#ffffff"/>',
        f'<text class="legend" x="{MARGIN}" y="28">An arrow: imports. All point down, none joins rooms of one floor.</text>',
        f'<text class="legend" x="{MARGIN}" y="45">"also": imported too, without an arrow, since the arrows lead there anyway.</text>',
        f'<text class="legend" x="{MARGIN}" y="62">Files and lines: on the day of the drawing.</text>',
    ]
    for arrow, path in paths.items():
        start, end = arrow
        x, now = port(arrow, start), float(tops[floor_of[start]] + heights[floor_of[start]])
        d = f"M{x:g} {now:g}"
        for place in path[1:]:
            number = int(place[2]) if len(place) == 3 else floor_of[end]
            to, low = (at[place] if len(place) == 3 else port(arrow, end)), tops[number]
            d += f"C{x:g} {(now + low) / 2:g} {to:g} {(now + low) / 2:g} {to:g} {low:g}"
            x, now = to, float(low)
            if len(place) == 3:
                now += heights[number]
                d += f"V{now:g}"
        out.append(f'<path class="arrow" id="{start}-{end}" d="{d}" marker-end="url(#head)"/>')
    for name, room in rooms.items():
        left, top = at[(name,)] - BOX / 2, tops[floor_of[name]]
        height = heights[floor_of[name]]
        files = "1 file" if room.num_files == 1 else f"{room.num_files} files"
        out.append(f'<g id="{name}"><rect class="room" x="{left:g}" y="{top:g}" width="{BOX}" height="{height:g}" rx="5"/>')
        out.append(f'<text class="name" x="{left + 10:g}" y="{top + 22:g}">{name}</text>')
        counts = f"{files}, {room.num_lines:,} lines"
        out.append(f'<text class="count" x="{left + BOX - 10:g}" y="{top + 22:g}" text-anchor="end">{counts}</text>')
        for number, (kind, line) in enumerate(texts[name]):
            out.append(f'<text class="{kind}" x="{left + 10:g}" y="{top + 42 + LINE * number:g}">{escape(line)}</text>')
        out.append("</g>")
    return "\n".join([*out, "</svg>", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description="Draws the rooms of qwenvl_ft and who imports whom.")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "rooms.svg")
    out = parser.parse_args().out
    floors = order()
    out.write_text(draw(floors, {name: read_room(name) for floor in floors for name in floor}), encoding="utf-8")
    print(f"{out}: drawn")


if __name__ == "__main__":
    main()
