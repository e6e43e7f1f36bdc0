"""PiSSA: LoRA that begins with the largest singular values of each weight, which are taken out of the base (arXiv 2404.02948).

    W = W_rest + s * B0 @ A0,   trained: W_rest + s * B @ A = W + s * [B, -B0] @ [A; A0]

The right side is what is saved, as PEFT converts it: a plain adapter of twice the rank on the base as it was. It holds the
start, too, so that a run that goes on takes the same out of the base again.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import gather_params_ctx

from qwenvl_ft.console import counting
from qwenvl_ft.errors import Problem, UserError

State = dict[str, torch.Tensor]  # under the keys of PEFT's files
A, B = ".lora_A.weight", ".lora_B.weight"


def take_out(model: Any, kind: str, device: torch.device) -> State:
    """Begins with the singular values, `pissa` all of them or `pissa_niter_N` about, in place of the fresh LoRA that the model has;
    worked out on `device`. Returns the start. Raises UserError for a rank that a layer has not."""
    layers = dict(_layers(model))
    small = {name: min(layer.in_features, layer.out_features) for name, layer in layers.items()}
    if problems := [
        Problem("init_lora_weights: pissa", f"{name} has {small[name]} singular values, and its rank is {layer.r['default']}",
                "lower the rank, or choose other layers with lora_targets")
        for name, layer in layers.items() if layer.r["default"] > small[name]
    ]:  # fmt: skip
        raise UserError(*problems[:1])
    with counting("PiSSA: singular values", patience_s=1) as tell:
        for number, layer in enumerate(layers.values()):
            with _whole(layer, device):
                layer.pissa_init("default", kind)
            tell(number + 1, len(layers))
    return {key: tensor.detach().cpu().clone() for key, tensor in get_peft_model_state_dict(model).items() if key.endswith((A, B))}


def take_out_again(model: Any, saved: State, device: torch.device) -> tuple[State, State]:
    """Takes out of the base what the run that saved this had taken out; returns its adapter as it trained, and its start."""
    trained, start = dict(saved), State()
    for key, tensor in saved.items():
        if key.endswith(A):
            trained[key], start[key] = (part.contiguous() for part in tensor.chunk(2, 0))
        elif key.endswith(B):
            trained[key], start[key] = (part.contiguous() for part in tensor.chunk(2, 1))
            start[key] = -start[key]
    for name, layer in _layers(model):
        with _whole(layer, device) as weight:
            left, right = (start[f"base_model.model.{name}{side}"].to(weight.device) for side in (B, A))
            # As PEFT's pissa_init sums it, to the bit.
            weight.data = (weight.data.float() - layer.scaling["default"] * left @ right).to(weight.dtype)
    return trained, start


def as_plain(state: State, start: State) -> State:
    """The adapter of twice the rank, for the base as it was."""
    plain = dict(state)
    for key, tensor in start.items():
        plain[key] = torch.cat([state[key], tensor], 0) if key.endswith(A) else torch.cat([state[key], -tensor], 1)
    return plain


def plain_settings(lora: LoraConfig) -> LoraConfig:
    """The settings that go with it: twice the rank at the same scale."""
    plain = deepcopy(lora)
    factor = 2**0.5 if lora.use_rslora else 2
    plain.r, plain.lora_alpha = 2 * lora.r, factor * lora.lora_alpha  # type: ignore[assignment]  # PEFT takes a fraction, too
    plain.rank_pattern = {key: 2 * rank for key, rank in (lora.rank_pattern or {}).items()}
    plain.alpha_pattern = {key: factor * alpha for key, alpha in (lora.alpha_pattern or {}).items()}
    return plain


@contextmanager
def _whole(layer: Any, device: torch.device) -> Iterator[torch.nn.Parameter]:
    """A layer's weight on `device`, and back where it was afterwards; where ZeRO-3 shares it out, all of it, where it is."""
    weight = layer.get_base_layer().weight
    with gather_params_ctx(weight):
        if hasattr(weight, "ds_id"):
            yield weight
            return
        home = weight.device
        yield layer.to(device).get_base_layer().weight
        layer.to(home)


def _layers(model: Any) -> Iterator[tuple[str, Any]]:
    for name, layer in model.base_model.model.named_modules():
        if isinstance(layer, LoraLayer):
            yield name, layer
