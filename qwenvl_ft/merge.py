"""Merges an adapter into the files of its base in one stream: memory does not grow with the model.

    merged = base + (alpha / rank) * B @ A, summed in float32, cast back to the base's dtype, under the base's own key names

A merged file has its base's header, byte for byte; behind it come the tensors, block by block, changed or copied.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from qwenvl_ft import checkpoint
from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.geometry import read_model_json

LORA_KEY = re.compile(r"base_model\.model\.(.+)\.lora_(A|B)\.weight$")
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}  # numpy knows no bfloat16: its bits
BLOCK_BYTES = 1 << 19  # a block and its float32 stay in a core's cache
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what its --max-lora-rank takes; source: vllm/config/lora.py, MaxLoRARanks
# Settings of PEFT that make an adapter more than B @ A.
NOT_PLAIN = (
    "use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "lora_bias", "use_qalora", "use_bdlora",
    "alora_invocation_tokens", "arrow_config", "layer_replication", "fan_in_fan_out", "trainable_token_indices",
    "target_parameters",
)  # fmt: skip
PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")  # the others, PiSSA among them, change the base
Floats = NDArray[np.float32]


def check_adapter(adapter: Path) -> None:
    """Raises UserError unless the folder holds a PEFT adapter whose settings and tensors can be read."""
    weights, settings = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    if not settings.is_file() or not weights.is_file():
        found = checkpoint.checkpoints(adapter)
        fix = f"give its newest checkpoint, {found[-1]}" if found else "give the output_dir of a finished run"
        what = "holds no adapter_config.json with adapter_model.safetensors"
        if (adapter / "config.json").is_file():
            what, fix = "is a whole model, not an adapter", "give it as the model, without --adapter"
        raise UserError(Problem(str(adapter), what, fix))
    said = read_model_json(settings)
    if said.get("peft_type") != "LORA" or not all(isinstance(said.get(key), int | float) for key in ("r", "lora_alpha")):
        raise UserError(Problem(str(settings), "names no LoRA with r and lora_alpha", "copy or train the adapter again"))
    read_header(weights)


class Stored(NamedTuple):
    """A tensor in a safetensors file, which holds them one behind the other."""

    key: str
    dtype: str
    shape: list[int]
    num_bytes: int


class Deltas:
    """What the adapter adds to each weight of the base, by the weight's module as transformers 5 names it.

    Raises UserError for an adapter that is more than LoRA, or that changes one side of tied embeddings.
    """

    def __init__(self, adapter: Path, base_config: dict[str, Any]):
        self.where = adapter / "adapter_model.safetensors"
        settings = read_model_json(adapter / "adapter_config.json")
        more = [key for key in NOT_PLAIN if settings.get(key)]
        more += ["bias"] if settings.get("bias", "none") != "none" else []
        more += ["init_lora_weights"] if settings.get("init_lora_weights") not in PLAIN_STARTS else []
        if more:
            raise UserError(Problem(str(adapter), f"is no plain LoRA adapter ({', '.join(more)})",
                                    "merge it with the tool that trained it"))  # fmt: skip
        rank = settings["r"]
        self.scale = settings["lora_alpha"] / (rank**0.5 if settings.get("use_rslora") else rank)
        head, tensors = read_header(self.where)
        self.places: dict[str, dict[str, tuple[Stored, int]]] = {}  # of each module's A and B, with the offset in the file
        offset = len(head)
        for tensor in tensors:
            match = LORA_KEY.match(tensor.key)
            if not match or tensor.dtype not in DTYPES:
                raise UserError(
                    Problem(
                        f"{self.where}: {tensor.key}", "is not a LoRA tensor that can be merged", "train it again with this tool"
                    )
                )
            self.places.setdefault(module_of(match[1]), {})[match[2]] = tensor, offset
            offset += tensor.num_bytes
        self.left = set(self.places)
        tied = base_config.get("tie_word_embeddings") or base_config.get("text_config", {}).get("tie_word_embeddings")
        if tied and "lm_head" in self.places:
            raise UserError(Problem(f"{self.where}: lm_head", "changes one side of embeddings that the base ties together",
                                    "train without this module"))  # fmt: skip

    def of(self, key: str, shape: list[int]) -> tuple[Floats, Floats] | None:
        """(B, A) in float32, B times the scale, for a checkpoint's key; None if the adapter does not touch it."""
        module = module_of(key)
        if module not in self.places:
            return None
        pair = {
            side: as_float32(np.fromfile(self.where, DTYPES[tensor.dtype], math.prod(tensor.shape), offset=offset)).reshape(
                tensor.shape
            )
            for side, (tensor, offset) in self.places[module].items()
        }
        if len(shape) != 2:
            raise UserError(Problem(f"{self.where}: {module}", "is LoRA on a convolution, which is not merged here",
                                    "merge it with the tool that trained it"))  # fmt: skip
        if not all(np.isfinite(matrix).all() for matrix in pair.values()):
            raise UserError(Problem(f"{self.where}: {module}", "holds NaN or infinity", "take an earlier checkpoint"))
        if pair.keys() != {"A", "B"} or [pair["B"].shape[0], pair["A"].shape[1]] != shape:
            found = {side: tensor.shape for side, tensor in pair.items()}
            raise UserError(Problem(f"{self.where}: {module}", f"has shape {found}, the base {shape}",
                                    "give the right base with --model DIR"))  # fmt: skip
        self.left.discard(module)
        return pair["B"] * np.float32(self.scale), pair["A"]


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


