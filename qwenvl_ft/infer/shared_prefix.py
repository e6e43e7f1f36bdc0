"""Questions of a batch that begin alike, with the same system prompt and media: that is read once, and the rest of each behind a
copy of it.

A batch holds as many keys and values as it would otherwise, those of all its questions; what is not done again is to compute them,
with the vision tower's work.

Axes: B = questions, G = prefixes, S = tokens, W = tokens of the widest.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from qwenvl_ft.data.chat import Chat, Script
from qwenvl_ft.data.packing import LEAST_SHARED
from qwenvl_ft.data.rows import as_floats, pixels, positions_of

Text = dict[str, torch.Tensor]


@dataclass
class Prefix:
    """The scripts at `places` begin with the same `tokens` tokens, in which lies all that they show."""

    places: list[int]
    tokens: int


def prefixes(scripts: Sequence[Script]) -> list[Prefix]:
    """What the scripts of a batch begin with. One that shares nothing has a prefix of its own: all its tokens but the last.

    A script joins those with whom it shares most, if that is media or no little text, and not less than half of what they share.
    """
    found: list[Prefix] = []
    for place, script in enumerate(scripts):
        shared, best = 0, Prefix([], 0)
        for of in found:
            with_these = script.shared_with(scripts[of.places[0]])
            if with_these > shared and (len(of.places) == 1 or 2 * with_these >= of.tokens):
                shared, best = with_these, of
        if shared >= (1 if script.media else LEAST_SHARED):
            best.places.append(place)
            best.tokens = min(best.tokens, shared)
        else:
            found.append(Prefix([place], script.length - 1))
    return found


def read_prefixes(model: Any, processor: Any, chat: Chat, scripts: Sequence[Script], found: Sequence[Prefix]) -> dict[str, Any]:
    """The inputs of `generate` for all scripts, with the keys and values of what they begin with: (B, W) ids and mask, (4, B, W)
    positions. A row is its prefix and its rest, each padded on the left; no token sees the padding.
    """
    texts, pad, device = [_text(script, chat) for script in scripts], processor.tokenizer.pad_token_id, model.device
    begun = _aligned([_part(texts[of.places[0]], slice(of.tokens)) for of in found], pad, device)
    shown = as_floats(pixels([medium for of in found for medium in scripts[of.places[0]].media], chat, processor))
    media = {name: of.to(device) for name, of in shown.items()}
    cache = model(**begun, **media, use_cache=True, logits_to_keep=1).past_key_values
    number_of = {place: number for number, of in enumerate(found) for place in of.places}
    rests = _aligned([_part(text, slice(found[number_of[place]].tokens, None)) for place, text in enumerate(texts)], pad, device)
    rows_B = torch.tensor([number_of[place] for place in range(len(scripts))])
    cache.batch_select_indices(rows_B)  # from the CPU, as its layers may lie on several devices
    rows_B = rows_B.to(device)
    return {name: torch.cat([begun[name].index_select(-2, rows_B), rests[name]], -1) for name in begun} | {"past_key_values": cache}


def _text(script: Script, chat: Chat) -> Text:
    """What the language model is given of a script, but for its media: (S) ids and mask, (4, S) positions."""
    ids = script.widened()[0]
    mask = torch.ones(len(ids), dtype=torch.long)
    return {"input_ids": torch.tensor(ids), "attention_mask": mask, "position_ids": positions_of(script, ids, chat)}


def _part(text: Text, of: slice) -> Text:
    return {name: tensor[..., of] for name, tensor in text.items()}


def _aligned(texts: Sequence[Text], pad: int, device: Any) -> Text:
    """Texts under each other, the shorter padded on the left."""
    width = max(len(text["input_ids"]) for text in texts)

    def padded(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return functional.pad(tensor, (width - tensor.shape[-1], 0), value=pad if name == "input_ids" else 0)

    return {name: torch.stack([padded(name, text[name]) for text in texts], -2).to(device) for name in texts[0]}
