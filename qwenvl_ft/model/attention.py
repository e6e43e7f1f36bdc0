"""Attention within each record of a row, and within each picture: what lies between them is not computed, and no mask is built.

transformers' own takes a packed row with an S x S mask and pays for all of it; its vision towers call it once a picture or window.
The same numbers come out here, by a kernel for segments on a GPU, elsewhere by one call for all segments of a length.
"""

from collections.abc import Sequence
from inspect import signature
from typing import Any, cast

import torch
from torch import nn
from torch.nn.attention import varlen
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from qwenvl_ft.errors import Problem, UserError

VARLEN = "flash_varlen"  # for a name that holds "flash" transformers builds no mask and passes the segments' bounds
HALF = (torch.float16, torch.bfloat16)


def use_varlen(model: Any) -> None:
    """Has a loaded model attend by segments, its vision tower, too. For training: there is no cache of keys here."""
    AttentionInterface.register(VARLEN, attention)
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = VARLEN


def attention_of(model: Any) -> str:
    """By what a model attends, as the config calls it."""
    name: str = model.config._attn_implementation
    return "varlen" if name == VARLEN else name


def attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: None, dropout: float = 0.0,
    scaling: float | None = None, is_causal: bool | None = None, cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None, sliding_window: int | None = None, cu_seq_lens_k: torch.Tensor | None = None,
    max_length_k: int | None = None, position_ids: torch.Tensor | None = None, use_cache: bool = False,
    output_attentions: bool | None = None, output_hidden_states: bool | None = None,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """(1, S, H, D) of queries (1, H, S, D) and of keys and values, which may have fewer heads. Without bounds all is one segment;
    where it is causal no token sees a later one.

    Source: the arguments by which transformers 5.23 calls its interface for Qwen-VL. Raises UserError for a sliding window, which
    no released model of the family has.
    """
    if sliding_window is not None:
        fix = "set attn_implementation: sdpa"
        raise UserError(Problem("attn_implementation: varlen", f"the model attends within {sliding_window} tokens only", fix))
    causal = bool(module.is_causal if is_causal is None else is_causal)

    def dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return sdpa_attention_forward(module, query, key, value, None, dropout, scaling, causal)[0]

    states = (query, key, value)
    if cu_seq_lens_q is None or len(cu_seq_lens_q) == 2:
        return dense(*states), None
    if query.is_cuda and query.dtype in HALF:
        return by_kernel(*states, cu_seq_lens_q, int(max_length_q or cu_seq_lens_q.diff().max()), scaling, causal), None
    lengths: list[int] = cu_seq_lens_q.diff().tolist()
    segments = list(zip(*(of.split_with_sizes(lengths, dim=2) for of in states), strict=True))
    attended: list[torch.Tensor] = [query] * len(segments)
    for places in _by_length(lengths):
        together = dense(*map(torch.cat, zip(*(segments[place] for place in places), strict=True)))
        for place, one in zip(places, together.unbind(), strict=True):
            attended[place] = one
    return torch.cat(attended)[None], None


def by_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    longest: int,
    scaling: float | None,
    causal: bool,
) -> torch.Tensor:
    """`attention` by torch's kernel for segments, the longest of which has so many tokens. For CUDA and half precision."""
    more: dict[str, Any] = (
        {"enable_gqa": True} if "enable_gqa" in signature(varlen.varlen_attn).parameters else {}
    )  # torch 2.11 does not ask
    query, key, value = (of[0].transpose(0, 1) for of in (query, key, value))
    seen = (-1, 0 if causal else -1)
    found = varlen.varlen_attn(query, key, value, bounds, bounds, longest, longest, scale=scaling, window_size=seen, **more)
    return cast(torch.Tensor, found)[None]


def _by_length(lengths: Sequence[int]) -> list[list[int]]:
    """The places of the segments, those of one length together."""
    places: dict[int, list[int]] = {}
    for place, length in enumerate(lengths):
        places.setdefault(length, []).append(place)
    return list(places.values())
