"""Linear attention within each record of a row: neither its convolution nor its state goes on from one record to the next.

transformers' own keeps them apart only by flash-linear-attention and causal-conv1d; without them it refuses the one and lets the
other pass. Here both are its own functions, with its kernels where they are installed, once for each record; what follows a
prefix that records share goes on from the prefix's state.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torch.nn import functional
from transformers.models.qwen3_5.modeling_qwen3_5 import causal_conv1d_fn, torch_chunk_gated_delta_rule
from transformers.utils.import_utils import is_flash_linear_attention_available

from qwenvl_ft.model.attention import by_length
from qwenvl_ft.model.waits import on_cpu, sent

# Axes: S = tokens in a row, C = channels, H = heads, D = values of a head, N = pieces.


def keep_apart(model: Any) -> None:
    """Has a loaded model's layers with linear attention do so in rows with bounds; in others they run as they are."""
    language = model.model.language_model
    kinds = language.config.to_dict().get("layer_types") or ()  # some families have one kind, and do not name it
    for kind, layer in zip(kinds, language.layers, strict=bool(kinds)):
        if kind == "linear_attention":
            _keep_apart(layer.linear_attn)


def _keep_apart(net: nn.Module) -> None:
    plain = net.forward

    def forward(
        hidden_states: torch.Tensor, cache_params: Any = None, attention_mask: torch.Tensor | None = None,
        cu_seq_lens_q: torch.Tensor | None = None, cu_seq_lens_k: torch.Tensor | None = None, max_length_q: int | None = None,
        max_length_k: int | None = None, key_places: torch.Tensor | None = None, use_cache: bool = False,
        output_attentions: bool | None = None, output_hidden_states: bool | None = None, output_router_logits: bool | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """(1, S, hidden) -> the same. Source: the arguments by which transformers 5.23 calls it in Qwen3.5."""
        if cu_seq_lens_q is None or cu_seq_lens_k is None:
            return plain(hidden_states, cache_params, attention_mask)  # type: ignore[no-any-return]
        return attend(net, hidden_states, pieces_of(cu_seq_lens_q, cu_seq_lens_k))

    net.forward = forward


class Pieces(NamedTuple):
    """Of a row's pieces their lengths, and of each the one that it goes on from, if there is one; `order` are the row's tokens
    as they are computed, those that others go on from first, `back` is the way back, and `followed` are, of the pieces that go on,
    the places of those before them among the others; None where the row's order is theirs."""

    lengths: list[int]
    before: list[int | None]
    order: torch.Tensor | None = None
    back: torch.Tensor | None = None
    followed: torch.Tensor | None = None


@lru_cache(1)  # every layer asks for those of the same row
def pieces_of(bounds: torch.Tensor, bounds_of_keys: torch.Tensor) -> Pieces:
    """By the bounds of a row: a piece that sees more than itself follows the last one that does not."""
    lengths, seen = (on_cpu(of).diff().tolist() for of in (bounds, bounds_of_keys))
    before, first = list[int | None](), 0
    for number, (length, sees) in enumerate(zip(lengths, seen, strict=True)):
        first = number if sees == length else first
        before.append(None if sees == length else first)
    if before == [None] * len(before):
        return Pieces(lengths, before)
    parts, turns = torch.arange(sum(lengths)).split_with_sizes(lengths), _by_turn(before)
    order = torch.cat([parts[at] for at in turns])
    followed = torch.tensor([turns.index(at) for at in before if at is not None])
    return Pieces(lengths, before, *(sent(of, bounds.device) for of in (order, order.argsort(), followed)))


@lru_cache(8)
def _bounds(lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return cast(torch.Tensor, sent(torch.tensor([0, *lengths]).cumsum(0), device))


def _by_turn(before: Sequence[int | None]) -> list[int]:
    """The numbers of the pieces, those that follow none first."""
    return sorted(range(len(before)), key=lambda number: before[number] is not None)


def attend(net: Any, hidden: torch.Tensor, pieces: Pieces) -> torch.Tensor:
    """What Qwen3.5's gated delta net makes of each piece of (1, S, hidden), its linear layers run once for all of them, and in the
    order in which transformers runs them for a row of one record: processes that share them out by ZeRO-3 wait for each other."""
    mixed, gate = net.in_proj_qkv(hidden), net.in_proj_z(hidden).reshape(-1, net.head_v_dim)
    rate, step = net.in_proj_b(hidden).sigmoid(), net.in_proj_a(hidden)
    mixed = convolved(net, mixed, pieces)
    sizes, widths = (net.key_dim, net.key_dim, net.value_dim), (net.head_k_dim, net.head_k_dim, net.head_v_dim)
    query, key, value = (
        of.reshape(*of.shape[:2], -1, width) for of, width in zip(mixed.split_with_sizes(sizes, -1), widths, strict=True)
    )
    decay = -net.A_log.float().exp() * functional.softplus(step.float() + net.dt_bias)
    attended = recalled((query, key, value, decay, rate), pieces).reshape(-1, net.head_v_dim)
    return net.out_proj(net.norm(attended, gate).reshape(*hidden.shape[:2], -1))  # type: ignore[no-any-return]


def convolved(net: Any, mixed: torch.Tensor, pieces: Pieces) -> torch.Tensor:
    """(1, S, C) by the causal convolution of each piece: before its first token stand zeros, or the end of what it follows."""
    short = net.conv_kernel_size - 1
    parts = functional.pad(mixed, (0, 0, short, 0)).split_with_sizes([short, *pieces.lengths], 1)
    zeros, parts = parts[0], parts[1:]
    ends = [zeros if at is None else torch.cat([zeros, parts[at]], 1)[:, -short:] for at in pieces.before]
    row = torch.cat([of for pair in zip(ends, parts, strict=True) for of in pair], 1).transpose(1, 2)
    row = causal_conv1d_fn(row, net.conv1d.weight.squeeze(1), net.conv1d.bias, activation=net.activation).transpose(1, 2)
    return torch.cat([part[:, short:] for part in row.split_with_sizes([short + length for length in pieces.lengths], 1)], 1)


def recalled(states: Sequence[torch.Tensor], pieces: Pieces) -> torch.Tensor:
    """(1, S, H, D): the gated delta rule over each piece, of queries, keys, values, decays and learning rates (1, S, H, ...)."""
    if pieces.order is None or pieces.back is None or pieces.followed is None:
        return _by_rule(states, pieces.lengths)[0]
    turns, num_firsts = _by_turn(pieces.before), pieces.before.count(None)
    firsts, rests = ([pieces.lengths[at] for at in some] for some in (turns[:num_firsts], turns[num_firsts:]))
    parts = [of.index_select(1, pieces.order).split_with_sizes([sum(firsts), sum(rests)], 1) for of in states]
    prefixes, ends = _by_rule([first for first, _ in parts], firsts, leaves_ends=True)
    following, _ = _by_rule([rest for _, rest in parts], rests, ends.index_select(0, pieces.followed))
    return torch.cat([prefixes, following], 1).index_select(1, pieces.back)


def _by_rule(
    states: Sequence[torch.Tensor], lengths: list[int], start: torch.Tensor | None = None, leaves_ends: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pieces one behind the other: (1, S, H, D), and if it leaves them their last states (N, H, D, D); from those at the `start`,
    else from zeros."""

    def rule(of: Sequence[torch.Tensor], start: torch.Tensor | None, bounds: torch.Tensor | None = None) -> Any:
        query, key, value, decay, rate = of
        return torch_chunk_gated_delta_rule(
            query, key, value, g=decay, beta=rate, initial_state=start, output_final_state=leaves_ends,
            use_qk_l2norm_in_kernel=True, cu_seqlens=bounds,
        )  # fmt: skip

    if is_flash_linear_attention_available():  # all of them in one call, as fla 0.6 documents it
        return rule(states, start, _bounds(tuple(lengths), states[0].device))  # type: ignore[no-any-return]
    parts = list(zip(*(of.split_with_sizes(lengths, 1) for of in states), strict=True))
    found: list[tuple[torch.Tensor, torch.Tensor]] = [(states[0], states[0])] * len(parts)
    for places in by_length([(length, length) for length in lengths]):
        together = [torch.cat(of) for of in zip(*(parts[place] for place in places), strict=True)]
        outs, ends = rule(together, None if start is None else torch.stack([start[place] for place in places]))
        for place, out, end in zip(places, outs.split_with_sizes([1] * len(places)), ends if leaves_ends else places, strict=True):
            found[place] = out, end
    return torch.cat([out for out, _ in found], 1), torch.stack([end for _, end in found]) if leaves_ends else states[0]
