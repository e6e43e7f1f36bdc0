"""What training takes of a card's memory, of models by methods, as `qwenvl-ft plan --gpu` forecasts it: simulated, no GPU is used.

    python scripts/memory_table.py                  # the table of docs/memory.md, in some minutes
    python scripts/memory_table.py --only Qwen2-VL-2B

A row of 4,096 tokens, 3,500 of them taught, of three records with a picture each; LoRA of rank 16. With 27B one record of 2,048.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import real_shapes
from transformers import AutoConfig

from qwenvl_ft.config import Config
from qwenvl_ft.console import counting, print_line
from qwenvl_ft.data.families import FAMILIES
from qwenvl_ft.data.rows import Row, join
from qwenvl_ft.train.cards import sold_with
from qwenvl_ft.train.forecast import Forecast, Forecaster

TOWER = real_shapes.SHAPES["Qwen3-VL-8B"][2]
LARGE = {
    "Qwen3-VL-32B": ("qwen3_vl", real_shapes.text(
        5120, 25600, 64, 64, 8, 151936, head_dim=128, rope_parameters=real_shapes.INTERLEAVED
    ), TOWER | {"out_hidden_size": 5120}),
    "Qwen3.6-27B": ("qwen3_5", real_shapes.text(
        5120, 17408, 64, 24, 4, 248320, head_dim=256, linear_num_value_heads=48,
        rope_parameters=real_shapes.INTERLEAVED | {"mrope_section": [11, 11, 10], "partial_rotary_factor": 0.25},
    ), {key: of for key, of in TOWER.items() if key != "deepstack_visual_indexes"} | {"out_hidden_size": 5120}),
}  # fmt: skip
HEAD = ["model", "tokens", "weights", "all recomputed", "nothing recomputed", "LoRA on tower and merger, too, all recomputed",
        "nf4, all recomputed", "24 GiB (23 of them there)", "80 GiB (79 there)"]  # fmt: skip
EVERYWHERE = ["language", "vision", "merger"]


def config_of(name: str) -> Any:
    """The real shape of a model, large ones too."""
    if name not in LARGE:
        return real_shapes.config_of(name, toy=False)
    kind, language, tower = LARGE[name]
    return AutoConfig.for_model(kind, text_config=language, vision_config=tower, tie_word_embeddings=False, **real_shapes.IDS)


def rows_of(config: Any, tokens: int) -> list[Row]:
    """A row of about so many tokens, of which as many are taught as 3,500 of 4,096."""
    records = 1 if FAMILIES[config.model_type].linear_attention else 3
    return [join(real_shapes.records(config, tokens, records, tokens * 3500 // 4096, 1))]


def line_of(name: str) -> list[str]:
    """A model's line of the table."""
    config, tokens = config_of(name), 2048 if name == "Qwen3.6-27B" else 4096
    rows = rows_of(config, tokens)
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        base = {"model": Path(folder), "train_meta_file": "none", "output_dir": Path("none")}

        def forecast(gib: float, checkpointing: str | bool, **settings: Any) -> Forecast:
            return Forecaster(Config(**base, **settings), sold_with(gib)).of_rows(rows, checkpointing)

        recomputed, kept = forecast(80, True), forecast(80, False)
        forecaster = Forecaster(Config(**base), sold_with(24))
        settings, then = forecaster.that_fits(forecaster.of_rows(rows, "auto"), tokens, lambda fewer: rows_of(config, fewer))
        small, large = "nothing fits", "nothing fits"
        if then:
            chosen = f"row_tokens {settings['row_tokens']:,}" if settings else "as it is"
            small = f"{chosen}, {then.kept} of {then.layers} layers kept: {then.gib:.1f}"
        on_80 = forecast(80, "auto")
        if on_80.fits:
            large = f"{on_80.kept} of {on_80.layers} layers kept: {on_80.gib:.1f}"
        return [
            name, f"{rows[0]['input_ids'].numel():,}", f"{recomputed.parts['base weights'] / 2**30:.1f}", f"{recomputed.gib:.1f}",
            f"{kept.gib:.1f}", f"{forecast(80, True, lora_on=EVERYWHERE).gib:.1f}", f"{forecast(80, True, quantization='nf4').gib:.1f}",
            small, large,
        ]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table, line by line."""
    names = [*real_shapes.SHAPES, *LARGE]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="these models, not all")
    only = parser.parse_args(arguments).only
    print_line(f"| {' | '.join(HEAD)} |")
    print_line("|---" * len(HEAD) + "|")
    for number, name in enumerate(only):
        with counting("simulating") as tell:
            tell(number, len(only))
            line = line_of(name)
        print_line(f"| {' | '.join(line)} |")


if __name__ == "__main__":
    main()
