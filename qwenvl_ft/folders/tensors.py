"""What a safetensors file says of its tensors, and how checkpoints name them, without torch."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from qwenvl_ft.errors import Problem, UserError

# How transformers before 4.52 named modules, in released Qwen2-VL and Qwen2.5-VL checkpoints, and in adapters behind PEFT's own
# prefix -> as transformers 5 does. PEFT takes the table as its `key_mapping`.
OLD_KEYS = {r"^visual\.": "model.visual.", r"^model\.(?!visual\.|language_model\.)": "model.language_model."}
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}  # numpy knows no bfloat16: its bits
Floats = NDArray[np.float32]


class Stored(NamedTuple):
    """A tensor in a safetensors file, which holds them one behind the other."""

    key: str
    dtype: str
    shape: list[int]
    num_bytes: int


def read_header(path: Path) -> tuple[bytes, list[Stored]]:
    """The head of a safetensors file as it stands there, and its tensors in the file's order.

    Raises UserError if the file is not whole.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        head = start + file.read(length) if length < size else b""
    try:
        table = json.loads(head[8:])
        table.pop("__metadata__", None)
        ordered = sorted(table.items(), key=lambda item: item[1]["data_offsets"])
        tensors = [Stored(key, of["dtype"], of["shape"], of["data_offsets"][1] - of["data_offsets"][0]) for key, of in ordered]
        whole = size == len(head) + sum(tensor.num_bytes for tensor in tensors)
    except (ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        what = "is a git-lfs pointer, not the file" if start == b"version " else "is not a whole safetensors file"
        raise UserError(Problem(str(path), what, "download or copy it again"))
    return head, tensors


def as_float32(stored: Any) -> Floats:
    """An array as a file holds it, in float32; uint16 holds the bits of bfloat16, which are float32's upper half."""
    found: Floats = (
        np.left_shift(stored, 16, dtype=np.uint32).view(np.float32) if stored.dtype == np.uint16 else stored.astype(np.float32)
    )
    return found


def module_of(key: str) -> str:
    """The module that a checkpoint's key belongs to, as transformers 5 names it."""
    module = key.removesuffix(".weight")
    for old, new in OLD_KEYS.items():
        module = re.sub(old, new, module)
    return module


def has_old_name(key: str) -> bool:
    """Whether transformers 5 names the module of this key in another way."""
    return module_of(key) != key.removesuffix(".weight")
