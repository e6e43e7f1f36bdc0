"""Curves of one run or of several laid over each other, as SVG within a page: colours are the page's, so that it may be dark.

draw([Curve("first", points, 0)], "loss", "step")
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from qwenvl_ft.board.runs import Lines
from qwenvl_ft.train.curves import mean_loss, parts_of

WIDTH, HEIGHT = 540, 260
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 12, 26
FEW_POINTS = 40  # that have dots
COLOURS = 6  # of board.css, and so as many runs or models as can be laid over each other


@dataclass(frozen=True)
class Curve:
    """(step, value) points; `colour` counts the page's colours; a dashed one is of evaluations."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int
    dashed: bool = False


def curve_of(name: str, lines: Lines, key: str, colour: int, dashed: bool = False) -> Curve:
    """The values of a key by step: means where there are many, of losses each by what its step taught."""
    having = [line for line in lines if isinstance(line.get(key), int | float)]

    def mean(part: Sequence[dict[str, float]]) -> float:
        return mean_loss(part) if key == "loss" else sum(line[key] for line in part) / len(part)

    points = [(sum(line["step"] for line in part) / len(part), mean(part)) for part in parts_of(having)]
    return Curve(name, [point for point in points if math.isfinite(point[1])], colour, dashed)


def draw(curves: Sequence[Curve], label: str, step: str) -> Markup:
    """The curves over their steps; nothing where none has points. `label` and `step` are words of the page's language."""
    curves = [curve for curve in curves if curve.points]
    if not curves:
        return Markup("")
    values = [value for curve in curves for _, value in curve.points]
    last = max(2.0, max(at for curve in curves for at, _ in curve.points))
    low, high = (0.0 if min(values) >= 0 else min(values)), max(values)
    ticks = ticks_of(low, high if high > low else low + 1)
    low, high = ticks[0], ticks[-1]

    def place(at: float, value: float) -> str:
        x = LEFT + (at - 1) / (last - 1) * (WIDTH - LEFT - RIGHT)
        return f"{x:.1f},{HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM):.1f}"

    drawn = []
    for tick in ticks:
        y = float(place(1, tick).split(",")[1])
        drawn.append(f'<path class="grid" d="M{LEFT} {y}H{WIDTH - RIGHT}"/>')
        drawn.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{_short(tick)}</text>')
    for share in (0, 0.25, 0.5, 0.75, 1) if last > 8 else (0, 1):
        x, anchor = LEFT + share * (WIDTH - LEFT - RIGHT), "end" if share == 1 else "middle"
        drawn.append(f'<text x="{x:.1f}" y="{HEIGHT - 6}" text-anchor="{anchor}">{1 + share * (last - 1):,.0f}</text>')
    for curve in curves:
        points = [place(*point) for point in curve.points]
        kind = f"c{curve.colour % COLOURS}{' dashed' * curve.dashed}"
        dots = "".join('<circle cx="{}" cy="{}" r="3"/>'.format(*point.split(",")) for point in points)
        drawn.append(f'<g class="{kind}"><polyline points="{" ".join(points)}"/>{dots * (len(points) < FEW_POINTS)}'
                     f"<title>{escape(curve.name)}: {_short(curve.points[-1][1])}</title></g>")  # fmt: skip
    keys = "".join(
        f'<li class="c{curve.colour % COLOURS}{" dashed" * curve.dashed}">{escape(curve.name)}'
        f" <b>{_short(curve.points[-1][1])}</b></li>"
        for curve in curves
    )
    named = escape(f"{label}, {step} 1–{last:,.0f}")
    return Markup(
        f'<figure class="curves"><figcaption><h2>{escape(label)}</h2><ul>{keys}</ul></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{named}">{"".join(drawn)}</svg></figure>'
    )  # every text in it is escaped above


def ticks_of(low: float, high: float) -> list[float]:
    """Four to seven round values that reach from `low` or less to `high` or more."""
    power = 10 ** math.floor(math.log10((high - low) / 4))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor * 5 >= high - low)
    first = math.floor(low / step + 1e-9)
    return [step * number for number in range(first, math.ceil(high / step - 1e-9) + 1)]


def _short(value: float) -> str:
    if value == 0:
        return "0"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) >= 1e-3 else f"{value:.2g}"
