"""docs/rooms.svg shows the rooms as they are; what it must show is read by test_floors.py's own reader of imports."""

import importlib.util
import re
from itertools import combinations
from xml.etree import ElementTree

import pytest

from tests.conftest import ROOT
from tests.test_floors import FILES, FLOOR, TREES, imports, room_of

SVG = "{http://www.w3.org/2000/svg}"
AGAIN = "the drawing is old: python scripts/draw_rooms.py"


@pytest.fixture(scope="module")
def drawing():
    return ElementTree.parse(ROOT / "docs" / "rooms.svg").getroot()


@pytest.fixture(scope="module")
def found():
    """(room, other room) of every import in the package."""
    pairs = {
        (room_of(name), module.split(".")[1]) for name in FILES for module, _ in imports(TREES[name]) if "qwenvl_ft." in module
    }
    return {(room, other) for room, other in pairs if room != other and other in FLOOR}


def arrows(drawing) -> dict[tuple[str, str], list[float]]:
    """Where each arrow begins and ends: x, y, x, y."""
    paths = [path for path in drawing.iter(f"{SVG}path") if path.get("class") == "arrow"]
    numbers = [[float(number) for number in re.findall(r"[\d.]+", path.get("d"))] for path in paths]
    return {tuple(path.get("id").split("-")): [*at[:2], *at[-2:]] for path, at in zip(paths, numbers, strict=True)}


def boxes(drawing) -> dict[str, list[float]]:
    """Left, top, right, bottom of each room."""
    found = {}
    for group in drawing.iter(f"{SVG}g"):
        left, top, width, height = (float(group.find(f"{SVG}rect").get(name)) for name in ("x", "y", "width", "height"))
        found[group.get("id")] = [left, top, left + width, top + height]
    return found


def texts(drawing, kind: str) -> dict[str, str]:
    lines = {group.get("id"): [text.text for text in group if text.get("class") == kind] for group in drawing.iter(f"{SVG}g")}
    return {room: " ".join(written) for room, written in lines.items()}


def test_the_drawing_has_every_room_and_every_import(drawing, found):
    assert texts(drawing, "name") == {room: room for room in FLOOR}, AGAIN
    also = {(room, other) for room, line in texts(drawing, "also").items() for other in re.findall(r"\w+", line)[1:]}
    assert found and arrows(drawing).keys() | also == found, AGAIN
    assert not arrows(drawing).keys() & also


def test_an_import_without_an_arrow_is_one_that_the_arrows_lead_to(drawing, found):
    steps = arrows(drawing).keys()
    reached = {room: {other for start, other in steps if start == room} for room in FLOOR}
    for room in sorted(FLOOR, key=FLOOR.get):
        direct = set(reached[room])
        assert not any(direct & reached[other] for other in direct), "an arrow that others stand for"
        reached[room] |= {beyond for other in direct for beyond in reached[other]}
    assert all(other in reached[room] for room, other in found)


def test_every_arrow_leaves_a_room_and_meets_a_lower_one(drawing):
    rooms = boxes(drawing)
    for (start, end), (x, y, to_x, to_y) in arrows(drawing).items():
        assert y == rooms[start][3] < to_y == rooms[end][1] and FLOOR[start] > FLOOR[end]
        assert rooms[start][0] < x < rooms[start][2] and rooms[end][0] < to_x < rooms[end][2]
    for one, other in combinations(rooms.values(), 2):
        assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1], "two rooms overlap"


def test_the_script_draws_the_rooms_that_are_there(drawing):
    """But for numbers: of files and lines, and of places, which may round another way under another Python."""
    spec = importlib.util.spec_from_file_location("draw_rooms", ROOT / "scripts" / "draw_rooms.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    floors = script.order()
    drawn = ElementTree.fromstring(script.draw(floors, {name: script.read_room(name) for floor in floors for name in floor}))
    for kind in ("name", "sentence", "also"):
        assert texts(drawn, kind) == texts(drawing, kind), AGAIN
    assert arrows(drawn).keys() == arrows(drawing).keys(), AGAIN
    assert all(texts(drawing, "sentence").values())
