"""Proves a merged folder: every merged weight against PEFT's own sum, and its logits against those of base + adapter."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.folders.adapter import Place, module_of, read_header
from qwenvl_ft.folders.model import weight_files
from qwenvl_ft.infer.engine import Engine
from qwenvl_ft.values import Quantization

HALF_ULP = {"F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}  # of a number: what storing it may change
REPORT = "nothing was written; report this with the adapter's adapter_config.json"
LIMIT = {"F32": 1e-3, "F16": 0.02, "BF16": 0.1}  # of the largest logit: what rounding every weight can explain


def prove(
    merged: Path, base: Path, adapter: Path, records: Sequence[tuple[str, Any]], quantization: Quantization = "none",
    dtype: str = "auto",
) -> list[dict[str, Any]]:  # fmt: skip
    """For each conversation `where`, `difference` (largest of a logit) and `largest` (logit) between merged and base + adapter; the
    base quantized as in training, in the `dtype` that it had there, and then `unrounded`, too, the difference of base + adapter
    without that.

    Raises UserError if a weight or a logit differs by more than rounding to the stored dtype can explain.
    """

    def logits(engine: Engine) -> list[Any]:
        return [engine.model(**engine.inputs([talk])).logits.detach().float().cpu() for _, talk in records]

    unrounded = logits(Engine.open(base, adapter, dtype=dtype)) if quantization != "none" else None
    adapted = Engine.open(base, adapter, quantization=quantization, dtype=dtype)
    stored = prove_weights(merged, base, adapted.model)
    limit = max(LIMIT[stored], LIMIT["BF16"] if dtype == "bfloat16" else 0.0)
    wanted = logits(adapted)
    del adapted  # one model in memory at a time
    proofs, problems = [], []
    for number, ((where, _), left, right) in enumerate(zip(records, wanted, logits(Engine.open(merged, dtype=dtype)), strict=True)):
        if left.shape != right.shape:
            what = f"reads {right.shape[1]} tokens where base and adapter read {left.shape[1]}"
            problems.append(Problem(f"the merged model on {where}", what, REPORT))
            continue
        difference, largest = (left - right).abs().max().item(), left.abs().max().item()
        proofs.append({"where": where, "difference": difference, "largest": largest})
        if unrounded:
            proofs[-1]["unrounded"] = (left - unrounded[number]).abs().max().item()
        if not difference <= limit * largest:
            what = f"differs from base and adapter by {difference:.3g} (largest logit {largest:.3g})"
            problems.append(Problem(f"the merged model on {where}", what, REPORT))
    if problems:
        raise UserError(*problems)
    return proofs


def prove_weights(merged: Path, base: Path, adapted: Any) -> str:
    """Compares every merged weight with the base's and PEFT's own change; returns the dtype of most of the model's bytes.

    Raises UserError where they differ by more than rounding.
    """
    import torch
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper
    from peft.utils import ModulesToSaveWrapper
    from safetensors import safe_open

    from qwenvl_ft.model.quantized import QuantizedLinear

    named: dict[str, Any] = {name.removeprefix("base_model.model."): layer for name, layer in adapted.named_modules()}
    layers: dict[str, Any] = {
        # Of experts PEFT says which parameter a wrapper is for, whatever it is called.
        f"{name.removesuffix('.base_layer')}.{layer.parameter_name}" if isinstance(layer, ParamWrapper) else name: layer
        for name, layer in named.items()
        if isinstance(layer, LoraLayer) or (isinstance(layer, QuantizedLinear) and not name.endswith(".base_layer"))
    }  # fmt: skip

    @lru_cache(2)  # experts may be stored one by one
    def delta_of(name: str) -> Any:
        return layers[name].get_delta_weight(adapted.active_adapter).float().cpu()

    left = {*layers}
    whole = {
        module_of(f"{name}.{key}"): tensor.cpu()
        for name, module in named.items() if isinstance(module, ModulesToSaveWrapper)
        for key, tensor in module.modules_to_save[adapted.active_adapter].state_dict().items()
    }  # fmt: skip
    number, wrong, sizes = len(layers) + len(whole), {}, dict.fromkeys(HALF_ULP, 0)
    for path in weight_files(merged):
        for tensor in read_header(path)[1]:
            if tensor.dtype in sizes:
                sizes[tensor.dtype] += tensor.num_bytes
            if (copied := whole.pop(module_of(tensor.key), None)) is not None:
                with safe_open(path, "pt") as after:
                    stored = after.get_tensor(tensor.key)
                coarser = min(stored.dtype, copied.dtype, key=lambda dtype: dtype.itemsize)
                if not stored.to(coarser).equal(copied.to(coarser)):
                    wrong[tensor.key] = (stored.float() - copied.float()).abs().max().item()
            place = Place.of(module_of(tensor.key))
            if not (layer := layers.get(place.weight)):
                continue
            left.discard(place.weight)
            with safe_open(path, "pt") as after, safe_open(base / path.name, "pt") as before:
                found, start = (file.get_tensor(tensor.key).float() for file in (after, before))
            lora = isinstance(layer, LoraLayer)
            if isinstance(held := layer.get_base_layer() if lora else layer, QuantizedLinear):
                start = held.dequantized(torch.float32).cpu()
            delta = place.part(delta_of(place.weight)) if lora else torch.zeros_like(start)
            delta = delta[0] if place.expert is not None else delta if delta.shape == start.shape else delta.mT
            wanted, more = start + delta, 0.0
            if lora and (dora := layer.lora_magnitude_vector):
                norms, more = dora[adapted.active_adapter].get_weight_norm(start, delta, scaling=1), 2e-6
                wanted = (dora[adapted.active_adapter].weight.float().cpu() / norms)[:, None] * wanted
            # Beside rounding, sums of products, and of squares, come in another order.
            bound = (1.01 * HALF_ULP[tensor.dtype] + more) * wanted.abs() + 1e-5 * delta.abs().max() + 1e-7
            if isinstance(layer, ParamWrapper):  # whose change comes in the dtype of its parameter
                bound += torch.finfo(layer.get_param().dtype).eps / 2 * delta.abs()  # type: ignore[no-untyped-call]
            if not ((found - wanted).abs() <= bound).all():
                wrong[tensor.key] = (found - wanted).abs().max().item()
    left |= whole.keys()  # those that no file has
    if wrong or left:
        worst = max(wrong, key=lambda key: wrong[key], default="")
        what = f"{len(wrong) + len(left)} of {number} weights are not PEFT's sum of base and adapter"
        what += f", {worst} by up to {wrong[worst]:.3g}" if worst else f", {min(left)} is missing"
        raise UserError(Problem("the merged model", what, REPORT))
    return max(sizes, key=lambda dtype: sizes[dtype])
