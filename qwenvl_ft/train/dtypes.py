"""In which dtypes matrices are multiplied, counted where torch hands them to its kernels, forward and backward.

Nothing else shows it: a run in float32 under a base in bfloat16 learns the same, a few times slower.
"""

import sys
from collections import Counter
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

MATMULS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_"}


class Multiplications(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is entered, adds up FLOPs: of each dtype, and of those in float32 by the part of `model` that asks for them."""

    def __init__(self, model: nn.Module):
        super().__init__()  # type: ignore[no-untyped-call]
        self.names = {id(module): name for name, module in model.named_modules()}
        self.flops, self.in_float32 = Counter[torch.dtype](), Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs it, and counts it. A product that sums nothing, such as of positions and frequencies, is none."""
        name = func.__name__.split(".")[0]
        attends = "attention" in name or "attn" in name
        tensors = [of for of in args if isinstance(of, torch.Tensor)] if attends or name in MATMULS else []
        if attends and len(tensors) > 1:
            self.add(tensors[0].dtype, 4 * tensors[0].numel() * max(tensors[1].shape[:-1]))
        elif tensors and (left := tensors[-2]).shape[-1] > 1:
            self.add(left.dtype, 2 * left.numel() * tensors[-1].shape[-1])
        return func(*args, **(kwargs or {}))

    def add(self, dtype: torch.dtype, flops: int) -> None:
        """Some of a dtype."""
        self.flops[dtype] += flops
        if dtype == torch.float32:
            self.in_float32[self.asking()] += flops

    def asking(self) -> str:
        """The innermost part of the model in the calls that led here, without the numbers of layers."""
        frame = sys._getframe()
        while frame.f_back:
            frame = frame.f_back
            name = self.names.get(id(frame.f_locals.get("self")))
            if name:
                return ".".join([part for part in name.split(".") if not part.isdigit()][-3:])
        return "the backward pass"

    def problem(self) -> str | None:
        """What to say of a run whose base is in bfloat16; None where its multiplications are, too."""
        if not self.in_float32:
            return None
        share = self.in_float32.total() / self.flops.total()
        return f"{share:.1%} of the first step's multiplications ran in float32 and not in bfloat16: {', '.join(self.in_float32)}"
