"""Draws the small bar and column charts of the sample and of the tiny model's training.

Every chart prints its values, so whoever can read can answer. Letters stand in cells of 7 x 14 px, two to a patch of Qwen2-VL,
and sides are multiples of 28 px, one merged patch, so no picture is resized on its way into the model: this is what a model
of 2 million parameters can learn to read. The font is the bitmap one inside Pillow: the same pixels on every machine.

    >>> draw_chart("Highest mountains (m)", {"Everest": 8849, "K2": 8611}, Style("bar", 168)).size
    (168, 84)
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from PIL import Image, ImageDraw, ImageFont

UNIT = 28  # px, a token's side
CELL_WIDTH, CELL_HEIGHT = 7, 14  # px, a letter's room
COLUMN_CELLS = 8  # the width of a column with its gap
BAR_COLORS = ["#7fb2e5", "#f2a65e", "#8ccf8c", "#c9a6e0", "#e88f8f", "#a9b8c4"]
PAPER_COLORS = ["#ffffff", "#fbf6e9", "#eef3f8"]
Written = tuple[str, int, int]  # a text, the column and the row of its first letter's cell


@dataclass(frozen=True)
class Style:
    """How a chart looks. `kind` is bar (name above its bar), table (name left of its bar) or column (vertical)."""

    kind: str
    width: int  # px
    bar_color: int = 0
    paper_color: int = 0

    def fits(self, values: dict[str, float]) -> bool:
        """Whether every name and value has room."""
        longest_name, longest_value = max(map(len, values)), max(len(spelled(value)) for value in values.values())
        if self.kind == "column":
            return len(values) * COLUMN_CELLS * CELL_WIDTH <= self.width and max(longest_name, longest_value) < COLUMN_CELLS
        cells = self.width // CELL_WIDTH
        return longest_name + (longest_value + 8 if self.kind == "table" else 0) <= cells


@cache
def letters() -> ImageFont.ImageFont:
    """Pillow's bitmap font, 6 x 11 px."""
    return ImageFont.load_default_imagefont()


def spelled(value: float) -> str:
    """The value as it is printed in the chart and in the answers: 16, 512.3."""
    return str(int(value)) if value == int(value) else str(value)


def draw_chart(
    title: str, values: dict[str, float], style: Style, on_text: Callable[[Written], None] = lambda text: None
) -> Image.Image:
    """An RGB picture, `style.width` wide; a bar takes one UNIT of height, a column chart is 5 UNITs high.

    `on_text` is told of every name and value that is written, and where.
    """
    height = UNIT * (5 if style.kind == "column" else 1 + len(values))
    picture = Image.new("RGB", (style.width, height), PAPER_COLORS[style.paper_color])
    pen = ImageDraw.Draw(picture)
    pen.text((1, 3), title, fill="#666666", font=letters())
    largest = max(values.values())

    def write(text: str, column: int, row: int) -> None:
        for number, letter in enumerate(text):
            pen.text(((column + number) * CELL_WIDTH + 1, row * CELL_HEIGHT + 1), letter, fill="black", font=letters())
        on_text((text, column, row))

    def bar(left: int, top: int, right: int, bottom: int) -> None:
        pen.rectangle((left, top, right, bottom), fill=BAR_COLORS[style.bar_color])

    for number, (name, value) in enumerate(values.items()):
        if style.kind == "column":
            left, row = number * COLUMN_CELLS, 7 - round(5 * value / largest)
            bar(left * CELL_WIDTH + 14, (row + 1) * CELL_HEIGHT, left * CELL_WIDTH + 41, 9 * CELL_HEIGHT - 1)
            write(spelled(value), left + (COLUMN_CELLS - len(spelled(value))) // 2, row)
            write(name, left + (COLUMN_CELLS - len(name)) // 2, 9)
            continue
        start = max(map(len, values)) + 1 if style.kind == "table" else 0
        row = 2 + 2 * number + (style.kind == "bar")
        room = style.width // CELL_WIDTH - start - max(len(spelled(other)) for other in values.values()) - 1
        end = start * CELL_WIDTH + max(2, round(room * CELL_WIDTH * value / largest))
        bar(start * CELL_WIDTH, row * CELL_HEIGHT + 1, end, row * CELL_HEIGHT + 12)
        write(spelled(value), end // CELL_WIDTH + 1, row)
        write(name, 0, 2 + 2 * number)
    return picture
