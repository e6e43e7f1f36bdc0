"""Which learning rate each parameter has: the groups of the optimizer.

The schedule gives the rate of all; a group's `share` says how much of it is its own, so all rise and fall alike.
"""

from typing import Any

from qwenvl_ft.config import Config
from qwenvl_ft.data.targets import tower_of
from qwenvl_ft.model.load import trainable


def groups_of(model: Any, config: Config) -> list[dict[str, Any]]:
    """A group for each rate, whose parameters train at `share` times that of the schedule; its `name` is that of the rate in
    metrics.jsonl. One group where nothing has a rate of its own, all in the model's order."""
    groups: dict[tuple[str, float], dict[str, Any]] = {}
    for parameter_name, parameter in trainable(model).items():
        tower = tower_of(parameter_name)
        own = config.own[tower].learning_rate if tower in config.own else None
        name = f"learning_rate_{tower}" if own else "learning_rate"
        share = own / config.learning_rate if own else 1.0
        # As PEFT's create_loraplus_optimizer has it: B, and DoRA's magnitudes, which have one axis.
        if config.loraplus_lr_ratio and ("lora_B" in parameter_name or "lora_magnitude" in parameter_name):
            name, share = f"{name}_lora_B", share * config.loraplus_lr_ratio
        # Norms and biases of a merger that is trained in full are not pulled towards zero, as in transformers' Trainer.
        decay = 0.0 if "modules_to_save" in parameter_name and parameter.ndim == 1 else config.weight_decay
        group = groups.setdefault((name, decay), {"params": [], "name": name, "share": share, "weight_decay": decay})
        group["params"].append(parameter)
    return list(groups.values())
