"""A model of shapes alone, and what memory a row takes in training it: known with no weights, no GPU and no arithmetic.

Numbers with a fraction have a shape and no values (torch's device `meta`); whole numbers, of which lengths and places follow, are
real. The code that runs is that of training; what is counted is every storage that torch makes, from when it is made to when
nothing holds it any more.
"""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.modeling_layers import GradientCheckpointingLayer

from qwenvl_ft.config import Config
from qwenvl_ft.data.families import family_of
from qwenvl_ft.data.rows import Row
from qwenvl_ft.data.targets import tower_trains
from qwenvl_ft.model.load import refit, trainable
from qwenvl_ft.model.loss import summed_loss
from qwenvl_ft.train.activations import recompute
from qwenvl_ft.train.memory import Stored, as_loaded
from qwenvl_ft.train.setup import adapted

META = torch.device("meta")
UNIT = 512  # bytes, of which a GPU's allocator gives whole ones
ATEN = torch.ops.aten
EYES = (ATEN.eye.default, ATEN.eye.m)
INDEXING = (ATEN.index.Tensor, ATEN.index_put.default, ATEN.index_put_.default)
# The parts that memory is counted by.
WEIGHTS, TRAINED, ACTIVATIONS, TOWER, LOGITS, BACKWARD = (
    "base weights",
    "adapter, gradients, optimizer",
    "activations that are kept",
    "vision tower",
    "logits and loss",
    "backward pass, of a layer",
)


def shape_of(config: Config, bf16: bool) -> Any:
    """The model that a run of these settings trains, of which config.json is enough. Raises UserError for an unknown family."""
    family_of(config.model)  # before transformers is asked, whose error is no UserError
    with META:
        model = AutoModelForImageTextToText.from_config(
            AutoConfig.from_pretrained(config.model), dtype=torch.bfloat16 if bf16 else torch.float32
        )
    # flash_attention_2, which auto may be, keeps as much as varlen.
    attention = config.attn_implementation
    model = refit(model, "varlen" if attention in ("auto", "flash_attention_2") else attention)
    with torch.random.fork_rng([]):
        model = adapted(model, config)
    recompute(model)
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            for part in layer.children():
                Fused().hang_on(part)
    return model.train()


class Shapes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is entered, what has a shape alone is computed with, and its bytes are added up by the part in `part`: those that
    are there `now`, the most that were (`peak`), and what they were then (`at_peak`)."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.part, self.now, self.peak = ACTIVATIONS, Counter[str](), 0
        self.at_peak, self.known = Counter[str](), set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs it on real numbers, or as shapes if one of them is only that."""
        kwargs = kwargs or {}
        if any(of.is_meta for of in tree_leaves((args, kwargs)) if isinstance(of, torch.Tensor)):
            if func in INDEXING:  # by a mask whose number of places is known
                args = (args[0], [place for of in args[1] for place in _places(of)], *args[2:])
            args, kwargs = tree_map_only(torch.Tensor, lambda of: of if of.is_meta else of.to(META), (args, kwargs))
            made = func(*args, **kwargs)
        else:
            # DoRA's, as large as a layer is wide, is a shape from the first.
            here = {"device": torch.device("cpu")} if "device" in kwargs and func not in EYES else {}
            made = func(*args, **(kwargs | here))
            made = tree_map_only(torch.Tensor, lambda of: of.to(META) if of.is_floating_point() else of, made)
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor, self.part)
        return made

    def add(self, tensor: torch.Tensor, part: str, num_bytes: int | None = None) -> None:
        """Counts what holds a tensor, if it is not known yet: as so many bytes, if they are given, of this part."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        size = -(-(storage.nbytes() if num_bytes is None else num_bytes) // UNIT) * UNIT
        if key in self.known or not size:
            return
        self.known.add(key)
        self.now[part] += size
        weakref.finalize(storage, self._forget, key, part, size)
        if (total := self.now.total()) > self.peak:
            self.peak, self.at_peak = total, self.now.copy()

    def _forget(self, key: int, part: str, size: int) -> None:
        self.known.discard(key)
        self.now[part] -= size

    @contextmanager
    def as_part(self, part: str) -> Iterator[None]:
        """What is made meanwhile is of this part."""
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before


class Fused(TorchFunctionMode):
    """Within the modules that it is hung on, attention to shapes is by one kernel, as it is on a CPU and a GPU; torch would take
    many for them. There, since the backward pass, which recomputes them, leaves every mode of functions that it is begun in."""

    def hang_on(self, module: torch.nn.Module) -> None:
        """Around its forward pass, to the end or to where recomputing stops."""

        def enter(module: torch.nn.Module, inputs: object) -> None:
            self.__enter__()  # type: ignore[no-untyped-call]

        def leave(module: torch.nn.Module, inputs: object, output: object) -> None:
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave, always_call=True)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs it, or the kernel in its place."""
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention and args[0].is_meta:
            return _attended(*args, **kwargs)
        return func(*args, **kwargs)


def _attended(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> torch.Tensor:  # fmt: skip
    """With the arguments of torch's scaled_dot_product_attention; a mask of bits becomes one of numbers."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = attn_mask.to(META).to(query.dtype)
    kernel = ATEN._scaled_dot_product_flash_attention_for_cpu
    attended: torch.Tensor = kernel(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
    return attended


def _places(index: torch.Tensor | None) -> Any:
    return [index] if index is None or index.is_meta or index.dtype != torch.bool else index.nonzero().unbind(1)


def forward(model: Any, row: Row, on: Any) -> torch.Tensor:
    """The loss of a row, within `Shapes`."""
    return summed_loss(model, model, row, tower_trains(on))


def peak_of(model: Any, row: Row, on: Any, stored: Stored = as_loaded) -> Counter[str]:
    """By its parts, in bytes, the memory that is needed at most while a row goes forward and back through a model of shapes, in any
    step but the first: gradients and the optimizer's moments are there."""
    shapes, parts = Shapes(), {model.get_base_model().model.visual: TOWER, model.get_output_embeddings(): LOGITS}
    entered = list[Any]()

    def enter(module: torch.nn.Module, inputs: object) -> None:
        entered.append(inside := shapes.as_part(shapes.part if shapes.part == BACKWARD else parts[module]))
        inside.__enter__()

    def leave(module: torch.nn.Module, inputs: object, output: object) -> None:
        entered.pop().__exit__(None, None, None)

    hooks = [hook for of in parts for hook in (of.register_forward_pre_hook(enter), of.register_forward_hook(leave))]
    train = trainable(model)
    try:
        with shapes:
            for name, parameter in model.named_parameters():
                shapes.add(parameter, *([TRAINED] if name in train else [WEIGHTS, stored(name, parameter)]))
            for buffer in model.buffers():
                shapes.add(buffer, WEIGHTS)
            with shapes.as_part(TRAINED):
                moments = [torch.zeros_like(parameter) for parameter in train.values() for _ in range(2)]
                for parameter in train.values():
                    parameter.grad = torch.zeros_like(parameter)
            for tensor in row.values():
                if isinstance(tensor, torch.Tensor):
                    shapes.add(tensor, ACTIVATIONS)
            loss = forward(model, row, on)
            with shapes.as_part(BACKWARD):
                loss.backward()  # type: ignore[no-untyped-call]
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in train.values():
            parameter.grad = None
    del moments
    return shapes.at_peak
