"""Attention within each record of a row, and within each picture: what lies between them is not computed, and no mask is built.

transformers' own takes a packed row with an S x S mask and pays for all of it; its vision towers call it once a picture or window.
The same numbers come out here, by a kernel for segments on a GPU, elsewhere by a call for each, or for all short ones of a length.
What follows a prefix that records share has more keys than queries: the prefix's are gathered for each of them.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import Any, cast

import torch
from torch import nn
from torch.nn.attention import varlen
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.model.waits import on_cpu

VARLEN = "flash_varlen"  # for a name that holds "flash" transformers builds no mask and passes the segments' bounds
HALF = (torch.float16, torch.bfloat16)
TOGETHER = 32  # queries below which segments of a length attend in one call: there a call takes longer than to copy them together


def use_varlen(model: Any) -> None:
    """Has a loaded model attend by segments, its vision tower, too. For training: there is no cache of keys here."""
    AttentionInterface.register(VARLEN, attention)
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = VARLEN


@contextmanager
def attending_with_cache(model: Any) -> Iterator[None]:
    """Within it a model that attends by segments attends by sdpa, which knows a cache of keys and the padding of a batch."""
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}.values()
    varlen_ones = [config for config in configs if config._attn_implementation == VARLEN]
    try:
        for config in varlen_ones:
            config._attn_implementation = "sdpa"
        yield
    finally:
        for config in varlen_ones:
            config._attn_implementation = VARLEN


def attention_of(model: Any) -> str:
    """By what a model attends, as the config calls it."""
    name: str = model.config._attn_implementation
    return "varlen" if name == VARLEN else name


def attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: None, dropout: float = 0.0,
    scaling: float | None = None, is_causal: bool | None = None, cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None, sliding_window: int | None = None, cu_seq_lens_k: torch.Tensor | None = None,
    max_length_k: int | None = None, position_ids: torch.Tensor | None = None, use_cache: bool = False,
    output_attentions: bool | None = None, output_hidden_states: bool | None = None, output_router_logits: bool | None = None,
    key_places: torch.Tensor | None = None,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """(1, S, H, D) of queries (1, H, S, D) and of keys and values, which may have fewer heads. Without bounds all is one segment;
    where it is causal no token sees a later one. With `key_places` (K), segments see the keys that lie there, cut by their
    own bounds, the last of which are the segment's tokens.

    Source: the arguments by which transformers 5.23 calls its interface for Qwen-VL. Raises UserError for a sliding window, which
    no released model of the family has.
    """
    if sliding_window is not None:
        fix = "set attn_implementation: sdpa"
        raise UserError(Problem("attn_implementation: varlen", f"the model attends within {sliding_window} tokens only", fix))
    causal = bool(module.is_causal if is_causal is None else is_causal)

    def dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        before = key.shape[2] - query.shape[2]
        mask = query.new_ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(before) if causal and before else None
        return sdpa_attention_forward(module, query, key, value, mask, dropout, scaling, causal)[0]

    states = (query, key, value)
    if cu_seq_lens_q is None or len(cu_seq_lens_q) == 2:
        return dense(*states), None
    if key_places is None or cu_seq_lens_k is None:
        cu_seq_lens_k, max_length_k = cu_seq_lens_q, max_length_q  # the same tensor: torch looks at that for its choice of a kernel
    else:
        states = (query, Gathered.apply(key, key_places), Gathered.apply(value, key_places))
    if query.device.type in ("cuda", "meta") and query.dtype in HALF:  # of meta are shapes alone, such as a forecast has
        bounds = (cu_seq_lens_q, cu_seq_lens_k)
        most = (int(max_length_q or cu_seq_lens_q.diff().max()), int(max_length_k or cu_seq_lens_k.diff().max()))
        return by_kernel(*states, bounds, most, scaling, causal), None
    queries, keys = (on_cpu(of).diff().tolist() for of in (cu_seq_lens_q, cu_seq_lens_k))
    parted = (of.split_with_sizes(sizes, dim=2) for of, sizes in zip(states, (queries, keys, keys), strict=True))
    segments = list(zip(*parted, strict=True))
    attended: list[torch.Tensor] = [query] * len(segments)
    for places in by_length(list(zip(queries, keys, strict=True))):
        parts = [segments[place] for place in places]
        together = dense(*(parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts, strict=True))))
        for place, one in zip(places, together.unbind(), strict=True):
            attended[place] = one
    return torch.cat(attended)[None], None


class Gathered(torch.autograd.Function):
    """(1, H, S, D) and (K) places -> (1, H, K, D). Gradients of what is seen often are summed in float32: in 16 bits what many
    records add to their prefix would be rounded off."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(places)
        ctx.shape = states.shape
        return states.index_select(2, places)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (places,) = ctx.saved_tensors
        exact = torch.promote_types(gradient.dtype, torch.float32)
        summed = gradient.new_zeros(ctx.shape, dtype=exact).index_add_(2, places, gradient.to(exact))
        return summed.to(gradient.dtype), None


def by_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: tuple[torch.Tensor, torch.Tensor],
    longest: tuple[int, int],
    scaling: float | None,
    causal: bool,
) -> torch.Tensor:
    """`attention` by torch's kernel for segments: their bounds among the queries and the keys, and how many of either the longest
    has. For CUDA and half precision."""
    # torch 2.11 does not ask
    more: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in signature(varlen.varlen_attn).parameters else {}
    query, key, value = (of[0].transpose(0, 1) for of in (query, key, value))
    seen = (-1, 0 if causal else -1)  # from the last key backwards, where there are more keys than queries
    found = varlen.varlen_attn(query, key, value, *bounds, *longest, scale=scaling, window_size=seen, **more)
    return cast(torch.Tensor, found)[None]


def by_length(lengths: Sequence[tuple[int, int]]) -> list[list[int]]:
    """The places of the segments, those of one number of queries and of keys together where they are short."""
    places: dict[tuple[int, ...], list[int]] = {}
    for place, length in enumerate(lengths):
        places.setdefault(length if length[0] < TOGETHER else (place,), []).append(place)
    return list(places.values())
