"""Trains once for each value of some settings, one setting at a time, and draws what held-out records say of each.

    python scripts/sweep.py 'learning_rate=1e-4|5e-4|2.4e-3' 'lora_rank=4|32|128' [key=value ...] [--seeds 1 2] [--svg docs/sweep.svg]

Everything else is as in --config, or as told with key=value; a value that stands there is trained once for all the settings. Prints
a Markdown table: held-out loss, and the share of held-out questions that are answered exactly, with the interval of one run.
"""

import argparse
import math
import sys
import tempfile
from pathlib import Path
from statistics import fmean

from learn_shared import ROOT, trained, wilson
from ruamel.yaml import YAML

WIDTH, HEIGHT, MARGIN = 480, 280, 52  # of a panel; two stand side by side
LOSS, EXACT = "#d62728", "#1f77b4"
Found = list[tuple[str, float, float, float, float]]  # value, loss, exact, low, high


def panel(key: str, found: Found, left: int, top: int, best: float, worst: float) -> list[str]:
    """Held-out loss, between the `best` and the `worst` of all panels, and exact answers, a place on the axis for each value."""

    def place(number: int, share: float) -> tuple[float, float]:
        across = (number + 0.5) / len(found)
        x, y = left + MARGIN + across * (WIDTH - 2 * MARGIN), top + HEIGHT - MARGIN - share * (HEIGHT - 2 * MARGIN)
        return round(x, 1), round(y, 1)

    def curve(points: list[tuple[float, float]], color: str) -> str:
        dots = "".join(f'<circle cx="{x}" cy="{y}" r="3"/>' for x, y in points)
        joined = " ".join(f"{x},{y}" for x, y in points)
        return f'<g fill="{color}"><polyline points="{joined}" fill="none" stroke="{color}" stroke-width="1.5"/>{dots}</g>'

    losses = [place(n, 0.08 + 0.84 * (of[1] - best) / ((worst - best) or 1)) for n, of in enumerate(found)]
    out = [f'<text x="{left + WIDTH / 2}" y="{top + HEIGHT - 12}" text-anchor="middle" font-weight="bold">{key}</text>']
    for n, (value, loss, exact, low, high) in enumerate(found):
        x, y = place(n, exact)
        out.append(f'<path d="M{x} {place(n, low)[1]}V{place(n, high)[1]}" stroke="{EXACT}" opacity="0.4"/>')
        out.append(f'<text x="{x + 6}" y="{y - 6}" fill="{EXACT}">{exact:.0%}</text>')
        out.append(f'<text x="{x - 6}" y="{losses[n][1] - 6}" text-anchor="end" fill="{LOSS}">{loss:.2f}</text>')
        out.append(f'<text x="{x}" y="{top + HEIGHT - MARGIN + 16}" text-anchor="middle">{value}</text>')
    return [*out, curve([place(n, of[2]) for n, of in enumerate(found)], EXACT), curve(losses, LOSS)]


def draw(found: dict[str, Found]) -> str:
    """A panel for each setting, as SVG."""
    width, height = WIDTH * min(2, len(found)), 28 + HEIGHT * -(-len(found) // 2)
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" font-size="12">',
           '<rect width="100%" height="100%" fill="white"/>',
           f'<text x="{MARGIN}" y="20" fill="{EXACT}">exact answers, with the 95 % interval of one run</text>',
           f'<text x="{MARGIN + 300}" y="20" fill="{LOSS}">held-out loss</text>']  # fmt: skip
    losses = [of[1] for several in found.values() for of in several]
    for number, (key, several) in enumerate(found.items()):
        out += panel(key, several, WIDTH * (number % 2), 28 + HEIGHT * (number // 2), min(losses), max(losses))
    return "\n".join([*out, "</svg>\n"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="+", help="key=value|value|... is swept, key=value holds for all")
    parser.add_argument("--config", type=Path, default=ROOT / "configs/demo.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--limit", type=int, help="ask so many of the held-out questions")
    parser.add_argument("--svg", type=Path)
    given = parser.parse_args()
    base = YAML(typ="safe").load(given.config.read_text(encoding="utf-8"))
    if not base.get("eval_meta_file"):
        sys.exit(f"{given.config}: set eval_meta_file, whose questions are asked")
    alike = [setting for setting in given.settings if "|" not in setting]
    found: dict[str, Found] = {}
    runs: dict[tuple[str, ...], list[tuple[float, float, float, int]]] = {}
    print("| setting | value | held-out loss | exact | 95 % of one run | CPU seconds |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for key, _, values in (setting.partition("=") for setting in given.settings if "|" in setting):
            for value in values.split("|"):
                changed = [] if YAML(typ="safe").load(value) == base.get(key) else [f"{key}={value}"]
                if (now := (*alike, *changed)) not in runs:
                    out = Path(folder, str(len(runs)))
                    runs[now] = [
                        trained(Path(f"{out}-{seed}"), [*now, f"seed={seed}"], given.config, given.limit) for seed in given.seeds
                    ]
                losses, exact, seconds, counts = zip(*runs[now], strict=True)
                low, high = wilson(fmean(exact), counts[0])
                if not math.isfinite(fmean(losses)):
                    sys.exit(f"{key}={value}: the loss is not finite")
                found.setdefault(key, []).append((value, fmean(losses), fmean(exact), low, high))
                print(f"| {key} | {value} | {fmean(losses):.4f} | {fmean(exact):.1%} | {low:.1%} to {high:.1%} | {fmean(seconds):.0f} |",
                      flush=True)  # fmt: skip
                if given.svg:
                    given.svg.write_text(draw(found), encoding="utf-8")


if __name__ == "__main__":
    main()
