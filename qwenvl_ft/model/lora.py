"""A linear layer with LoRA as one function of autograd: y = x W' + b + s (x A') B', in the dtype of the frozen weights.

PEFT runs it as six: the adapter's product is written, scaled, written again, added, and each on the way back, too. And in what
dtype PEFT's adapters multiply hangs on autocast, which DeepSpeed's engine switches off; here it does not, though the adapter's
own weights and their gradients are float32.

    >>> fuse_lora(model)  # what PEFT made; names, saving and merging stay PEFT's
"""

from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from qwenvl_ft.model.quantized import QuantizedLinear

# Axes: T = tokens, I and O = the layer's inputs and outputs, R = the rank. What is thin lies (R, T): a CPU's matmuls with few
# columns are up to twelve times slower than those with few rows.


class FusedLora(Linear):
    """PEFT's layer; what is not plain LoRA on a plain linear layer runs as PEFT has it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., I) -> (..., O)."""
        base, name = self.base_layer, self.active_adapters[0]
        if not self.is_plain(name):
            # Here, since an engine around the model may have switched it off.
            with torch.autocast(x.device.type, torch.bfloat16, enabled=x.dtype == torch.bfloat16):
                return super().forward(x)
        a, b, dropped = self.lora_A[name].weight, self.lora_B[name].weight, self.lora_dropout[name](x)
        return _LoraLinear.apply(x, None if dropped is x else dropped, base, a, b, self.scaling[name])  # type: ignore[no-any-return]

    def is_plain(self, name: str) -> bool:
        """Whether this adapter, and it alone, adds a product of two matrices; and whether the weights are there without calling the
        modules that hold them, whose hooks would bring them (ZeRO-3)."""
        plain = name in self.lora_A and name not in self.lora_variant and not self.lora_bias[name] and not self.fan_in_fan_out
        if not plain or len(self.active_adapters) > 1 or self.disable_adapters or self.merged:
            return False
        parts = (self.base_layer, self.lora_A[name], self.lora_B[name])
        known = type(self.base_layer) in (nn.Linear, QuantizedLinear) and {*map(type, parts[1:])} == {nn.Linear}
        return known and not any(part._forward_pre_hooks or part._forward_hooks for part in parts)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, dropped: torch.Tensor | None, base: nn.Linear, a: torch.Tensor, b: torch.Tensor, scaling: float
    ) -> torch.Tensor:  # fmt: skip
        """`dropped` is what the adapter sees, x itself where it is None. Products are summed in float32 by the matmul; in 16 bits
        rounded are x A', y once without the adapter and once with it. A weight that is quantized is written out here, and again
        on the way back, for these products alone."""
        seen = (x if dropped is None else dropped).flatten(0, -2)
        low_RT = a.to(x.dtype) @ seen.T
        quantized = base if isinstance(base, QuantizedLinear) else None
        weight = quantized.dequantized(x.dtype) if quantized else base.weight
        y = functional.linear(x, weight, base.bias)
        y.view(-1, y.shape[-1]).addmm_(low_RT.T, b.to(x.dtype).T, alpha=scaling)
        ctx.save_for_backward(seen, low_RT, None if quantized else weight, a, b)
        ctx.scaling, ctx.drops, ctx.quantized = scaling, dropped is not None, quantized
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Those of A and B leave their matmul in its dtype, as those of autocast do, and are summed up over rows in float32."""
        seen, low_RT, weight, a, b = ctx.saved_tensors
        dy_TO = dy.flatten(0, -2)
        d_low_RT = b.to(dy.dtype).T @ dy_TO.T
        d_a = (d_low_RT @ seen).to(a.dtype).mul_(ctx.scaling)
        d_b = (low_RT @ dy_TO).T.to(b.dtype).mul_(ctx.scaling)
        d_x = d_dropped = None
        if ctx.needs_input_grad[0]:
            d_x = dy @ (ctx.quantized.dequantized(dy.dtype) if ctx.quantized else weight)
            if not ctx.drops:
                d_x.view(-1, d_x.shape[-1]).addmm_(d_low_RT.T, a.to(dy.dtype), alpha=ctx.scaling)
        if ctx.needs_input_grad[1]:
            d_dropped = (d_low_RT.T @ a.to(dy.dtype)).mul_(ctx.scaling).view(*dy.shape[:-1], -1)
        return d_x, d_dropped, None, d_a, d_b, None


def fuse_lora(model: Any) -> None:
    """Has the LoRA linears of a model run so, in place."""
    for layer in model.modules():
        if type(layer) is Linear:
            layer.__class__ = FusedLora
            layer.cast_input_dtype_enabled = bool(layer.lora_variant)  # its own products are in the dtype of the frozen weights


def multiply_in_dtype_of_input(module: nn.Module) -> None:
    """Has a module whose weights are float32, so that small steps count, multiply in bfloat16 what comes in it."""
    plain = module.forward

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        with torch.autocast(hidden.device.type, torch.bfloat16, enabled=hidden.dtype == torch.bfloat16):
            return plain(hidden)  # type: ignore[no-any-return]

    module.forward = forward
