"""Makes the data of docs/recipes: receipts and their fields, discs and their boxes, short films and their captions.

Writes OUT/train.json and OUT/eval.json, whose media lie in OUT/media. The same arguments give the same records and pixels. No picture
or film is made twice, and what is held out is combined as nothing in training is: a disc's colour with its place, a film's two colours
with the lamp's place. For documents and boxes OUT/base is data/tiny, which never saw a brace, a quote or a token of boxes, with room to learn them.

    python scripts/make_recipe_data.py documents data/documents
"""

import argparse
import hashlib
import itertools
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy
import torch
from charts import CELL, PAPER_COLORS, UNIT, letter_mask, spelled
from PIL import Image, ImageColor, ImageDraw
from safetensors.torch import load_file, save_file

TINY = Path(__file__).parent.parent / "data" / "tiny"
GOODS = "Bread Milk Tea Rice Apples Cheese Coffee Honey Soap Salt Butter Pears Nuts Eggs Flour Plums Juice Oil Jam Leeks".split()
COLORS = {"red": "#e0312f", "green": "#2fa84f", "blue": "#2f62e0", "yellow": "#e8c62f"}
FRAMES = 8  # of a film of two seconds
Record = dict[str, Any]


def record(question: str, answer: str) -> Record:
    """One question and its answer, in the documented form."""
    return {"conversations": [{"from": "user", "value": question}, {"from": "assistant", "value": answer}]}


def shade(color: str, rng: random.Random) -> tuple[int, ...]:
    """A colour near this one, RGB: so no two media are alike that show the same."""
    return tuple(min(255, max(0, part + rng.randint(-12, 12))) for part in ImageColor.getrgb(color))


def document(name: str, folder: Path, rng: random.Random, held_out: bool) -> Record:
    """A receipt of one to three goods and their sum, and what it says as JSON. Letters stand as in the charts. Goods and prices are
    too many to come twice by more than chance, so the held-out ones are drawn as the others are."""
    prices = {good: rng.randrange(2, 199) / 2 for good in rng.sample(GOODS, rng.randint(1, 3))}
    lines = [*prices.items(), ("Total", sum(prices.values()))]
    at = UNIT * rng.randint(4, 5)
    picture = Image.new("RGB", (at + 6 * CELL, UNIT * (1 + len(lines))), rng.choice(PAPER_COLORS))
    for row, (good, price) in enumerate(lines, start=1):
        for left, text in ((0, good), (at, spelled(price))):
            for number, letter in enumerate(text):
                picture.paste("#000000", (left + number * CELL + 1, row * UNIT + 3), letter_mask(letter, 2))
    picture.save(folder / f"{name}.png", optimize=True)
    fields = {"items": [{"name": good, "price": spelled(price)} for good, price in prices.items()], "total": spelled(lines[-1][1])}
    return record(f"<img>{name}.png</img>\nRead it as JSON.", json.dumps(fields))


def lit_paper(side: int, green: int) -> Image.Image:
    """A square of paper (px) that darkens to the right in red and downwards in blue: it shows where it is, as a scene does."""
    fall = numpy.linspace(255, 60, side)
    red, blue = numpy.meshgrid(fall, fall)
    return Image.fromarray(numpy.stack([red, numpy.full_like(red, green), blue], axis=-1).astype(numpy.uint8))


def boxes(name: str, folder: Path, rng: random.Random, held_out: bool) -> Record:
    """A coloured disc on lit paper, and its box in px. At each of the 16 places one of the four colours is held out."""
    picture = lit_paper(4 * UNIT, 235)
    column, row = rng.randrange(4), rng.randrange(4)
    kept_back, *others = sorted(COLORS)[(column + row) % 4 :] + sorted(COLORS)[: (column + row) % 4]
    color = kept_back if held_out else rng.choice(others)
    left, top = UNIT * column, UNIT * row
    box = (left, top, left + UNIT, top + UNIT)
    ImageDraw.Draw(picture).ellipse((left, top, left + UNIT - 1, top + UNIT - 1), fill=shade(COLORS[color], rng))
    picture.save(folder / f"{name}.png", optimize=True)
    return record(f"<img>{name}.png</img>\nWhat is where?", json.dumps([{"bbox_2d": box, "label": f"{color} disc"}]))


