"""How an adapter names its tensors, and which base it belongs to."""

import hashlib
import re
from pathlib import Path
from typing import Any

from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.folders.model import read_model_json
from qwenvl_ft.folders.runs import run_folder_of
from qwenvl_ft.folders.tensors import read_header
from qwenvl_ft.folders.whole import short_hash

LORA_KEY = re.compile(r"base_model\.model\.(.+)\.lora_(A|B)\.weight$")
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what its --max-lora-rank takes; source: vllm/config/lora.py, MaxLoRARanks
SAMPLE_BYTES = 4096
BASE = "base_model.json"  # in an adapter's folder: the fingerprint of the base that it was trained on


def base_fingerprint(model_dir: Path) -> dict[str, Any]:
    """Names a base model without reading it whole: its config, and the header and some of every tensor of its safetensors.

    Of every tensor, because a merge changes only some. Raises UserError for a file that is not whole.
    """
    config = read_model_json(model_dir / "config.json")
    config.pop("transformers_version", None)
    files = {}
    for path in sorted(model_dir.glob("*.safetensors")):
        head, tensors = read_header(path)
        digest, start = hashlib.sha256(head), len(head)
        with path.open("rb") as file:
            for tensor in tensors:
                file.seek(start + max(0, tensor.num_bytes // 2 - SAMPLE_BYTES))
                digest.update(file.read(min(SAMPLE_BYTES, tensor.num_bytes)))
                start += tensor.num_bytes
        files[path.name] = [path.stat().st_size, digest.hexdigest()]
    return {"config": short_hash(config), "weights": files}


def check_base(adapter: Path, model_dir: Path) -> None:
    """Raises UserError if the adapter says that it was trained on another base."""
    said = run_folder_of(adapter) / BASE
    if said.is_file() and read_model_json(said) != base_fingerprint(model_dir):
        raise UserError(Problem(str(model_dir), f"is not the base that {adapter} was trained on",
                                f"give that base; if it is the same, saved anew, delete {said}"))  # fmt: skip
