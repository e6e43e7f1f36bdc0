"""Draws the small bar and column charts of the sample and of the tiny model's training.

Every chart prints its values, so whoever can read can answer. Letters stand in cells of 14 x 28 px, two to a token of Qwen2-VL,
every text begins at a token's left edge, and sides are multiples of 28 px, so no picture is resized on its way into the
model: this is what a model of 2.5 million parameters can learn to read. The font is the bitmap one inside Pillow at twice its
size: the same pixels on every machine.

    >>> draw_chart("Highest mountains (m)", {"Everest": 8849, "K2": 8611}, Style("bar", 392)).size
    (392, 84)
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from PIL import Image, ImageDraw, ImageFont

UNIT = 28  # px, a token's side
CELL = 14  # px, a letter's width; it is UNIT high
COLUMN_UNITS = 6  # the height of a column chart: title, four for the columns and their values, names
VALUE_CELLS = 6  # the longest value, 5 digits or 4 and a point
BAR_CELLS = 6  # the least room for the bars
BAR_COLORS = ["#7fb2e5", "#f2a65e", "#8ccf8c", "#c9a6e0", "#e88f8f", "#a9b8c4"]
PAPER_COLORS = ["#ffffff", "#fbf6e9", "#eef3f8"]
Written = tuple[str, int, int]  # a text, and the column and the row of its first letter's cell


@dataclass(frozen=True)
class Style:
    """How a chart looks. `kind`: bar (value at the bar's end), label (value before the bar) or column (value above, name below)."""

    kind: str
    width: int  # px
    bar_color: int = 0
    paper_color: int = 0

    def fits(self, values: dict[str, float]) -> bool:
        """Whether every name and value has room."""
        return width_of(self.kind, values) <= self.width


def width_of(kind: str, values: dict[str, float]) -> int:
    """px that a chart of this kind needs at least."""
    longest = max(map(len, values))
    if kind == "column":
        return CELL * _even(max(longest, *(len(spelled(value)) for value in values.values())) + 1) * len(values)
    return CELL * (_even(longest + 1) + BAR_CELLS + VALUE_CELLS)


def _even(cells: int) -> int:
    return cells + cells % 2


@cache
def letter_mask(letter: str, scale: int) -> Image.Image:
    """A letter as a mask, of Pillow's bitmap font of 6 x 11 px, enlarged."""
    mask = Image.new("L", (6, 11))
    ImageDraw.Draw(mask).text((0, 0), letter, fill=255, font=ImageFont.load_default_imagefont())
    return mask.resize((6 * scale, 11 * scale), Image.Resampling.NEAREST)


def spelled(value: float) -> str:
    """The value as it is printed in the chart and in the answers: 16, 512.3."""
    return str(int(value)) if value == int(value) else str(value)


def draw_chart(
    title: str, values: dict[str, float], style: Style, on_text: Callable[[Written], None] = lambda text: None
) -> Image.Image:
    """An RGB picture, `style.width` wide; a bar takes one UNIT of height, a column chart is COLUMN_UNITS high.

    `on_text` is told of every name and value that is written, and where.
    """
    height = UNIT * (COLUMN_UNITS if style.kind == "column" else 1 + len(values))
    picture = Image.new("RGB", (style.width, height), PAPER_COLORS[style.paper_color])
    pen = ImageDraw.Draw(picture)
    for number, letter in enumerate(title):
        picture.paste("#777777", (1 + 6 * number, 7), letter_mask(letter, 1))
    largest = max(values.values())

    def write(text: str, column: int, row: int) -> None:
        for number, letter in enumerate(text):
            picture.paste("#000000", ((column + number) * CELL + 1, row * UNIT + 3), letter_mask(letter, 2))
        on_text((text, column, row))

    def bar(left: int, top: int, right: int, bottom: int) -> None:
        pen.rectangle((left, top, right - 1, bottom - 1), fill=BAR_COLORS[style.bar_color])

    cells = style.width // CELL
    for number, (name, value) in enumerate(values.items()):
        if style.kind == "column":
            wide = cells // len(values) // 2 * 2
            left, tall = number * wide, round(3 * UNIT * value / largest)
            base = (COLUMN_UNITS - 1) * UNIT
            bar(left * CELL, base - max(2, tall), (left + wide) * CELL - 10, base)
            write(spelled(value), left, (base - max(2, tall)) // UNIT - 1)
            write(name, left, COLUMN_UNITS - 1)
            continue
        row, start = 1 + number, _even(max(map(len, values)) + 1)
        write(name, 0, row)
        if style.kind == "label":
            write(spelled(value), start, row)
            start += VALUE_CELLS
        room = (cells - start - (0 if style.kind == "label" else VALUE_CELLS)) * CELL
        end = start * CELL + max(2, round(room * value / largest))
        bar(start * CELL, row * UNIT + 3, end, (row + 1) * UNIT - 3)
        if style.kind == "bar":
            write(spelled(value), _even(-(-end // CELL)), row)
    return picture
