"""The losses of a run as a drawing: plain SVG, which every browser shows."""

from collections.abc import Sequence
from typing import Any

WIDTH, HEIGHT, MARGIN = 760, 420, 60
MOST_POINTS = 400  # of a curve: of more steps than that, means
GRID, TRAIN, HELD_OUT = "#dddddd", "#1f77b4", "#d62728"
Points = list[tuple[float, float]]


def mean_loss(lines: Sequence[dict[str, Any]]) -> float:
    """The loss per taught token of some steps: each counts by what it taught; 0 where that is nothing."""
    taught = sum(line["taught_tokens"] for line in lines)
    return float(sum(line["loss"] * line["taught_tokens"] for line in lines) / max(1, taught))


def parts_of(lines: Sequence[dict[str, Any]]) -> list[Sequence[dict[str, Any]]]:
    """The steps in as many parts of equal length, but for the last, as a curve has points."""
    each = max(1, -(-len(lines) // MOST_POINTS))
    return [lines[start : start + each] for start in range(0, len(lines), each)]


def draw_losses(lines: Sequence[dict[str, Any]]) -> str:
    """The lines of metrics.jsonl as an SVG: the training loss by step, and that of the evaluations."""
    parts = parts_of(lines)
    train: Points = [(sum(line["step"] for line in part) / len(part), mean_loss(part)) for part in parts]
    held_out: Points = [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line]
    last, top = max(2, lines[-1]["step"]), max([loss for _, loss in train + held_out] + [1e-9]) * 1.05

    def place(step: float, loss: float) -> tuple[float, float]:
        across, up = (step - 1) / (last - 1), loss / top
        return round(MARGIN + across * (WIDTH - 2 * MARGIN), 1), round(HEIGHT - MARGIN - up * (HEIGHT - 2 * MARGIN), 1)

    def text(x: float, y: float, words: str, anchor: str = "middle", color: str = "#333333") -> str:
        return f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="{color}">{words}</text>'

    def curve(points: Points, color: str) -> str:
        joined = " ".join(f"{x},{y}" for x, y in (place(*point) for point in points))
        dots = "".join('<circle cx="{}" cy="{}" r="3"/>'.format(*place(*point)) for point in points) if len(points) < 60 else ""
        return f'<g fill="{color}"><polyline points="{joined}" fill="none" stroke="{color}" stroke-width="1.5"/>{dots}</g>'

    drawn = []
    for number in range(5):
        loss, step = top * number / 4, 1 + (last - 1) * number / 4
        x, y = place(step, loss)
        drawn.append(f'<path d="M{MARGIN} {y}H{WIDTH - MARGIN}" stroke="{GRID}"/>')
        drawn.append(text(MARGIN - 8, y + 4, f"{loss:.3g}", "end"))
        if number in (0, 4) or last > 8:
            drawn.append(text(x, HEIGHT - MARGIN + 20, f"{step:.0f}"))
    each_is = "" if (each := len(parts[0])) == 1 else f", mean of {each} steps"
    drawn.append(text(MARGIN, MARGIN - 24, f"training{each_is}", "start", TRAIN))
    drawn.append(curve(train, TRAIN))
    if held_out:
        drawn += [text(WIDTH - MARGIN, MARGIN - 24, "evaluation", "end", HELD_OUT), curve(held_out, HELD_OUT)]
    drawn.append(text(WIDTH / 2, HEIGHT - MARGIN + 42, "step"))
    drawn.append(text(WIDTH / 2, MARGIN - 24, "loss per taught token"))
    size = f'width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="13">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *drawn, "</svg>\n"])
