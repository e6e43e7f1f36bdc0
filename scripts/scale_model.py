"""What a step of LoRA costs on 1 to 1,024 cards, on paper: nothing here is measured but what `--mfu` is set to.

    python scripts/scale_model.py [--models Qwen2-VL-7B] [--cards 1 8 64 512] [--svg docs/scale.svg] [--mfu 0.45] ...

Every card works on one row at a time. DDP holds the base on each card and exchanges the adapter's gradients once a step. ZeRO-3
and FSDP2 share the base out: each row gathers it twice, forward and backward, and hands its gradients out once a step. What is
exchanged within a row is hidden behind arithmetic as far as that is longer; what is exchanged at the end of a step is not. A
step lasts as long as its slowest card: rows differ by `--spread`, and the slowest of n is about sqrt(2 ln n) of that behind.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

GIB = 2**30
WIDTH, HEIGHT, MARGIN = 760, 380, 60
DDP, SHARDED = "DDP", "ZeRO-3 or FSDP2"
COLORS = {DDP: "#1f77b4", SHARDED: "#d62728"}


class Model(NamedTuple):
    """The published shape: the language model's sizes, parameters of the vision tower."""

    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    tower: float

    @property
    def layer(self) -> int:
        """Parameters of a layer's matrices."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return attention + 3 * self.hidden * self.mlp

    @property
    def parameters(self) -> float:
        return self.layers * self.layer + (1 if self.tied else 2) * self.hidden * self.vocabulary + self.tower

    def lora(self, rank: int) -> int:
        """Parameters of an adapter on all linear layers of the language model."""
        wide, narrow = self.heads * self.head_dim, self.kv_heads * self.head_dim
        sides = 2 * (self.hidden + wide) + 2 * (self.hidden + narrow) + 3 * (self.hidden + self.mlp)
        return self.layers * rank * sides


MODELS = {
    "Qwen2-VL-2B": Model(1536, 8960, 28, 12, 2, 128, 151936, True, 0.67e9),
    "Qwen2-VL-7B": Model(3584, 18944, 28, 28, 4, 128, 152064, False, 0.68e9),
    "Qwen3-VL-8B": Model(4096, 12288, 36, 32, 8, 128, 151936, False, 0.58e9),
    "Qwen2.5-VL-32B": Model(5120, 27648, 64, 40, 8, 128, 152064, False, 0.69e9),
}


class Step(NamedTuple):
    """Of one card: seconds of arithmetic, of exchange, of the whole step; how much of it is arithmetic; GiB at the peak."""

    compute: float
    exchange: float
    seconds: float
    efficiency: float
    gib: float


def step_of(model: Model, method: str, cards: int, given: argparse.Namespace) -> Step:
    """One optimizer step of `given.rows` rows on each card."""
    tokens = given.row_tokens
    language = model.layers * model.layer
    # Forward, forward again where it is recomputed, and backward to the activations alone: no gradient of a frozen weight.
    passes = 3 if given.recompute else 2
    attention = passes * 2 * 2 * model.layers * model.heads * model.head_dim * tokens * given.record_tokens / 2
    patches = tokens * given.picture_share * 4  # a token is four patches
    flops = passes * 2 * language * tokens + attention + 2 * model.tower * patches
    flops += 3 * 2 * model.hidden * model.vocabulary * tokens * given.taught_share
    row = flops / (given.tflops * 1e12 * given.mfu)
    compute = given.rows * row
    adapter_bytes = 4 * model.lora(given.rank)
    at_end = exchanged(adapter_bytes, cards, given, twice=method == DDP)
    slowest = 1 + given.spread / math.sqrt(given.rows) * math.sqrt(2 * math.log(cards)) if cards > 1 else 1.0
    within = 0.0
    if method != DDP:
        # Both gather layer by layer and free what they have used: the same bytes.
        within = (
            2 * given.rows * (exchanged(2 * model.parameters, cards, given, twice=False) + model.layers * latency(cards, given))
        )
    seconds = max(compute * slowest, within) + at_end
    shared = 1 if method == DDP else cards
    weights = 2 * model.parameters / shared + (0 if method == DDP else 2 * 2 * model.layer)
    states = 16 * model.lora(given.rank) / (1 if method == DDP else cards)
    kept = tokens * model.hidden * 2 * model.layers if given.recompute else 0
    layer = tokens * 2 * (4 * model.hidden + 2 * model.heads * model.head_dim + 2 * model.kv_heads * model.head_dim + 3 * model.mlp)
    activations = kept + layer * (1 if given.recompute else model.layers)
    logits = 256 * model.vocabulary * 12
    return Step(compute, within + at_end, seconds, compute / seconds, (weights + states + activations + logits) / GIB)


def latency(cards: int, given: argparse.Namespace) -> float:
    """Seconds until the last card has heard of it."""
    nodes = -(-cards // given.cards_per_node)
    return given.latency_us * 1e-6 * (math.ceil(math.log2(min(cards, given.cards_per_node) or 1)) + 4 * math.ceil(math.log2(nodes)))


def exchanged(size: float, cards: int, given: argparse.Namespace, twice: bool) -> float:
    """Seconds until every card has (or, `twice`, has added up and has) `size` bytes, in a ring whose slowest link counts."""
    if cards == 1:
        return 0.0
    link = given.node_gb_s if cards <= given.cards_per_node else given.network_gb_s
    return (2 if twice else 1) * (cards - 1) / cards * size / (link * 1e9) + latency(cards, given)


def table(given: argparse.Namespace) -> str:
    """Markdown: a row for each model, method and number of cards."""
    titles = ("model", "method", "cards", "arithmetic s", "exchange s", "step s", "efficiency", "GiB a card", "M tokens an hour",
              "card hours for 100 M tokens")  # fmt: skip
    rows: list[Sequence[Any]] = [titles, ["---"] * len(titles)]
    for name in given.models:
        for method in COLORS:
            for cards in given.cards:
                step = step_of(MODELS[name], method, cards, given)
                rate = cards * given.rows * given.row_tokens / step.seconds * 3600 / 1e6
                rows.append((name, method, f"{cards:,}", f"{step.compute:.2f}", f"{step.exchange:.3f}", f"{step.seconds:.2f}",
                             f"{step.efficiency:.0%}", f"{step.gib:.1f}", f"{rate:,.0f}", f"{100 / rate * cards:,.1f}"))  # fmt: skip
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


def draw(name: str, given: argparse.Namespace) -> str:
    """Efficiency by number of cards, a curve for each method, as SVG."""
    most = max(given.cards)

    def place(cards: int, share: float) -> tuple[float, float]:
        across = math.log2(cards) / math.log2(most)
        return round(MARGIN + across * (WIDTH - 2 * MARGIN), 1), round(HEIGHT - MARGIN - share * (HEIGHT - 2 * MARGIN), 1)

    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" font-size="13">',
           '<rect width="100%" height="100%" fill="white"/>',
           f'<text x="{WIDTH / 2}" y="24" text-anchor="middle" fill="#333">{name}: share of a step that is arithmetic, on paper</text>']  # fmt: skip
    for share in (0, 0.25, 0.5, 0.75, 1):
        y = place(1, share)[1]
        out.append(f'<path d="M{MARGIN} {y}H{WIDTH - MARGIN}" stroke="#ddd"/>')
        out.append(f'<text x="{MARGIN - 8}" y="{y + 4}" text-anchor="end" fill="#333">{share:.0%}</text>')
    for cards in given.cards:
        out.append(f'<text x="{place(cards, 0)[0]}" y="{HEIGHT - MARGIN + 20}" text-anchor="middle" fill="#333">{cards:,}</text>')
    out.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 14}" text-anchor="middle" fill="#333">cards</text>')
    for number, method in enumerate(COLORS):
        points = [place(cards, step_of(MODELS[name], method, cards, given).efficiency) for cards in given.cards]
        joined = " ".join(f"{x},{y}" for x, y in points)
        out.append(f'<polyline points="{joined}" fill="none" stroke="{COLORS[method]}" stroke-width="2"/>')
        out.append(f'<text x="{MARGIN + 12 + 60 * number}" y="{HEIGHT - MARGIN - 12}" fill="{COLORS[method]}">{method}</text>')
    return "\n".join([*out, "</svg>\n"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--cards", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024])
    parser.add_argument("--cards-per-node", type=int, default=8)
    parser.add_argument("--tflops", type=float, default=989.0, help="of a card at 16 bits, dense; an H100's data sheet")
    parser.add_argument("--mfu", type=float, default=0.45, help="how much of that the arithmetic reaches: an assumption")
    parser.add_argument("--node-gb-s", type=float, default=400.0, help="GB a second between cards of a node, one way")
    parser.add_argument(
        "--network-gb-s", type=float, default=45.0, help="GB a second of a card to other nodes: 400 Gbit, 90 %% of it"
    )
    parser.add_argument("--latency-us", type=float, default=10.0, help="of one hop within a node; between nodes four times that")
    parser.add_argument("--rows", type=int, default=1, help="of a card in a step")
    parser.add_argument("--row-tokens", type=int, default=4096)
    parser.add_argument("--record-tokens", type=int, default=1024, help="a record's: attention is within it")
    parser.add_argument("--picture-share", type=float, default=0.7, help="of the tokens are pictures'")
    parser.add_argument("--taught-share", type=float, default=0.1, help="of the tokens are taught")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--spread", type=float, default=0.03, help="standard deviation of a row's seconds, as a share")
    parser.add_argument("--no-recompute", dest="recompute", action="store_false", help="activations of all layers are kept")
    parser.add_argument("--svg", type=Path, help="where the efficiency of the first model is drawn")
    given = parser.parse_args()
    said = vars(given).items()
    print("Assumed: " + ", ".join(f"{key}={value}" for key, value in said if key not in ("models", "cards", "svg")) + "\n")
    print(table(given))
    if given.svg:
        given.svg.write_text(draw(given.models[0], given), encoding="utf-8")


if __name__ == "__main__":
    main()
