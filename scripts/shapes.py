"""Draws pictures of one coloured shape, and teaches a vision tower to see them: what data/tiny, which was made on charts, lacks."""

import math
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy
import torch
from PIL import Image, ImageDraw
from torch import nn
from torch.nn import functional

SIDE = 64  # px of a picture
FINE = 4  # times as large while it is drawn, for smooth edges
COVERED = 0.02  # share of a token that the shape covers, from which on the token is asked for it
Point = tuple[float, float]


class Shape(NamedTuple):
    """A picture, the number of its kind in KINDS, its colour, and the share of each of its cells that it covers."""

    picture: Image.Image
    kind: int
    ink: tuple[int, ...]
    covered: numpy.ndarray


def round_by(corners: int, radius: Callable[[int], float] = lambda corner: 1.0) -> list[Point]:
    """Corners around the middle, the first above it."""
    turns = [2 * math.pi * corner / corners for corner in range(corners)]
    return [(radius(at) * math.sin(turn), -radius(at) * math.cos(turn)) for at, turn in enumerate(turns)]


def ellipse(rng: random.Random) -> list[Point]:
    flat = rng.uniform(0.5, 1.0) if rng.random() < 0.4 else 1.0
    return [(x, flat * y) for x, y in round_by(48)]


def triangle(rng: random.Random) -> list[Point]:
    return round_by(3)


def rectangle(rng: random.Random) -> list[Point]:
    x, y = rng.uniform(0.4, 1.0), rng.uniform(0.4, 1.0)
    return [(-x, -y), (x, -y), (x, y), (-x, y)]


def cross(rng: random.Random) -> list[Point]:
    w = rng.uniform(0.2, 0.4)
    return [(-w, -1), (w, -1), (w, -w), (1, -w), (1, w), (w, w), (w, 1), (-w, 1), (-w, w), (-1, w), (-1, -w), (-w, -w)]


def star(rng: random.Random) -> list[Point]:
    inner = rng.uniform(0.35, 0.5)
    return round_by(10, lambda corner: inner if corner % 2 else 1.0)


KINDS = (ellipse, triangle, rectangle, cross, star)


def draw_shape(rng: random.Random, cells: int) -> Shape:
    """One shape of any colour and size, three in ten of them turned, somewhere on light paper; `covered` is cells x cells."""
    kind = rng.randrange(len(KINDS))
    turn, size = (rng.uniform(0, 2 * math.pi) if rng.random() < 0.3 else 0.0), rng.uniform(5, 17)
    cos, sin = math.cos(turn) * size, math.sin(turn) * size
    points = [(x * cos - y * sin, x * sin + y * cos) for x, y in KINDS[kind](rng)]
    (left, top), (right, bottom) = (tuple(edge(of) for of in zip(*points, strict=True)) for edge in (min, max))
    x0, y0 = rng.uniform(-left, SIDE - right), rng.uniform(-top, SIDE - bottom)
    paper = tuple(rng.randint(225, 255) for _ in range(3))
    while True:
        ink = tuple(rng.choice((0, 128, 255, rng.randint(0, 255))) for _ in range(3))
        if sum(abs(one - other) for one, other in zip(ink, paper, strict=True)) > 150:
            break
    large = Image.new("RGB", (SIDE * FINE, SIDE * FINE), paper)
    where = Image.new("L", large.size)
    for picture, colour in ((large, ink), (where, 255)):
        ImageDraw.Draw(picture).polygon([((x + x0) * FINE, (y + y0) * FINE) for x, y in points], fill=colour)
    covered = numpy.asarray(where.resize((cells, cells), Image.Resampling.BOX), numpy.float32) / 255
    return Shape(large.resize((SIDE, SIDE), Image.Resampling.BOX), kind, ink, covered)


def teach_shapes(model: Any, processor: Any, side: int, steps: int, say: Callable[[str], None], batch: int = 64) -> float:
    """Trains the vision tower and its merger, whole, to say under every token whether a shape is there, of which kind and colour,
    by a throw-away head, on pictures that are enlarged to `side` px. Returns the share of new pictures whose kind it then sees.
    """
    torch.manual_seed(0)
    rng, tower, cells = random.Random("shapes"), model.model.visual, side // 28
    head = nn.Linear(model.config.text_config.hidden_size, len(KINDS) + 4)
    optimizer = torch.optim.AdamW([*tower.parameters(), *head.parameters()], 1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.05)

    def asked() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the head says under each token, whether the shape is there, its kind and its colour."""
        shapes = [draw_shape(rng, cells) for _ in range(batch)]
        inputs = processor.image_processor(
            images=[of.picture for of in shapes], return_tensors="pt", size={"shortest_edge": side**2, "longest_edge": side**2}
        )
        seen = tower(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output
        there = torch.tensor(numpy.stack([of.covered for of in shapes])).flatten(1) > COVERED
        kinds, inks = torch.tensor([of.kind for of in shapes]), torch.tensor([of.ink for of in shapes]) / 255
        return head(seen).view(*there.shape, -1), there, kinds[:, None].expand(there.shape), inks[:, None].expand(*there.shape, 3)

    for step in range(steps):
        said, there, kinds, inks = asked()
        of_place = functional.binary_cross_entropy_with_logits(said[..., -1], there.float())
        of_kind = functional.cross_entropy(said[..., : len(KINDS)][there], kinds[there])
        of_ink = functional.mse_loss(said[..., len(KINDS) : -1][there], inks[there])
        (of_place + of_kind + 2 * of_ink).backward()
        nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            say(f"step {step}  place {of_place:.3f}  kind {of_kind:.3f}  colour {of_ink:.4f}")
    right = []
    with torch.inference_mode():
        for _ in range(10):
            said, there, kinds, _ = asked()
            votes = (said[..., : len(KINDS)].softmax(-1) * there[..., None]).sum(1).argmax(-1)
            right.append((votes == kinds[:, 0]).float().mean().item())
    return sum(right) / len(right)