def merge_files(shards: Sequence[Path], folder: Path, deltas: Deltas, on_bytes: Callable[[int, int], None]) -> dict[str, str]:
    """Writes the safetensors files of a base, merged, into `folder`; returns the sha256 of each by its name.

    `on_bytes` is told (bytes done, bytes in all), from several threads. Raises UserError if an adapter tensor has no home.
    """
    headers = {shard: read_header(shard) for shard in shards}  # all of them first: a damaged last one would show after an hour
    total = sum(shard.stat().st_size for shard in shards)
    moved: list[int] = []
    stop = Event()

    def merge(shard: Path) -> tuple[str, str]:
        head, tensors = headers[shard]
        digest = hashlib.sha256(head)
        with shard.open("rb") as source, (folder / shard.name).open("wb") as target:
            source.seek(target.write(head))
            for tensor in tensors:
                for block in _merged(source, tensor, deltas):
                    target.write(block)
                    digest.update(block)
                moved.append(tensor.num_bytes)
                on_bytes(sum(moved), total)
                if stop.is_set():
                    break
        return shard.name, digest.hexdigest()

    # Threads take shards; a product of such small blocks is slower on several.
    with ThreadPoolExecutor(4) as pool, threadpool_limits(1, "blas"):
        try:
            digests = dict(pool.map(merge, shards))
        finally:
            stop.set()
    if deltas.left:
        raise UserError(*(
            Problem(f"{deltas.where}: {module}", "has no home in the base", "give the right base with --model DIR")
            for module in sorted(deltas.left)
        ))  # fmt: skip
    return digests


def _merged(source: IO[bytes], tensor: Stored, deltas: Deltas) -> Iterator[Any]:
    """The bytes of one tensor, some rows at a time, what the adapter adds included."""
    change = deltas.of(tensor.key, tensor.shape)
    if change and tensor.dtype not in DTYPES:
        raise UserError(Problem(f"{source.name}: {tensor.key}", f"is stored as {tensor.dtype}: the base is quantized",
                                "merge into the base in its full precision, with --model DIR"))  # fmt: skip
    row_bytes = tensor.num_bytes // tensor.shape[0] if change else 1
    step = max(1, BLOCK_BYTES // row_bytes)
    for row in range(0, tensor.num_bytes // row_bytes, step):
        block = bytearray(source.read(min(step * row_bytes, tensor.num_bytes - row * row_bytes)))
        if change:
            left, right = change
            stored = np.frombuffer(block, DTYPES[tensor.dtype]).reshape(-1, tensor.shape[1])
            weight = as_float32(stored)
            weight += left[row : row + step] @ right
            store(stored, weight)
        yield block


def as_float32(stored: Any) -> Floats:
    """An array as a file holds it, in float32; uint16 holds the bits of bfloat16, which are float32's upper half."""
    return np.left_shift(stored, 16, dtype=np.uint32).view(np.float32) if stored.dtype == np.uint16 else stored.astype(np.float32)


def store(stored: Any, weight: Floats) -> None:
    """Writes float32 into an array as a file holds it, each to the nearest, halves to the even one."""
    if stored.dtype == np.uint16:
        bits = weight.view(np.uint32)
        odd = bits >> 16
        odd &= 1
        bits += odd
        bits += 0x7FFF
        bits >>= 16
        stored[:] = bits
    else:
        stored[:] = weight


def module_of(key: str) -> str:
    """The module that a checkpoint's key belongs to, as transformers 5 names it. Released Qwen2-VL and Qwen2.5-VL
    checkpoints have `visual.` and `model.` at the top where the model has `model.visual.` and `model.language_model.`."""
    module = key.removesuffix(".weight")
    if module.startswith("visual."):
        return "model." + module
    if module.startswith("model.") and not module.startswith(("model.visual.", "model.language_model.")):
        return "model.language_model." + module.removeprefix("model.")
    return module
