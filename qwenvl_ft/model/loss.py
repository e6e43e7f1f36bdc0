"""The loss of a row: the sum over its taught tokens, the LM head run on those positions only.

Nothing is averaged here: the step divides once, by the number of tokens taught in all rows of all processes.
"""

from typing import Any

import torch
from torch.nn import functional

from qwenvl_ft.data.chat import IGNORE
from qwenvl_ft.data.rows import Row


def taught(labels: torch.Tensor) -> torch.Tensor:
    """Mask (1, S), true where the NEXT token carries a label: the positions whose logits the loss needs. The last is false."""
    return functional.pad(labels[:, 1:] != IGNORE, (0, 1), value=False)


def picture_features(model: Any, row: Row, trains: bool) -> dict[str, Any] | None:
    """What the vision tower makes of the row's pictures, for the model's `mm_encoder_outputs`; None without pictures.

    Without gradient where nothing in the tower trains. Left to itself, peft with gradient checkpointing runs the whole
    frozen tower backward and recomputes it; the LoRA gradients are the same to the bit.
    """
    if "pixel_values" not in row:
        return None
    with torch.set_grad_enabled(trains and torch.is_grad_enabled()):
        return {"image": model.get_image_features(row["pixel_values"], row["image_grid_thw"], return_dict=True)}


def summed_loss(model: Any, bare_model: Any, row: Row, tower_trains: bool) -> torch.Tensor:
    """Cross entropy summed over the row's taught tokens, a float32 scalar.

    `model` may be wrapped for several processes; `bare_model` is the same without the wrapping, for the vision tower.
    """
    keep = taught(row["labels"])
    inputs = {key: value for key, value in row.items() if key not in ("labels", "pixel_values", "image_grid_thw")}
    # use_cache=False: with a cache transformers ignores where records begin, without a word (tests/test_packing.py shows it).
    logits = model(
        **inputs, mm_encoder_outputs=picture_features(bare_model, row, tower_trains), use_cache=False, logits_to_keep=keep
    ).logits
    return functional.cross_entropy(logits.float(), row["labels"][:, 1:][keep[:, :-1]], reduction="sum")
