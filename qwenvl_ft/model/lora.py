"""A linear layer with LoRA as one function of autograd: y = x W' + b + s (x A') B', in the dtype of the frozen weights.

PEFT runs it as six: the adapter's product is written, scaled, written again, added, and each on the way back, too. And in what
dtype PEFT's adapters multiply hangs on autocast, which DeepSpeed's engine switches off; here it does not, though the adapter's
own weights and their gradients are float32.

In an MLP the last of the three is one function with the gate: silu(gate) * up, as wide as either, is made again on the way back and
not kept, nor is silu(gate). It takes no matmul, and a layer keeps two tensors of that width in place of four.

    >>> fuse_lora(model)  # what PEFT made; names, saving and merging stay PEFT's
"""

from types import MethodType
from typing import Any, cast

import torch
from peft.tuners.lora import Linear
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers.activations import SiLUActivation

from qwenvl_ft.model.quantized import QuantizedLinear

# Axes: T = tokens, I and O = the layer's inputs and outputs, R = the rank. What is thin lies (R, T): a CPU's matmuls with few
# columns are up to twelve times slower than those with few rows.


class FusedLora(Linear):
    """PEFT's layer; what is not plain LoRA on a plain linear layer runs as PEFT has it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., I) -> (..., O)."""
        base, name = self.base_layer, self.active_adapters[0]
        if not self.is_plain(name):
            # Here, since an engine around the model may have switched it off. Of meta are a forecast's shapes, which know none.
            if x.is_meta:
                return super().forward(x.float()).to(x.dtype)
            with torch.autocast(x.device.type, torch.bfloat16, enabled=x.dtype == torch.bfloat16):
                return super().forward(x)
        a, b, dropped = self.lora_A[name].weight, self.lora_B[name].weight, self.lora_dropout[name](x)
        return _LoraLinear.apply(x, None if dropped is x else dropped, base, a, b, self.scaling[name])  # type: ignore[no-any-return]

    def gated(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """What it makes of silu(gate) * up: (..., I) twice -> (..., O)."""
        name = self.active_adapters[0]
        if not self.is_plain(name) or not isinstance(self.lora_dropout[name], nn.Identity):
            return cast(torch.Tensor, self(functional.silu(gate) * up))
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        return _GatedLora.apply(gate, up, self.base_layer, a, b, self.scaling[name])  # type: ignore[no-any-return]

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
        """`dropped` is what the adapter sees, x itself where it is None."""
        seen = (x if dropped is None else dropped).flatten(0, -2)
        y, low_RT = _product(x, seen, base, a, b, scaling)
        ctx.save_for_backward(seen, low_RT, _kept_weight(base), a, b)
        ctx.base, ctx.scaling, ctx.drops = base, scaling, dropped is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        seen, low_RT, weight, a, b = ctx.saved_tensors
        d_low_RT, d_a, d_b = _adapters_gradients(dy, seen, low_RT, a, b, ctx.scaling)
        d_x = d_dropped = None
        if ctx.needs_input_grad[0]:
            d_x = dy @ _weight(ctx.base, weight, dy.dtype)
            if not ctx.drops:
                d_x.view(-1, d_x.shape[-1]).addmm_(d_low_RT.T, a.to(dy.dtype), alpha=ctx.scaling)
        if ctx.needs_input_grad[1]:
            d_dropped = (d_low_RT.T @ a.to(dy.dtype)).mul_(ctx.scaling).view(*dy.shape[:-1], -1)
        return d_x, d_dropped, None, d_a, d_b, None


class _GatedLora(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gate: torch.Tensor, up: torch.Tensor, base: nn.Linear, a: torch.Tensor, b: torch.Tensor, scaling: float
    ) -> torch.Tensor:  # fmt: skip
        x = functional.silu(gate).mul_(up)
        y, low_RT = _product(x, x.flatten(0, -2), base, a, b, scaling)
        ctx.save_for_backward(gate, up, low_RT, _kept_weight(base), a, b)
        ctx.base, ctx.scaling = base, scaling
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """In the order of torch's own, to the same bits."""
        gate, up, low_RT, weight, a, b = ctx.saved_tensors
        opened = functional.silu(gate)
        d_low_RT, d_a, d_b = _adapters_gradients(dy, (opened * up).flatten(0, -2), low_RT, a, b, ctx.scaling)
        d_gate = d_up = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            d_x = dy @ _weight(ctx.base, weight, dy.dtype)
            d_x.view(-1, d_x.shape[-1]).addmm_(d_low_RT.T, a.to(dy.dtype), alpha=ctx.scaling)
            d_up = opened.mul_(d_x)
            d_gate = torch.ops.aten.silu_backward(d_x.mul_(up), gate)
        return d_gate, d_up, None, d_a, d_b, None


def _product(
    x: torch.Tensor, seen: torch.Tensor, base: nn.Linear, a: torch.Tensor, b: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """y and A x', of which `seen` (T, I) is what the adapter sees. Products are summed in float32 by the matmul; in 16 bits rounded
    are x A', y once without the adapter and once with it. A weight that is quantized is written out here, and again on the way
    back, for these products alone."""
    low_RT = a.to(x.dtype) @ seen.T
    y = functional.linear(x, _weight(base, _kept_weight(base), x.dtype), base.bias)
    y.view(-1, y.shape[-1]).addmm_(low_RT.T, b.to(x.dtype).T, alpha=scaling)
    return y, low_RT


def _kept_weight(base: nn.Linear) -> torch.Tensor | None:
    return None if isinstance(base, QuantizedLinear) else base.weight


def _weight(base: nn.Linear, kept: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    return base.dequantized(dtype) if isinstance(base, QuantizedLinear) else cast(torch.Tensor, kept)


def _adapters_gradients(
    dy: torch.Tensor, seen: torch.Tensor, low_RT: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """That of A x' without the scaling, those of A and B. The last two leave their matmul in its dtype, as those of autocast do,
    and are summed up over rows in float32."""
    dy_TO = dy.flatten(0, -2)
    d_low_RT = b.to(dy.dtype).T @ dy_TO.T
    return d_low_RT, (d_low_RT @ seen).to(a.dtype).mul_(scaling), (low_RT @ dy_TO).T.to(b.dtype).mul_(scaling)


def fuse_lora(model: Any) -> None:
    """Has the LoRA linears of a model run so, in place, and its gated MLPs."""
    for layer in model.modules():
        if type(layer) is Linear:
            layer.__class__ = FusedLora
            layer.cast_input_dtype_enabled = bool(layer.lora_variant)  # its own products are in the dtype of the frozen weights
    for layer in model.modules():
        if is_gated(layer):
            layer.forward = MethodType(gated_forward, layer)


def is_gated(layer: nn.Module) -> bool:
    """Whether a module is an MLP that runs as `gated_forward` says: its forward names nothing else. The last of it has LoRA."""
    names = {"gate_proj", "up_proj", "act_fn", "down_proj"}
    code = getattr(type(layer).forward, "__code__", None)
    if code is None or {*code.co_names} != names or {name for name, _ in layer.named_children()} != names:
        return False
    return isinstance(layer.down_proj, FusedLora) and isinstance(layer.act_fn, nn.SiLU | SiLUActivation)


def gated_forward(mlp: Any, x: torch.Tensor) -> torch.Tensor:
    """(..., H) -> (..., H): down(silu(gate(x)) * up(x))."""
    if not isinstance(mlp.down_proj, FusedLora):  # its LoRA was merged and is gone
        return cast(torch.Tensor, type(mlp).forward(mlp, x))
    return mlp.down_proj.gated(mlp.gate_proj(x), mlp.up_proj(x))


def multiply_in_dtype_of_input(module: nn.Module) -> None:
    """Has a module whose weights are float32, so that small steps count, multiply in bfloat16 what comes in it."""
    plain = module.forward

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        if hidden.is_meta:
            return plain(hidden.float()).to(hidden.dtype)  # type: ignore[no-any-return]
        with torch.autocast(hidden.device.type, torch.bfloat16, enabled=hidden.dtype == torch.bfloat16):
            return plain(hidden)  # type: ignore[no-any-return]

    module.forward = forward
