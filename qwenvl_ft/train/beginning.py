"""Where a run's adapter begins: fresh, or as a checkpoint has it."""

from pathlib import Path
from typing import Any

import torch
from peft import set_peft_model_state_dict
from safetensors.torch import load_file

from qwenvl_ft.config import Config
from qwenvl_ft.folders.model import ADAPTER_WEIGHTS
from qwenvl_ft.model.pissa import State, take_out, take_out_again


def begin(model: Any, config: Config, device: torch.device, checkpoint: Path | None) -> State:
    """Gives the model's LoRA, which is fresh, the weights that the run begins with; returns what PiSSA began with, if it is PiSSA.

    Raises UserError.
    """
    pissa = config.init_lora_weights
    if checkpoint is None:
        return {} if pissa is True else take_out(model, pissa, device)
    state, beginning = load_file(checkpoint / ADAPTER_WEIGHTS), State()
    if pissa is not True:
        state, beginning = take_out_again(model, state, device)
    set_peft_model_state_dict(model, state)
    return beginning
