"""Whether a folder holds a PEFT adapter."""

import re
from pathlib import Path

from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.folders.problems import read_model_json
from qwenvl_ft.folders.runs import checkpoints
from qwenvl_ft.folders.tensors import read_header

LORA_KEY = re.compile(r"base_model\.model\.(.+)\.lora_(A|B)\.weight$")
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what its --max-lora-rank takes; source: vllm/config/lora.py, MaxLoRARanks


def check_adapter(adapter: Path) -> None:
    """Raises UserError unless the folder holds a PEFT adapter whose settings and tensors can be read."""
    weights, settings = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    if not settings.is_file() or not weights.is_file():
        found = checkpoints(adapter)
        fix = f"give its newest checkpoint, {found[-1]}" if found else "give the output_dir of a finished run"
        what = "holds no adapter_config.json with adapter_model.safetensors"
        if (adapter / "config.json").is_file():
            what, fix = "is a whole model, not an adapter", "give it as the model, without --adapter"
        raise UserError(Problem(str(adapter), what, fix))
    said = read_model_json(settings)
    if said.get("peft_type") != "LORA" or not all(isinstance(said.get(key), int | float) for key in ("r", "lora_alpha")):
        raise UserError(Problem(str(settings), "names no LoRA with r and lora_alpha", "copy or train the adapter again"))
    read_header(weights)
