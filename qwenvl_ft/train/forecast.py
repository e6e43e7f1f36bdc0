"""What memory a run will take on each card, by part, and what to change where that is too much: simulated, on any machine.

>>> Forecaster(load_config("configs/lora.yaml"), card_of("RTX 4090")).of_rows(rows).gib  # of the heaviest rows of its plan
19.3
"""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from transformers import AutoProcessor

from qwenvl_ft.config import Config
from qwenvl_ft.data.chat import Script
from qwenvl_ft.data.families import family_of
from qwenvl_ft.data.prepare import Prepared, prepare
from qwenvl_ft.data.rows import Row, Rows
from qwenvl_ft.data.targets import tower_trains
from qwenvl_ft.train.activations import USABLE, Needs
from qwenvl_ft.train.cards import Card, named_by_driver
from qwenvl_ft.train.dtypes import Multiplications
from qwenvl_ft.train.memory import CONTEXT, as_loaded, held_in, left_of
from qwenvl_ft.train.simulation import TRAINED, WEIGHTS, Shapes, forward, peak_of, shape_of

STEP = 256  # tokens, by which row_tokens is chosen
MFU = 0.4  # of a card's own figure: an assumption, which is printed
CUDA, PIECES, WRITTEN = "CUDA itself, workspaces", "memory in pieces", "a quantized weight, written out"


class Forecast(NamedTuple):
    """Of the heaviest row, whose `parts` are bytes; `kept` of `layers` keep their activations, and auto would keep those of `auto`.
    `flops`: of a token, forward and back."""

    card: Card
    tokens: int
    parts: Counter[str]
    layers: int
    kept: int
    auto: int
    flops: float

    @property
    def gib(self) -> float:
        """All of it."""
        return self.parts.total() / 2**30

    @property
    def fits(self) -> bool:
        """Whether the card has as much."""
        return self.gib <= self.card.gib

    def facts(self, tokens_an_epoch: int) -> dict[str, Any]:
        """What `plan` shows."""
        parts = {name: round(size / 2**30, 2) for name, size in self.parts.items()}
        minutes = None
        if self.card.tflops:
            minutes = round(self.flops * tokens_an_epoch / (MFU * self.card.tflops * 1e12) / 60, 1)
        return {
            "card": self.card.name, "card_gib": round(self.card.gib, 1), "row_tokens": self.tokens, "parts_gib": parts,
            "gib": round(self.gib, 2), "fits": self.fits, "layers": self.layers, "kept": self.kept, "auto_keeps": self.auto,
            "minutes_an_epoch": minutes, "assumed": f"{MFU:.0%} of {self.card.tflops:g} TFLOP/s" if self.card.tflops else None,
        }  # fmt: skip


class Forecaster:
    """Forecasts of runs with these settings on a card. Raises UserError for a model that cannot be simulated."""

    def __init__(self, config: Config, card: Card):
        self.config, self.card = config, card
        self.bf16 = card.bf16 if config.dtype == "auto" else config.dtype == "bfloat16"
        self.model = shape_of(config, self.bf16)
        self.stored = held_in(config.quantization, family_of(config.model))
        sizes = [(as_loaded(*of), self.stored(*of)) for of in self.model.named_parameters()]
        # The largest weight that is quantized: its numbers are there while they are multiplied.
        self.written = max((plain for plain, stored in sizes if stored < plain), default=0)

    def of_rows(self, rows: Sequence[Row], checkpointing: str | bool) -> Forecast:
        """What the heaviest of these rows takes, with `gradient_checkpointing` as given."""
        needs, on = Needs(self.model, self.written), self.config.lora_on
        for row in rows:
            with Shapes(), needs.of_row():
                loss = forward(self.model, row, on)
            del loss
        layers = len(needs.sizes)
        auto = needs.num_kept(int(USABLE["cuda"] * left_of(self.card.gib, self.model, self.stored)))
        kept = auto if checkpointing == "auto" else 0 if checkpointing else layers
        needs.keep(kept)
        peaks = list[Counter[str]]()
        multiplied = Multiplications(self.model)
        with multiplied if self.card.tflops else nullcontext():
            for row in rows:
                peaks.append(peak_of(self.model, row, on, self.stored))
        parts = max(peaks, key=Counter.total)
        moving = parts.total() - parts[WEIGHTS] - parts[TRAINED]
        parts += Counter({CUDA: CONTEXT, PIECES: int(moving / USABLE["cuda"]) - moving, WRITTEN: self.written})
        tokens = [row["input_ids"].numel() for row in rows]
        return Forecast(self.card, max(tokens), parts, layers, kept, auto, multiplied.flops.total() / sum(tokens))

    def that_fits(
        self, found: Forecast, row_tokens: int, rows_at: Callable[[int], Sequence[Row] | None]
    ) -> tuple[dict[str, Any], Forecast | None]:
        """The settings to change so that it fits, and the forecast then; None if nothing does. `rows_at` gives the heaviest rows of
        a plan with other row_tokens; None where a record would be too long."""
        settings: dict[str, Any] = {}
        while not found.fits:
            if self.config.gradient_checkpointing is False and not settings:
                settings["gradient_checkpointing"], rows = "auto", rows_at(row_tokens)
            else:
                fixed = sum(found.parts[part] for part in (WEIGHTS, TRAINED, CUDA))
                room = (self.card.gib * 2**30 - fixed) / (found.parts.total() - fixed)
                row_tokens = int(min(row_tokens * room, row_tokens - STEP)) // STEP * STEP
                settings["row_tokens"], rows = row_tokens, rows_at(row_tokens) if row_tokens >= STEP else None
            if not rows:
                return settings, None
            found = self.of_rows(rows, settings.get("gradient_checkpointing", self.config.gradient_checkpointing))
        return settings, found


