"""Trains the sample once for each value of one setting, and draws what the held-out records say of it.

    python scripts/sweep.py learning_rate 1e-4 3e-4 6e-4 1.2e-3 2.4e-3 [--seeds 1] [--svg docs/sweep_learning_rate.svg] [key=value ...]

Everything else is as in configs/demo.yaml, or as told behind. Prints a Markdown table: held-out loss, and the share of the sample's
115 held-out questions that are answered exactly, with the interval of one run.
"""

import argparse
import math
import sys
import tempfile
from pathlib import Path
from statistics import fmean

from learn_shared import trained, wilson

WIDTH, HEIGHT, MARGIN = 560, 300, 56
LOSS, EXACT = "#d62728", "#1f77b4"
Found = list[tuple[str, float, float, float, float]]  # value, loss, exact, low, high


def draw(key: str, found: Found) -> str:
    """Held-out loss and exact answers, a place on the axis for each value, as SVG."""
    worst, best = max(of[1] for of in found), min(of[1] for of in found)

    def place(number: int, share: float) -> tuple[float, float]:
        across = (number + 0.5) / len(found)
        return round(MARGIN + across * (WIDTH - 2 * MARGIN), 1), round(HEIGHT - MARGIN - share * (HEIGHT - 2 * MARGIN), 1)

    def curve(points: list[tuple[float, float]], color: str) -> str:
        dots = "".join(f'<circle cx="{x}" cy="{y}" r="3"/>' for x, y in points)
        joined = " ".join(f"{x},{y}" for x, y in points)
        return f'<g fill="{color}"><polyline points="{joined}" fill="none" stroke="{color}" stroke-width="1.5"/>{dots}</g>'

    losses = [place(n, 0.1 + 0.8 * (of[1] - best) / ((worst - best) or 1)) for n, of in enumerate(found)]
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" font-size="12">',
           '<rect width="100%" height="100%" fill="white"/>']  # fmt: skip
    for n, (value, loss, exact, low, high) in enumerate(found):
        x, y = place(n, exact)
        out.append(f'<path d="M{x} {place(n, low)[1]}V{place(n, high)[1]}" stroke="{EXACT}" opacity="0.5"/>')
        out.append(f'<text x="{x + 6}" y="{y - 6}" fill="{EXACT}">{exact:.0%}</text>')
        out.append(f'<text x="{losses[n][0] + 6}" y="{losses[n][1] - 6}" fill="{LOSS}">{loss:.2f}</text>')
        out.append(f'<text x="{x}" y="{HEIGHT - MARGIN + 18}" text-anchor="middle" fill="#333">{value}</text>')
    out.append(curve([place(n, of[2]) for n, of in enumerate(found)], EXACT))
    out.append(curve(losses, LOSS))
    out.append(f'<text x="{MARGIN}" y="22" fill="{EXACT}">exact answers, with 95 % interval</text>')
    out.append(f'<text x="{WIDTH - MARGIN}" y="22" text-anchor="end" fill="{LOSS}">held-out loss</text>')
    out.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 14}" text-anchor="middle" fill="#333">{key}</text>')
    return "\n".join([*out, "</svg>\n"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("key")
    parser.add_argument("values", nargs="+", help="and behind them key=value, for all of them alike")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--svg", type=Path)
    given = parser.parse_args()
    alike = [value for value in given.values if "=" in value]
    found: Found = []
    print(f"| {given.key} | held-out loss | exact | 95 % of one run | CPU seconds |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for number, value in enumerate(value for value in given.values if "=" not in value):
            settings = ["train_meta_file=data/sample/train.json", *alike, f"{given.key}={value}"]
            runs = [trained(Path(folder, f"{number}-{seed}"), [*settings, f"seed={seed}"]) for seed in given.seeds]
            losses, exact, seconds, counts = zip(*runs, strict=True)
            low, high = wilson(fmean(exact), counts[0])
            if not math.isfinite(fmean(losses)):
                sys.exit(f"{given.key}={value}: the loss is not finite")
            found.append((value, fmean(losses), fmean(exact), low, high))
            print(
                f"| {value} | {fmean(losses):.4f} | {fmean(exact):.1%} | {low:.1%} to {high:.1%} | {fmean(seconds):.0f} |",
                flush=True,
            )
            if given.svg:
                given.svg.write_text(draw(given.key, found), encoding="utf-8")


if __name__ == "__main__":
    main()
