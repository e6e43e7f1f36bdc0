"""Where a run's adapter begins: fresh, as a checkpoint has it, or with the weights of another adapter."""

import re
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

from qwenvl_ft.config import Config
from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.folders.adapter import OLD_KEYS, PLAIN_STARTS, scale_of, weight_of
from qwenvl_ft.folders.model import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_model_json
from qwenvl_ft.model.pissa import State, as_plain, plain_settings, take_out, take_out_again

TOP = "base_model.model."


def set_initial(model: Any, config: Config, device: torch.device, checkpoint: Path | None, weights: Path | None) -> State:
    """Gives the model's LoRA, which is fresh, the weights that the run begins with: those of the checkpoint that it goes on from,
    or of an adapter. Returns what PiSSA began with, if it is PiSSA. Raises UserError for an adapter that is none of this model's.
    """
    pissa, folder = config.init_lora_weights, checkpoint or weights
    if folder is None:
        return {} if pissa is True else take_out(model, pissa, device)
    state, start = {_new_key(key): tensor for key, tensor in load_file(folder / ADAPTER_WEIGHTS).items()}, State()
    if weights:
        check_fit(model, weights, state, pissa is not True)
    if pissa is not True:
        state, start = take_out_again(model, state, device)
    set_peft_model_state_dict(model, state)
    return start


def check_fit(model: Any, folder: Path, state: State, pissa: bool) -> None:
    """Raises UserError with all that an adapter's tensors and their scales differ in from those that train here; what PiSSA
    left has twice the rank."""
    here, lora = get_peft_model_state_dict(model), model.peft_config["default"]
    if pissa:
        here, lora = as_plain(here, {key: tensor for key, tensor in here.items() if ".lora_" in key}), plain_settings(lora)
    said, problems = read_model_json(folder / ADAPTER_CONFIG), list[Problem]()
    fix = "set lora_on, lora_targets and use_dora to what it was trained with"
    if said.get("init_lora_weights") not in PLAIN_STARTS:
        what = f"was trained with {said['init_lora_weights']}, which changed its base"
        problems.append(Problem(str(folder), what, "convert it to plain LoRA with the tool that trained it"))
    if lacking := here.keys() - state.keys():
        problems.append(
            Problem(str(folder), f"lacks {len(lacking)} of the {len(here)} tensors that train here, {min(lacking)}", fix)
        )
    if more := state.keys() - here.keys():
        problems.append(Problem(str(folder), f"holds {len(more)} tensors that do not train here, {min(more)}", fix))
    both = [key for key in here if key in state]
    if unlike := [key for key in both if here[key].shape != state[key].shape]:
        shapes = " and here ".join(str(list(of[unlike[0]].shape)) for of in (state, here))
        fix = f"set lora_rank, or the tower's own in lora_on; its {ADAPTER_CONFIG} says r {said['r']}"
        problems.append(Problem(str(folder), f"has {len(unlike)} tensors of another rank: {unlike[0]} is {shapes}", fix))
    modules = [
        weight_of(key.removeprefix(TOP).removesuffix(".lora_A.weight"), said) for key in both if key.endswith(".lora_A.weight")
    ]
    scales = {name: (scale_of(said, name), scale_of(lora.to_dict(), name)) for name in modules}
    if not unlike and (other := [name for name, (its, ours) in scales.items() if abs(its - ours) > 1e-6 * its]):
        its, ours = scales[other[0]]
        fix = f"set lora_alpha and use_rslora to its own: its {ADAPTER_CONFIG} says lora_alpha {said['lora_alpha']}"
        problems.append(Problem(str(folder), f"counts {its:g} times, and {ours:g} times here, {other[0]} first", fix))
    if problems:
        raise UserError(*problems)


def _new_key(key: str) -> str:
    """A tensor's key with its module named as transformers 5 does."""
    name = key.removeprefix(TOP)
    for old, new in OLD_KEYS.items():
        name = re.sub(old, new, name)
    return TOP + name
