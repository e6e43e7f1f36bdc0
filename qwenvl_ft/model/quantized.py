"""Linear layers whose frozen weights bitsandbytes holds in 4 or 8 bits, multiplied as the numbers that these stand for.

    y = x W' + b,   W = dequantized(Q(W16)) in the dtype of x, written out for the product, forward and back, and let go

bitsandbytes' own layers multiply otherwise: Linear8bitLt rounds x to 8 bits, too, on a GPU always and on a CPU unless it trains,
and keeps x where neither recomputing nor the count of what is kept (train/activations.py) knows of it. Here the base that trains
is what its weights say and nothing else, so that it can be written down in 16 bits: a merge does (`rounded`).
"""

from copy import copy
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import BitsAndBytesConfig

from qwenvl_ft.data.families import Family
from qwenvl_ft.folders.adapter import Floats
from qwenvl_ft.values import Quantization


def settings_of(quantization: Quantization, family: Family) -> BitsAndBytesConfig:
    """What `from_pretrained` takes: QLoRA's nf4, with scales that are quantized, too, or int8; for the layers of `is_quantized`."""
    others = [rf"(?!(?:{family.language})$).*"]  # the names that this matches stay
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=others)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, llm_int8_skip_modules=others
    )


class QuantizedLinear(nn.Linear):
    """What a layer of bitsandbytes becomes; its weights are the same tensors."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., I) -> (..., O)."""
        return _Product.apply(x, self)  # type: ignore[no-any-return]

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight (O, I) that its bits stand for."""
        from bitsandbytes import functional as bits

        weight: Any = self.weight
        if weight.dtype == torch.int8:
            return from_int8(weight.data, weight.SCB, dtype)
        state = copy(weight.quant_state)
        state.dtype = dtype
        found: torch.Tensor = bits.dequantize_4bit(weight.data, state)
        return found


def from_int8(stored: torch.Tensor, most: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(O, I) in 8 bits, of which 127 stands for the largest number of its row, `most` (O,): as bitsandbytes counts it, on a CPU."""
    return stored.to(dtype).mul_((most * (1 / 127))[:, None])


def rounded(weight: Floats, quantization: Quantization, dtype: torch.dtype) -> Floats:
    """The numbers that a layer's weight (O, I) stands for once it is read in `dtype` and quantized; on a GPU where there is one."""
    from bitsandbytes import functional as bits

    here = torch.from_numpy(weight).to("cuda" if torch.cuda.is_available() else "cpu", dtype)
    if quantization == "int8":
        stored, most, _ = bits.int8_vectorwise_quant(here.half())
        found = from_int8(stored, most, torch.float32)
    else:
        packed, state = bits.quantize_4bit(here, compress_statistics=True, quant_type="nf4")
        state.dtype = torch.float32
        found = bits.dequantize_4bit(packed, state)
    numbers: Floats = found.cpu().numpy()
    return numbers


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: QuantizedLinear) -> torch.Tensor:
        ctx.layer = layer
        return functional.linear(x, layer.dequantized(x.dtype), layer.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None]:
        return dy @ ctx.layer.dequantized(dy.dtype), None


def written_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """What the largest of these weights takes while it is written out."""
    sizes = [of.in_features * of.out_features for of in model.modules() if isinstance(of, QuantizedLinear)]
    return max([0, *sizes]) * dtype.itemsize


def multiply_dequantized(model: nn.Module) -> None:
    """Has the layers of a model that bitsandbytes has quantized run so, in place; PEFT takes them for linear layers."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    for layer in model.modules():
        if isinstance(layer, Linear4bit | Linear8bitLt):
            layer.__class__ = QuantizedLinear
