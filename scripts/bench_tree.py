"""Measures what records that share a picture cost: each in a row of its own, packed, and as trees, which pay for a picture once.

    python scripts/bench_tree.py [--model data/tiny] [--pictures 4] [--questions 5] [--tokens 256] [--row-tokens 4096] [--repeats 3]

Makes pictures of noise and talks about them, and runs them forward and backward in turn, on the GPU where there is one. Prints a Markdown
table: the tokens and pictures that are run, seconds (of the CPU's own clock without a GPU; the least of the repeats), the summed loss, and
how far the LoRA gradients are from those of records alone, over the largest of them.
"""

import argparse
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Any

import torch
from PIL import Image
from transformers import AutoProcessor

from qwenvl_ft.data.chat import Chat, Script, open_chat
from qwenvl_ft.data.packed import NUMBERS, pack_scripts
from qwenvl_ft.data.packing import Alike, pack
from qwenvl_ft.data.records import Picture, Record, Turn
from qwenvl_ft.data.rows import Row, Rows
from qwenvl_ft.model.load import add_lora, limited, load_base, trainable
from qwenvl_ft.model.lora import fuse_lora
from qwenvl_ft.model.loss import summed_loss

ROOT = Path(__file__).parent.parent
WORDS = "how many titles had the team won in which year what does sign say about price of red car left right total name".split()


def write_scripts(chat: Chat, folder: Path, pictures: int, questions: int, tokens: int) -> list[Script]:
    """So many questions about each picture, which takes about so many tokens."""
    draw, side = Random(0), round(tokens**0.5) * chat.limits.unit_px
    records = []
    for number in range(pictures):
        path = folder / f"{number}.png"
        Image.frombytes("RGB", (side, side), draw.randbytes(side * side * 3)).save(path)
        for _ in range(questions):
            question, answer = (" ".join(draw.choices(WORDS, k=draw.randint(*of))) for of in ((8, 20), (2, 20)))
            turns = Turn("user", (Picture(path, side, side), question)), Turn("assistant", (answer,))
            records.append(Record(f"record {len(records)}", turns))
    return [script for record in records for script in chat.write_scripts(record)]


def run(model: Any, rows: list[Row]) -> tuple[float, float, torch.Tensor]:
    """Seconds, summed loss and gradients."""
    gpu = next(model.parameters()).is_cuda
    clock = time.perf_counter if gpu else time.process_time
    model.zero_grad()
    began, total = clock(), 0.0
    for row in rows:
        row = {key: value.cuda() if gpu and isinstance(value, torch.Tensor) else value for key, value in row.items()}
        loss = summed_loss(model, model, row, False)
        loss.backward()
        total += loss.item()
    if gpu:
        torch.cuda.synchronize()
    return clock() - began, total, torch.cat([parameter.grad.flatten() for parameter in trainable(model).values()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "data/tiny")
    for name, value in {"pictures": 4, "questions": 5, "tokens": 256, "row-tokens": 4096, "repeats": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    chat = open_chat(args.model, max_pixels=2 * args.tokens * 32 * 32)
    model = add_lora(load_base(args.model, "auto", "varlen"), chat.family, ["language"], 8, 16, 0.0, 0).train()
    fuse_lora(model)
    for name, parameter in trainable(model).items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    model = model.cuda() if torch.cuda.is_available() else model
    with tempfile.TemporaryDirectory() as folder:
        scripts = write_scripts(chat, Path(folder), args.pictures, args.questions, args.tokens)
        media = {of: at for at, of in enumerate(dict.fromkeys(of for script in scripts for of in script.media))}
        numbers = pack_scripts([*enumerate(scripts)], media).numbers
        length, back, shared = (numbers[:, NUMBERS.index(name)] for name in ("length", "back", "shared"))
        plans = {
            "each alone": [[at] for at, script in enumerate(scripts) if script.length <= args.row_tokens],
            "packed": pack(length, args.row_tokens).rows,
            "trees": pack(length, args.row_tokens, alike=Alike(back, shared)).rows,
        }
        processor = limited(AutoProcessor.from_pretrained(args.model), chat)
        ways = {name: [*Rows(scripts, plan, chat, processor)] for name, plan in plans.items()}
    found = {name: [run(model, rows)] for name, rows in ways.items()}  # the first is not counted: it warms up
    for _ in range(args.repeats):  # in turn, so that what else the machine does falls on all
        for name, rows in ways.items():
            found[name].append(run(model, rows))
    wanted = found["each alone"][0][2]
    least = {name: min(seconds for seconds, _, _ in runs[1:]) for name, runs in found.items()}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{device}, {args.model.name}, {len(scripts)} records of {args.pictures} pictures")
    print(
        "| way | rows | tokens | pictures | seconds | times faster | loss | gradients differ by |\n|---|---|---|---|---|---|---|---|"
    )
    for name, rows in ways.items():
        tokens, shown = sum(row["input_ids"].numel() for row in rows), sum(len(row["image_grid_thw"]) for row in rows)
        _, loss, gradients = found[name][0]
        apart = ((gradients - wanted).abs().max() / wanted.abs().max()).item()
        faster = least["each alone"] / least[name]
        print(f"| {name} | {len(rows)} | {tokens:,} | {shown} | {least[name]:.3f} | {faster:.2f} | {loss:.4f} | {apart:.0e} |")


if __name__ == "__main__":
    main()
