"""The loss of a row: the sum over its taught tokens, the LM head run on those positions only.

Nothing is averaged here: the step divides once, by the number of tokens taught in all rows of all processes.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn import functional

from qwenvl_ft.data.chat import IGNORE
from qwenvl_ft.data.rows import FEATURES, KEYS, MAY_KEEP, PIXELS, SCALES, SIZES, Row, as_floats
from qwenvl_ft.model.attention import attention_of
from qwenvl_ft.model.waits import all_sent, sent, tower_places

Keep = Callable[[torch.Tensor], None]


def taught(labels: torch.Tensor) -> torch.Tensor:
    """Mask (1, S), true where the NEXT token carries a label: the positions whose logits the loss needs. The last is false."""
    return functional.pad(labels[:, 1:] != IGNORE, (0, 1), value=False)


def vision_features(
    model: Any, row: Row, trains: bool, keep: Keep | None = None, device: torch.device | None = None
) -> dict[str, Any] | None:  # fmt: skip
    """What the vision tower makes of the row's pictures and videos, for the model's `mm_encoder_outputs`; None without any.
    `keep` is given what the tower was run for: (T, W), of a token its features and behind them those of Qwen3-VL's deepstack.
    The row is on the CPU, the model may be on a `device`.

    It is run once, whatever the row shows: where processes share out its weights, one that ran it twice would wait for the others.
    Without gradient where nothing in the tower trains. Left to itself, peft with gradient checkpointing runs the whole
    frozen tower backward and recomputes it; the LoRA gradients are the same to the bit.
    """
    shown = {kind: names for kind, names in PIXELS.items() if names[1] in row}
    if not shown:
        return None
    if FEATURES in row:
        features, sizes = sent(row[FEATURES], device), row[SIZES]
    else:
        tower = getattr(model, "get_base_model", lambda: model)().model.visual
        grids = torch.cat([row[name] for _, name in shown.values()])
        floats = as_floats(all_sent({name: row[name] for name in (SCALES, *(name for name, _ in shown.values()))}, device))
        patches = torch.cat([floats[name] for name, _ in shown.values()]).to(tower.dtype)
        places = all_sent(tower_places(tower, grids), device)
        with torch.set_grad_enabled(trains and torch.is_grad_enabled()):
            found = tower(patches, grid_thw=sent(grids, device), return_dict=True, **places)
            features = torch.cat([found.pooler_output, *(getattr(found, "deepstack_features", None) or [])], 1)
        sizes = [int(row[name].prod(1).sum()) // tower.spatial_merge_size**2 for _, name in shown.values()]
        if keep:
            keep(features)
    held = [int((row["input_ids"] == getattr(model.config, f"{kind}_token_id")).sum()) for kind in shown]
    assert held == sizes and sum(sizes) == len(features), "a feature for each placeholder"
    parts = [layer.split(sizes) for layer in features.split(model.config.get_text_config().hidden_size, 1)]
    return {
        kind: SimpleNamespace(pooler_output=[first], deepstack_features=[[one] for one in more])
        for kind, (first, *more) in zip(shown, zip(*parts, strict=True), strict=True)
    }


def summed_loss(
    model: Any, bare_model: Any, row: Row, tower_trains: bool, keep: Keep | None = None, device: torch.device | None = None
) -> torch.Tensor:  # fmt: skip
    """Cross entropy summed over the row's taught tokens, a float32 scalar.

    `model` may be wrapped for several processes; `bare_model` is the same without the wrapping, for the vision tower. The row is on
    the CPU; with a `device`, where the model is, it is sent there, and nothing is waited for. For `keep` see vision_features.
    """
    assert KEYS not in row or attention_of(bare_model) == "varlen", "another attention would lose the trees without a word"
    taught_at = taught(row["labels"])[0].nonzero()[:, 0]
    labels = row["labels"][0].index_select(0, taught_at + 1)
    shown = vision_features(bare_model, row, tower_trains, keep, device)
    not_taken = {"labels", SCALES, FEATURES, SIZES, MAY_KEEP, *(name for names in PIXELS.values() for name in names)}
    inputs = all_sent({key: of for key, of in row.items() if key not in not_taken}, device)
    head = bare_model.get_output_embeddings()
    head.labels, taught_at = sent(labels, device), sent(taught_at, device)
    try:
        # use_cache=False: with a cache transformers ignores where records begin (tests/model/test_packing.py shows it).
        loss: torch.Tensor = model(
            **inputs, mm_encoder_outputs=shown, use_cache=False, logits_to_keep=taught_at, taught_at=taught_at
        ).logits
    finally:
        head.labels = None
    return loss