def film(name: str, folder: Path, rng: random.Random, held_out: bool) -> Record:
    """Two seconds of a lamp that changes its colour, and the sentence that says so. In each of the four corners three of the twelve
    pairs of colours are held out."""
    right, low = rng.randrange(2), rng.randrange(2)
    pairs = list(itertools.permutations(sorted(COLORS), 2))
    kept_back = pairs[2 * low + right :: 4]
    colors = rng.choice(kept_back if held_out else [pair for pair in pairs if pair not in kept_back])
    left, top = (UNIT * far + rng.randint(0, 6) * (-1 if far else 1) for far in (right, low))
    paper = shade(rng.choice(PAPER_COLORS), rng)
    first, second = (shade(COLORS[color], rng) for color in colors)
    change = rng.randint(3, 5)  # the first frame of the second colour
    with av.open(str(folder / f"{name}.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=FRAMES // 2)
        stream.width, stream.height, stream.pix_fmt = 3 * UNIT, 3 * UNIT, "yuv420p"
        for number in range(FRAMES):
            frame = Image.new("RGB", (3 * UNIT, 3 * UNIT), paper)
            color = first if number < change else second
            ImageDraw.Draw(frame).rectangle((left, top, left + 2 * UNIT - 1, top + 2 * UNIT - 1), fill=color)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(numpy.asarray(frame), format="rgb24")))
        container.mux(stream.encode())
    return record(f"<video>{name}.mp4</video>\nWhat happens?", f"A lamp turns from {colors[0]} to {colors[1]}.")


def write_base(folder: Path) -> None:
    """data/tiny with embeddings of their own for tokens that its training never showed. It left them all one vector, so that no LoRA
    below the frozen, tied head could tell `{` from a quote; the bases that are published have seen all of theirs."""
    shutil.copytree(TINY, folder, dirs_exist_ok=True)
    weights = load_file(folder / "model.safetensors")
    rows = weights["model.embed_tokens.weight"]
    brace = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]["{"]
    unseen = torch.nn.functional.cosine_similarity(rows.float(), rows[brace].float(), dim=1) > 0.99
    new = torch.randn(rows.shape, generator=torch.Generator().manual_seed(0)) * rows[~unseen].float().std()
    rows[unseen] = new[unseen].to(rows.dtype)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


KINDS: dict[str, Callable[[str, Path, random.Random, bool], Record]] = {"documents": document, "boxes": boxes, "films": film}


def records(kind: str, count: int, seed: int, media: Path) -> dict[str, list[Record]]:
    """`count` records to train on, a quarter as many held out. A medium that was made already is drawn again."""
    rng = random.Random(f"{kind} {seed}")
    made: dict[str, list[Record]] = {"train": [], "eval": []}
    seen = set()
    for split, wanted in (("train", count), ("eval", count // 4)):
        while len(made[split]) < wanted:
            name = f"{split}-{len(made[split])}"
            drawn = KINDS[kind](name, media, rng, split == "eval")
            [file] = media.glob(f"{name}.*")
            digest = hashlib.sha256(file.read_bytes()).digest()
            if digest not in seen:
                seen.add(digest)
                made[split].append(drawn)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("out", type=Path)
    parser.add_argument("--records", type=int, default=300, help="to train on; a quarter as many are held out")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    media = args.out / "media"
    media.mkdir(parents=True, exist_ok=True)
    for split, made in records(args.kind, args.records, args.seed, media).items():
        (args.out / f"{split}.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    if args.kind != "films":  # whose captions are of letters alone
        write_base(args.out / "base")
    print(f"{args.out}: {args.records} records to train on, {args.records // 4} held out")


if __name__ == "__main__":
    main()
