"""Draws the small bar and column charts of the sample and of the tiny model's training.

Every chart prints its values, so whoever can read can answer. Sides are multiples of 28 px: one merged patch of Qwen2-VL,
so no picture is resized on its way into the model. The font is the one inside Pillow: the same pixels on every machine.

    >>> draw_chart("Highest mountains (m)", {"Everest": 8849, "K2": 8611}, style=Style("bar", 168)).size
    (168, 84)
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from PIL import Image, ImageDraw, ImageFont

UNIT = 28  # px
NAME_PX, VALUE_PX, TITLE_PX = 13, 14, 11
BAR_COLORS = ["#7fb2e5", "#f2a65e", "#8ccf8c", "#c9a6e0", "#e88f8f", "#a9b8c4"]
PAPER_COLORS = ["#ffffff", "#fbf6e9", "#eef3f8"]


@dataclass(frozen=True)
class Style:
    """How a chart looks. `kind` is bar (name above its bar), table (name left of its bar) or column (vertical)."""

    kind: str
    width: int  # px
    bar_color: int = 0
    paper_color: int = 0


@cache
def font(size_px: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font."""
    return ImageFont.load_default(size_px)


def text_width(text: str, size_px: int) -> int:
    """Width of `text` in px."""
    return round(font(size_px).getlength(text))


def spelled(value: float) -> str:
    """The value as it is printed in the chart and in the answers: 16, 512.3."""
    return str(int(value)) if value == int(value) else str(value)


Written = tuple[str, float, float, int]  # a text, the left end and the middle of its line in px, the size of its letters


def draw_chart(
    title: str, values: dict[str, float], style: Style, on_text: Callable[[Written], None] = lambda text: None
) -> Image.Image:
    """An RGB picture, `style.width` wide; a bar takes one UNIT of height, a column chart is 5 UNITs high.

    `on_text` is told of every text that is written, and where.
    """
    height = UNIT * (5 if style.kind == "column" else 1 + len(values))
    picture = Image.new("RGB", (style.width, height), PAPER_COLORS[style.paper_color])
    pen = ImageDraw.Draw(picture)

    def write(text: str, x: float, y: float, size_px: int, centred: bool = False) -> None:
        left = x - text_width(text, size_px) / 2 if centred else x
        pen.text((round(left), y), text, fill="#555555" if size_px == TITLE_PX else "black", font=font(size_px), anchor="lm")
        on_text((text, left, y, size_px))

    write(title, 3, 13, TITLE_PX)
    (_draw_columns if style.kind == "column" else _draw_bars)(pen, write, values, style)
    return picture


def _draw_bars(pen: ImageDraw.ImageDraw, write: Callable[..., None], values: dict[str, float], style: Style) -> None:
    largest = max(values.values())
    table = style.kind == "table"
    left = 4 + max(text_width(name, NAME_PX) for name in values) + 6 if table else 4
    room = style.width - left - 8 - max(text_width(spelled(value), VALUE_PX) for value in values.values())
    for row, (name, value) in enumerate(values.items(), start=1):
        y = row * UNIT
        end = left + max(2, round(room * value / largest))
        name_y, top, bottom = (y + 13, y + 5, y + 21) if table else (y + 6, y + 15, y + 26)
        pen.rectangle((left, top, end, bottom), fill=BAR_COLORS[style.bar_color])
        write(name, 3, name_y, NAME_PX)
        write(spelled(value), end + 4, (top + bottom) // 2, VALUE_PX)


def _draw_columns(pen: ImageDraw.ImageDraw, write: Callable[..., None], values: dict[str, float], style: Style) -> None:
    largest = max(values.values())
    pitch = style.width / len(values)
    foot = 5 * UNIT - 18  # px; names stand below it
    for column, (name, value) in enumerate(values.items()):
        middle = pitch * (column + 0.5)
        top = foot - max(2, round((foot - 46) * value / largest))
        pen.rectangle((middle - 13, top, middle + 13, foot), fill=BAR_COLORS[style.bar_color])
        write(spelled(value), middle, top - 8, VALUE_PX, centred=True)
        write(name, middle, foot + 9, NAME_PX, centred=True)
