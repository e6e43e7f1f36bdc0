"""A model that answers, on the GPU; one that is larger than that, its layers over all GPUs that are here.

It has not been run on several GPUs yet.
"""

from typing import Any

import torch
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.utils import get_balanced_memory

from qwenvl_ft.console import print_note
from qwenvl_ft.errors import Problem, UserError

ROOM = 0.85  # of what is free on a GPU, for weights; keys, values and activations have the rest


def onto(model: Any, device: torch.device) -> Any:
    """The model on `device`, or, where that has no room for it and there are other GPUs, whole layers on each, in order, by
    accelerate's hooks. Raises UserError where all are too small together.
    """
    cards = range(torch.cuda.device_count() if device.type == "cuda" else 0)
    num_bytes = sum(weight.nbytes for weight in model.parameters())
    room: dict[int | str, int] = {card: int(ROOM * torch.cuda.mem_get_info(card)[0]) for card in cards}
    if len(cards) < 2 or num_bytes <= room[0]:
        return model.to(device)
    whole = list(model._no_split_modules)
    evenly = get_balanced_memory(model, max_memory=room, no_split_module_classes=whole)
    places = infer_auto_device_map(model, max_memory=evenly, no_split_module_classes=whole)
    gib = num_bytes / 2**30
    if not set(places.values()) <= set(cards):
        what = f"{gib:.1f} GiB of weights do not fit the {len(cards)} GPUs here, {ROOM:.0%} of whose free memory they may take"
        raise UserError(Problem(f"model: {model.config._name_or_path}", what, "free their memory, or take a machine with more"))
    print_note(f"the model's {gib:.1f} GiB lie on {len(set(places.values()))} GPUs")
    return dispatch_model(model, places)


def is_spread(model: Any) -> bool:
    """Whether it lies on several devices, and must not be moved."""
    return len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1
