"""Of how many layers the activations stay for the backward pass: as many as there is memory for. The others' are recomputed.

What a layer keeps is measured, not guessed: before the first step the heaviest rows go forward once, and what autograd would save
is counted and let go. Which layers are recomputed changes no result: it is the same arithmetic, dropout included, to the bit.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from transformers.modeling_layers import GradientCheckpointingLayer

from qwenvl_ft.console import counting
from qwenvl_ft.model.head import logits_bytes
from qwenvl_ft.model.load import trainable
from qwenvl_ft.model.quantized import written_bytes
from qwenvl_ft.train.cards import sold_with
from qwenvl_ft.train.memory import free_bytes, left_of, memory_for
from qwenvl_ft.train.state import Run

# Of what is free: an allocator's memory is in pieces. On a CPU a process was seen to grow by three times what its tensors hold, and
# a machine has other work.
USABLE = {"cuda": 0.85, "cpu": 0.2}
STATE_BYTES = 12  # of a parameter that trains: its gradient, and two moments of AdamW


class Kept(NamedTuple):
    """Of how many of the layers that train the activations are kept; what the heaviest row takes on the device if all are, and
    what it may take: None where what is free there is not known."""

    layers: int
    kept: int
    tokens: int
    bytes: int
    usable: int | None

    @property
    def facts(self) -> dict[str, int]:
        """For the results."""
        return {"layers": self.layers, "kept": self.kept}

    def __str__(self) -> str:
        row = f"the heaviest row, of {self.tokens:,} tokens,"
        known = "how much memory is free is not known here"
        if self.usable is not None:
            known = f"with all kept {row} takes {self.bytes / 2**30:.1f} GiB, and {self.usable / 2**30:.1f} are left for it"
        recomputed = f", {self.layers - self.kept} recomputed" * (self.kept < self.layers)
        return f"activations of {self.kept} of {self.layers} layers are kept{recomputed}: {known}"


def recompute(model: Any) -> None:
    """Has every layer recompute its activations. After peft is on it, whose hooks would run the frozen vision tower backward."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.disable_input_require_grads()  # for reentrant recomputing; here it would run layers backward below the first that trains


def keep_what_fits(run: Run) -> Kept:
    """Recomputes as few layers as the free memory allows for: the first ones, since the backward pass lets go of the last ones'
    activations first. All processes recompute the same layers.

    Nothing is drawn, no gradient is left and no feature kept. Raises UserError for a row that does not even go forward.
    """
    device, prepared = run.accelerator.device, run.prepared
    rows = prepared.heaviest(run.tower_trains)
    needs = Needs(run.bare, written_bytes(run.bare, torch.bfloat16 if run.bf16 else torch.float32))
    run.model.train()
    with torch.random.fork_rng([device] if device.type == "cuda" else []), counting("measuring activations") as tell:
        for number, row in enumerate(rows):
            if run.accelerator.is_local_main_process:
                tell(number, len(rows))
            tensors, _ = run.rows_of(prepared).build(row)
            with run.exchange(last=False), memory_for(run, prepared, row), needs.of_row():
                loss = run.loss(tensors)
            del loss
    run.accelerator.wait_for_everyone()  # others may have been loading their model
    free = free_bytes(device, int(os.environ.get("LOCAL_WORLD_SIZE", run.accelerator.num_processes)))
    if free is not None and run.config.fit:
        free = min(free, left_of(sold_with(run.config.fit).gib, run.bare))
    usable = None if free is None else int(USABLE[device.type] * free)
    kept = min(gather_object([needs.num_kept(usable or 0)]))
    run.keeps_activations = kept > 0
    needs.keep(kept)
    return Kept(len(needs.sizes), kept, max(map(prepared.tokens, rows)), needs.beside + sum(needs.sizes.values()), usable)