class Unshown(Rows):
    """Rows whose media are not decoded: grey, of the planned sizes."""

    def example(self, script: Script) -> Row:
        """One record's tensors."""
        return self.unshown(script)


def heaviest(config: Config, prepared: Prepared) -> list[Row]:
    """The rows of a plan that take most memory."""
    rows = Unshown(prepared.scripts, prepared.plan.rows, prepared.chat, AutoProcessor.from_pretrained(config.model))
    return [rows[number] for number in prepared.heaviest(tower_trains(config.lora_on))]


def memory_of(config: Config, prepared: Prepared, card: Card) -> dict[str, Any]:
    """What `plan` shows of a run's memory: see Forecast.facts; with it, where it does not fit, what to change, in words."""
    forecaster = Forecaster(config, card)
    found = forecaster.of_rows(heaviest(config, prepared), config.gradient_checkpointing)
    longest = int(max(prepared.plan.lengths))

    def rows_at(row_tokens: int) -> list[Row] | None:
        smaller = config.model_copy(update={"row_tokens": row_tokens})
        return heaviest(smaller, prepare(smaller)) if row_tokens >= longest else None

    facts = found.facts(int(prepared.plan.tokens.sum()))
    if found.fits:
        return {**facts, "set": {}, "advice": None, "gib_then": found.gib}
    settings, then = forecaster.that_fits(found, config.row_tokens, rows_at)
    if then:
        return {**facts, "set": settings, "advice": f"set {_lines(settings)}: {then.gib:.1f} GiB then", "gib_then": then.gib}
    advice = "nothing fits: the base and what trains take it all; take a smaller base"
    if (row_tokens := settings["row_tokens"]) < STEP and config.quantization == "none" and config.init_lora_weights is True:
        then_4_bit = memory_of(config.model_copy(update={"quantization": "nf4"}), prepared, card)
        if then_4_bit["fits"] or then_4_bit["set"]:
            settings = {"quantization": "nf4", **then_4_bit["set"]}
            gib = then_4_bit["gib_then"]
            return {**facts, "set": settings, "advice": f"set {_lines(settings)}: {gib:.1f} GiB then", "gib_then": gib}
    elif row_tokens >= STEP:
        advice = f"lower max_pixels (now {config.max_pixels}) until no record is longer than {row_tokens} tokens (now {longest}), "
        advice += f"and set row_tokens: {row_tokens}"
    return {**facts, "set": {}, "advice": advice, "gib_then": None}


def _lines(settings: dict[str, Any]) -> str:
    return ", ".join(f"{key}: {value}" for key, value in settings.items())


def present_card() -> Card | None:
    """The first GPU of this machine; None if torch finds none."""
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    return named_by_driver(found.name, found.total_memory / 2**30, torch.cuda.is_bf16_supported(including_emulation=False))
