"""Cards by name: what memory a run finds on each, whether it has bfloat16, how fast it multiplies. Imports nothing heavy."""

import math
import re
from difflib import get_close_matches
from typing import NamedTuple

from qwenvl_ft.errors import Problem, UserError


class Card(NamedTuple):
    """`gib`: what the driver gives of it, about 1 less than it is sold with; `tflops`: dense, in bfloat16, by its data sheet."""

    name: str
    gib: float
    tflops: float | None = None
    bf16: bool = True


# Name: GiB that it is sold with, TFLOP/s; those without have no bfloat16.
SOLD: dict[str, tuple[float, float | None]] = {
    "T4": (16, None), "V100-16GB": (16, None), "V100-32GB": (32, None), "RTX 3060": (12, 51), "RTX 3090": (24, 71),
    "RTX 4070 Ti SUPER": (16, 88), "RTX 4080": (16, 97), "RTX 4090": (24, 165), "RTX 5080": (16, 113), "RTX 5090": (32, 210),
    "RTX A6000": (48, 155), "RTX 6000 Ada": (48, 364), "A10": (23, 125), "L4": (23, 121), "L20": (48, 120), "L40S": (45, 362),
    "A100-40GB": (40, 312), "A100-80GB": (80, 312), "A800": (80, 312), "H20": (96, 148), "H100": (80, 989), "H800": (80, 989),
    "H200": (141, 989), "B200": (180, 2250),
}  # fmt: skip
CARDS = {name: Card(name, gib - 1, tflops, tflops is not None) for name, (gib, tflops) in SOLD.items()}
MAKERS = r"nvidia|geforce|tesla|[^a-z0-9]"  # what people leave out, or write in their own way


def card_of(text: str) -> Card:
    """A card by its name or by the GiB that it is sold with. Raises UserError."""
    plain = {_plain(name): card for name, card in CARDS.items()}
    if card := plain.get(_plain(text)):
        return card
    try:
        if 1 < (gib := float(text)) < math.inf:
            return sold_with(gib)
    except ValueError:
        pass
    close = [name for name in plain if name.startswith(_plain(text))] or get_close_matches(_plain(text), plain, 1)
    named = " or ".join(plain[name].name for name in close)
    fix = f"did you mean {named}? Or " if close and _plain(text) else f"choose among {', '.join(CARDS)}, or "
    raise UserError(Problem(f"--gpu {text}", "is no card that is known here", f"{fix}give its GiB, as in --gpu 24"))


def sold_with(gib: float) -> Card:
    """Any card with so much memory."""
    return Card(f"a card of {gib:g} GiB", gib - 1)


def named_by_driver(name: str, gib: float, bf16: bool) -> Card:
    """A card that is here, which may be in the table, too: NVIDIA A100-SXM4-80GB."""
    known = [card for key, card in CARDS.items() if _plain(key.split("-")[0]) == _plain(re.split(r"-| PCIe| \d+GB", name)[0])]
    return Card(name, gib, known[0].tflops if known else None, bf16)


def _plain(name: str) -> str:
    return re.sub(MAKERS, "", name.lower())