class Needs:
    """What rows take, the most of any: in bytes the activations of each layer that trains, and what there is beside them whichever
    layers are recomputed. `written`: what a weight takes that is quantized and written out for its product."""

    def __init__(self, model: Any, written: int = 0):
        self.model, self.written = model, written
        self.layers = {module: 0 for module in model.modules() if isinstance(module, GradientCheckpointingLayer)}
        self.saved_beside = 0
        for layer in self.layers:
            layer.gradient_checkpointing = False

    @contextmanager
    def of_row(self) -> Iterator[None]:
        """Around the forward pass of a row, whose loss is held until the end."""
        saved = Saved(self.model, [*self.layers])
        with saved.counted():
            yield
            self.saved_beside = max(self.saved_beside, saved.beside())
        self.layers = {layer: max(size, saved.layers[layer]) for layer, size in self.layers.items()}

    @property
    def sizes(self) -> dict[Any, int]:
        """Of the layers that keep something: a frozen tower's keep nothing."""
        return {layer: size for layer, size in self.layers.items() if size}

    @property
    def beside(self) -> int:
        """The gradients within the layer that goes backward are no more than it keeps; the logits are gone by then."""
        state = STATE_BYTES * sum(parameter.numel() for parameter in trainable(self.model).values())
        return self.saved_beside + state + self.written + max([*self.layers.values(), logits_bytes(self.model)])

    def num_kept(self, usable: int) -> int:
        """Of how many layers, from the last one on, the activations fit."""
        left = usable - self.beside
        return sum(taken <= left for taken in accumulate(reversed(self.sizes.values())))

    def keep(self, number: int) -> None:
        """Recomputes all layers but so many."""
        for at, layer in enumerate(self.sizes):
            layer.gradient_checkpointing = at < len(self.sizes) - number


class Saved:
    """What autograd saves of one forward pass, in bytes of distinct storages that are no weights, by layer; it keeps none of a
    layer's, so that all of them need not fit."""

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module]):
        self.model = model
        self.inside: nn.Module | None = None
        self.layers = dict.fromkeys(layers, 0)
        self.inputs: dict[nn.Module, dict[StorageWeakRef, int]] = {}
        self.outside: dict[StorageWeakRef, int] = {}
        self.seen: set[StorageWeakRef] = set()

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Around the forward pass; what is saved in it cannot go backward."""
        hooks = []
        for layer in self.layers:
            hooks.append(layer.register_forward_pre_hook(self._enter, with_kwargs=True))
            hooks.append(layer.register_forward_hook(self._leave, always_call=True))
        try:
            with saved_tensors_hooks(self._save, lambda tensor: tensor):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def beside(self) -> int:
        """The bytes that stay whichever layers are recomputed: what is saved outside of them, and what they are given."""
        stays = {storage: size for storage, size in self.outside.items() if not storage.expired()}
        for layer, given in self.inputs.items():
            stays |= given if self.layers[layer] else {}
        return sum(stays.values())

    def _enter(self, layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        given = [of for value in (*inputs, *named.values()) for of in (value if isinstance(value, tuple) else [value])]
        storages = [of.untyped_storage() for of in given if isinstance(of, torch.Tensor)]
        self.inputs[layer] = {StorageWeakRef(of): of.nbytes() for of in storages}
        self.inside = layer

    def _leave(self, layer: nn.Module, inputs: object, output: object) -> None:
        self.inside = None

    def _save(self, tensor: torch.Tensor) -> torch.Tensor | None:
        storage, layer = tensor.untyped_storage(), self.inside
        known = StorageWeakRef(storage)  # held, it stands for this storage alone, though its memory may be another's by now
        # Asked each time: ZeRO-3 gathers a weight for its layer, into memory of its own.
        weights = {StorageWeakRef(of.untyped_storage()) for of in (layer or self.model).parameters()}
        if known not in weights and known not in self.seen:
            self.seen.add(known)
            if layer is None:
                self.outside[known] = storage.nbytes()
            elif known not in self.inputs[layer]:
                self.layers[layer] += storage.nbytes()
        return tensor if layer is None else None  # the LM head goes backward within its forward pass
