"""Measures what several questions about each picture cost: each read whole, as transformers does, and their prefix read once, in
batches as `ask --jsonl` and `eval` have them, and one after another as a server has them.

    python scripts/bench_ask.py [--model data/tiny] [--pictures 8] [--questions 5] [--tokens 256] [--batch-size 8]
                                [--new-tokens 8] [--repeats 3]

Makes pictures of noise and asks about them, in each way in turn, on the GPU where there is one. Prints a Markdown table: seconds (of
the CPU's own clock without a GPU; the least of the repeats), and how many of the answers are equal.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from threading import Event
from typing import Any

import torch
from PIL import Image

from qwenvl_ft.infer.engine import Engine
from qwenvl_ft.infer.prefix_cache import PREFIX_BYTES, shown_hash
from qwenvl_ft.serve.api import Sampling
from qwenvl_ft.serve.batching import Batcher, Request

ROOT = Path(__file__).parent.parent
WORDS = "how many titles had the team won in which year what does sign say about price of red car left right total name".split()


def ask(pictures: int, questions: int, side: int) -> list[list[dict[str, Any]]]:
    """So many questions about each picture, one picture's after another's."""
    draw = Random(0)
    shown = [Image.frombytes("RGB", (side, side), draw.randbytes(side * side * 3)) for _ in range(pictures)]
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(8, 20))) for _ in range(pictures * questions)]
    return [
        [{"role": "user", "content": [{"image": shown[number // questions]}, {"text": text}]}] for number, text in enumerate(texts)
    ]


def whole(engine: Engine, batch: list[Any], tokens: int) -> list[str]:
    """The answers to a batch each of whose questions is read from its first token to its last."""
    inputs = engine.inputs(batch)
    with torch.inference_mode():
        out = engine.model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return [engine.chat.answered(ids) for ids in out[:, inputs["input_ids"].shape[1] :].tolist()]


def serve(engine: Engine, talks: list[Any], tokens: int, prefix_bytes: int) -> list[str]:
    """The answers to questions that come one after another, each when the one before is answered."""
    batcher, answers = Batcher(engine, 1, prefix_bytes), list[str]()
    for script in engine.scripts(talks):
        pieces, done = list[str](), Event()

        def hear(text: str, finish: str | None, pieces: list[str] = pieces, done: Event = done) -> None:
            pieces.append(text)
            if finish:
                done.set()

        batcher.submit(Request(engine.inputs_of([script]), engine.adapter, Sampling(tokens), hear, shown=shown_hash(script)))
        done.wait()
        answers.append("".join(pieces))
    batcher.close()
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "data/tiny")
    counts = {"pictures": 8, "questions": 5, "tokens": 256, "batch-size": 8, "new-tokens": 8, "repeats": 3}
    for name, value in counts.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    engine = Engine.open(args.model, max_pixels=2 * args.tokens * 32 * 32)
    side = round(args.tokens**0.5) * engine.chat.limits.unit_px
    talks = ask(args.pictures, args.questions, side)
    batches, tokens = [talks[at : at + args.batch_size] for at in range(0, len(talks), args.batch_size)], args.new_tokens
    ways: dict[str, Callable[[], list[str]]] = {
        "in batches, each read whole": lambda: [answer for batch in batches for answer in whole(engine, batch, tokens)],
        "in batches, a prefix once": lambda: [answer for batch in batches for answer in engine.ask_many(batch, tokens)],
        "served in turn, each read whole": lambda: serve(engine, talks, tokens, 0),
        "served in turn, from what is kept": lambda: serve(engine, talks, tokens, PREFIX_BYTES),
    }
    gpu = torch.cuda.is_available()
    clock = time.perf_counter if gpu else time.process_time
    answers: dict[str, list[str]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.repeats + 1):  # in turn, so that what else the machine does falls on all; the first warms up
        for name, way in ways.items():
            began = clock()
            answers[name] = way()
            seconds[name].append(clock() - began)
    least = {name: min(of[1:]) for name, of in seconds.items()}
    equal = sum(len(set(of)) == 1 for of in zip(*answers.values(), strict=True))
    device = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    print(f"{device}, {args.model.name}, {len(talks)} questions about {args.pictures} pictures, {equal} answers equal in all ways")
    print("| way | seconds | times faster |\n|---|---|---|")
    names = list(ways)
    for number, name in enumerate(names):
        print(f"| {name} | {least[name]:.2f} | {least[names[number // 2 * 2]] / least[name]:.2f} |")


if __name__ == "__main__":
    main()
