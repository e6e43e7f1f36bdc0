"""The loss of a row: the sum over its taught tokens, the LM head run on those positions only.

Nothing is averaged here: the step divides once, by the number of tokens taught in all rows of all processes.
"""

from collections.abc import Callable
from itertools import islice
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn import functional

from qwenvl_ft.data.chat import IGNORE
from qwenvl_ft.data.rows import FEATURES, KEYS, MAY_KEEP, PIXELS, SCALES, SIZES, Row, as_floats
from qwenvl_ft.model.attention import attention_of

Keep = Callable[[torch.Tensor], None]


def taught(labels: torch.Tensor) -> torch.Tensor:
    """Mask (1, S), true where the NEXT token carries a label: the positions whose logits the loss needs. The last is false."""
    return functional.pad(labels[:, 1:] != IGNORE, (0, 1), value=False)


def vision_features(model: Any, row: Row, trains: bool, keep: Keep | None = None) -> dict[str, Any] | None:
    """What the vision tower makes of the row's pictures and videos, for the model's `mm_encoder_outputs`; None without any.
    `keep` is given what the tower was run for: (T, W), of a token its features and behind them those of Qwen3-VL's deepstack.

    It is run once, whatever the row shows: where processes share out its weights, one that ran it twice would wait for the others.
    Without gradient where nothing in the tower trains. Left to itself, peft with gradient checkpointing runs the whole
    frozen tower backward and recomputes it; the LoRA gradients are the same to the bit.
    """
    shown = {kind: names for kind, names in PIXELS.items() if names[1] in row}
    if not shown:
        return None
    if FEATURES in row:
        features, sizes = row[FEATURES], row[SIZES]
    else:
        floats = as_floats({key: row[key] for key in (SCALES, *(name for names in shown.values() for name in names))})
        patches, grids = (torch.cat([floats[names[at]] for names in shown.values()]) for at in (0, 1))
        with torch.set_grad_enabled(trains and torch.is_grad_enabled()):
            found = model.get_image_features(patches, grids, return_dict=True)
            layers = [found.pooler_output, *(getattr(found, "deepstack_features", None) or [])]  # of each picture one
            features = torch.cat([torch.cat(layer) for layer in layers], 1)
        each = iter([len(of) for of in found.pooler_output])
        sizes = [sum(islice(each, len(row[name]))) for _, name in shown.values()]
        if keep:
            keep(features)
    parts = [layer.split(sizes) for layer in features.split(model.config.get_text_config().hidden_size, 1)]
    return {
        kind: SimpleNamespace(pooler_output=[first], deepstack_features=[[one] for one in more])
        for kind, (first, *more) in zip(shown, zip(*parts, strict=True), strict=True)
    }


def summed_loss(model: Any, bare_model: Any, row: Row, tower_trains: bool, keep: Keep | None = None) -> torch.Tensor:
    """Cross entropy summed over the row's taught tokens, a float32 scalar.

    `model` may be wrapped for several processes; `bare_model` is the same without the wrapping, for the vision tower. For `keep`
    see vision_features.
    """
    assert KEYS not in row or attention_of(bare_model) == "varlen", "another attention would lose the trees without a word"
    taught_at = taught(row["labels"])[0].nonzero()[:, 0]  # here a GPU is waited for, once; a mask would wait at each use
    shown = vision_features(bare_model, row, tower_trains, keep)
    not_taken = {"labels", SCALES, FEATURES, SIZES, MAY_KEEP, *(name for names in PIXELS.values() for name in names)}
    inputs = {key: value for key, value in row.items() if key not in not_taken}
    head = bare_model.get_output_embeddings()
    head.labels = row["labels"][0].index_select(0, taught_at + 1)
    try:
        # use_cache=False: with a cache transformers ignores where records begin, without a word (tests/test_packing.py shows it).
        loss: torch.Tensor = model(
            **inputs, mm_encoder_outputs=shown, use_cache=False, logits_to_keep=taught_at, taught_at=taught_at
        ).logits
    finally:
        head.labels = None
    return loss
