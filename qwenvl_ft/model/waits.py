"""Rows without a wait for the GPU: what the CPU knows of a row is not asked of the device, which would have to compute all that
it was given first, and then stand idle until it is given more.

transformers reads a row's grids on the device, counts its placeholders and finds them by masks. Here the CPU has a row first.
"""

import sys
from collections.abc import Mapping
from types import MethodType
from typing import Any

import torch
from transformers import vision_utils
from transformers.utils.generic import get_max_seqlen


def sent(of: Any, device: torch.device | None) -> Any:
    """A tensor on the device, if there is one, its way there not waited for; what else a row holds as it is."""
    if device is None or not isinstance(of, torch.Tensor):
        return of
    if device.type != "cuda":  # what is not pinned may be gone before it is there
        return of.to(device)
    return (of.pin_memory() if of.device.type == "cpu" else of).to(device, non_blocking=True)


def all_sent(named: Mapping[str, Any], device: torch.device | None) -> dict[str, Any]:
    """What has names, `sent`; what on the device are bounds of segments know their values on the CPU."""
    there = {name: sent(of, device) for name, of in named.items()}
    for name, of in named.items():
        if name.startswith("cu_") and there[name] is not of:
            there[name].known = of
    return there


def on_cpu(bounds: torch.Tensor) -> torch.Tensor:
    """The values of bounds, which are waited for where they were not `sent`."""
    known: torch.Tensor = getattr(bounds, "known", bounds)
    return known


def tower_places(tower: Any, grids: torch.Tensor) -> dict[str, Any]:
    """What a vision tower makes of (N, 3) grids before it looks at a patch, by the names under which it takes them.

    Source: transformers 5.23, whose towers import from vision_utils what they would call for it.
    """
    imports, config, merge = vars(sys.modules[type(tower).__module__]), tower.config, tower.spatial_merge_size
    places: dict[str, Any] = {}
    if "get_vision_position_ids" in imports:
        places["position_ids"] = vision_utils.get_vision_position_ids(grids, merge)
    if "get_vision_attention_seqlens" in imports:
        places["cu_seqlens"], places["max_seqlen"] = vision_utils.get_vision_attention_seqlens(grids, config)
    if "get_vision_window_index" in imports:
        windows = vision_utils.get_vision_window_index(grids, merge, tower.window_size, tower.patch_size)
        places |= dict(zip(("window_index", "cu_window_seqlens"), windows, strict=True))
        places["max_window_seqlen"] = get_max_seqlen(windows[1], config)
    if "get_vision_interpolation_indices_and_weights" in imports:
        table = vision_utils.get_vision_interpolation_indices_and_weights(
            grids, tower.num_grid_per_side, tower.interpolation_mode, tower.interpolation_align_corners, merge
        )
        places |= dict(zip(("interp_indices", "interp_weights"), table, strict=True))
    return {name: of for name, of in places.items() if of is not None}


def put_unasked(model: Any) -> None:
    """Has a loaded model put features at their placeholders without counting either: the row was built for them, and
    `vision_features` counts them on the CPU."""
    whole, language = model.model, model.model.language_model
    whole.get_placeholder_mask = MethodType(placeholder_masks, whole)
    if hasattr(language, "_deepstack_process"):
        language._deepstack_process = MethodType(added_at, language)


def placeholder_masks(
    model: Any, input_ids: torch.Tensor, inputs_embeds: torch.Tensor, image_features: Any = None, video_features: Any = None
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """(1, S, 1) of pictures' placeholders, and of videos'."""
    return tuple((input_ids == of)[..., None] for of in (model.config.image_token_id, model.config.video_token_id))


def added_at(language: Any, hidden: torch.Tensor, places: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """(1, S, H), to which (T, H) are added at the T places of a mask (1, S)."""
    return hidden + torch.zeros_like(hidden).masked_scatter(places[..., None], features.to(hidden.dtype))
