"""Which tensors an adapter and its base hold, how each names them, and whether the two belong together. Without torch."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.folders.hashes import digests, user_cache
from qwenvl_ft.folders.model import ADAPTER_CONFIG, read_model_json, weight_files
from qwenvl_ft.folders.runs import run_folder_of
from qwenvl_ft.folders.whole import short_hash
from qwenvl_ft.values import Quantization

LORA_KEY = re.compile(r"base_model\.model\.(.+)\.lora_(A|B)\.weight$")
MAGNITUDE_KEY = re.compile(r"base_model\.model\.(.+)\.lora_magnitude_vector$")  # of DoRA, a number for each row of the weight
# How transformers before 4.52 named modules, in released Qwen2-VL and Qwen2.5-VL checkpoints, and in adapters behind PEFT's own
# prefix -> as transformers 5 does. PEFT takes the table as its `key_mapping`.
OLD_KEYS = {r"^visual\.": "model.visual.", r"^model\.(?!visual\.|language_model\.)": "model.language_model."}
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what its --max-lora-rank takes; source: vllm/config/lora.py, MaxLoRARanks
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}  # numpy knows no bfloat16: its bits
BASE = "base_model.json"  # in an adapter's folder: the fingerprint of the base that it was trained on
QUANTIZATION, DTYPE = "quantization", "dtype"  # in that file: how it was held then, if not as it is, and from which dtype
PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")  # of init_lora_weights; the others, as PiSSA, change the base
# Settings of PEFT that vLLM refuses, or does not look at.
BEYOND_VLLM = ("use_dora", "modules_to_save", "lora_bias", "rank_pattern", "alpha_pattern", "target_parameters")
# A layer's experts are two tensors, fused; PEFT hangs its LoRA on them one around the other, the first inside.
FUSED = ("gate_up_proj", "down_proj")
EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(gate|up|down)_proj")  # as a checkpoint may have each of them by itself
Floats = NDArray[np.float32]


class Stored(NamedTuple):
    """A tensor in a safetensors file, which holds them one behind the other; `start` is its place in the file."""

    path: Path
    key: str
    dtype: str
    shape: list[int]
    start: int
    num_bytes: int

    def read(self) -> Floats:
        """Its values; `dtype` must be one of DTYPES."""
        stored = np.fromfile(self.path, DTYPES[self.dtype], math.prod(self.shape), offset=self.start)
        return as_float32(stored).reshape(self.shape)


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
        places = {key: of["data_offsets"] for key, of in table.items()}
        tensors = [
            Stored(path, key, table[key]["dtype"], table[key]["shape"], len(head) + first, end - first)
            for key, (first, end) in sorted(places.items(), key=lambda place: place[1])
        ]
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


def scale_of(settings: Mapping[str, Any], module: str) -> float:
    """How often an adapter counts B @ A in a module, by its settings: the alpha and the rank there, which patterns may say, as PEFT
    reads them (its get_pattern_key)."""

    def there(key: str, pattern: str) -> float:
        values: dict[str, float] = settings.get(pattern) or {}
        return next((value for name, value in values.items() if re.match(rf"(.*\.)?({name})$", module)), settings[key])

    rank = there("r", "rank_pattern")
    return there("lora_alpha", "alpha_pattern") / (rank**0.5 if settings.get("use_rslora") else rank)


def module_of(key: str) -> str:
    """The module that a checkpoint's key belongs to, as transformers 5 names it."""
    module = key.removesuffix(".weight")
    for old, new in OLD_KEYS.items():
        module = re.sub(old, new, module)
    return module


def weight_of(module: str, settings: Mapping[str, Any]) -> str:
    """The module whose weight LoRA in a module of an adapter changes; of fused experts, which are no modules, the parameter."""
    experts, inside = module.removesuffix(".base_layer"), module.endswith(".base_layer")
    if not experts.endswith(".experts"):
        return module
    named = [name for name in FUSED if any(target.endswith(name) for target in settings.get("target_parameters") or FUSED)]
    return f"{experts}.{named[0 if inside else -1]}"


class Place(NamedTuple):
    """What a tensor of a checkpoint holds of a weight: all of it, or one of the experts that are fused in it, and of that the first
    or the second half of the rows."""

    weight: str
    expert: int | None = None
    half: int | None = None

    @classmethod
    def of(cls, module: str) -> "Place":
        """That of a module, as `module_of` names it."""
        if not (match := EXPERT.fullmatch(module)):
            return cls(module)
        experts, number, kind = match.groups()
        fused = f"{experts}.{FUSED[kind == 'down']}"
        return cls(fused, int(number), {"gate": 0, "up": 1}.get(kind))

    def part(self, stack: Any) -> Any:
        """Its part of (experts, rows, ...)."""
        if self.expert is None:
            return stack
        one = stack[self.expert : self.expert + 1]
        rows = one.shape[1] // 2
        return one if self.half is None else one[:, self.half * rows : (self.half + 1) * rows]


def vllm_rank(rank: int) -> int | None:
    """The --max-lora-rank that vLLM needs for an adapter of this rank; None if it takes none so large."""
    return next((allowed for allowed in VLLM_RANKS if allowed >= rank), None)


def beyond_vllm(folder: Path) -> list[str]:
    """The settings of an adapter that vLLM does not take."""
    settings = read_model_json(folder / ADAPTER_CONFIG)
    return [key for key in BEYOND_VLLM if settings.get(key)]


def base_fingerprint(model_dir: Path) -> dict[str, Any]:
    """Names a base model: its config, and all of its weights, which are read once and then remembered.

    Raises UserError for a file that cannot be read.
    """
    config = read_model_json(model_dir / "config.json")
    config.pop("transformers_version", None)
    found = digests(weight_files(model_dir), user_cache(), f"hashing {model_dir.name} (once)")
    return {"config": short_hash(config), "sha256": {path.name: digest for path, digest in found.items()}}


def quantization_of(adapter: Path) -> Quantization:
    """How the base was quantized while this adapter trained, as its run has written down."""
    return cast(Quantization, _recorded(adapter).get(QUANTIZATION, "none"))


def dtype_of(adapter: Path) -> str:
    """The dtype that a quantized base was read in while this adapter trained; auto for one that was not quantized."""
    return str(_recorded(adapter).get(DTYPE, "auto"))


def _recorded(adapter: Path) -> dict[str, Any]:
    """What the run of an adapter has written down of its base; nothing, where it has not."""
    said = run_folder_of(adapter) / BASE
    return read_model_json(said) if said.is_file() else {}


def base_problems(adapter: Path, model_dir: Path) -> list[Problem]:
    """A problem if the adapter says that it was trained on another base, or says it in a way that proves nothing."""
    said = run_folder_of(adapter) / BASE
    if not said.is_file():
        return []
    recorded = {key: of for key, of in _recorded(adapter).items() if key not in (QUANTIZATION, DTYPE)}  # the files are the same
    if "sha256" not in recorded:
        what = "names the base by samples of its weights, as older versions did, and a sample proves nothing"
        return [Problem(str(said), what, f"if {model_dir} is the base that it was trained on, delete this file")]
    if recorded != base_fingerprint(model_dir):
        return [Problem(str(model_dir), f"is not the base that {adapter} was trained on",
                        f"give that base; if it is the same, saved anew, delete {said}")]  # fmt: skip
    return []


def check_base(adapter: Path, model_dir: Path) -> None:
    """Raises UserError if the adapter says that it was trained on another base, or cannot tell."""
    if problems := base_problems(adapter, model_dir):
        raise UserError(*problems)
