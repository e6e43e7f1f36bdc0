"""Merges an adapter into the files of its base in one stream: memory does not grow with the model.

    merged = base + (alpha / rank) * B @ A, summed in float32, cast back to the base's dtype, under the base's own key names

A merged file has its base's header, byte for byte; behind it come the tensors, block by block, changed or copied.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from safetensors import safe_open

from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.geometry import read_model_json

LORA_KEY = re.compile(r"base_model\.model\.(.+)\.lora_(A|B)\.weight$")
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
BLOCK_BYTES = 16 << 20
NOT_PLAIN = ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "lora_bias")
EMBEDDINGS = ("lm_head", "model.language_model.embed_tokens")


def check_adapter(adapter: Path) -> None:
    """Raises UserError unless the folder holds a PEFT adapter whose tensors can be read."""
    weights = adapter / "adapter_model.safetensors"
    if not (adapter / "adapter_config.json").is_file() or not weights.is_file():
        raise UserError(Problem(str(adapter), "holds no adapter_config.json with adapter_model.safetensors",
                                "give the output_dir of a finished run"))  # fmt: skip
    read_header(weights)


class Deltas:
    """What the adapter adds to each weight of the base, by the weight's module as transformers 5 names it.

    Raises UserError for an adapter that is more than LoRA, or that changes one side of tied embeddings.
    """

    def __init__(self, adapter: Path, base_config: dict[str, Any]):
        self.where = adapter / "adapter_model.safetensors"
        settings = read_model_json(adapter / "adapter_config.json")
        more = [key for key in NOT_PLAIN if settings.get(key)]
        if settings.get("bias", "none") != "none" or more or settings["peft_type"] != "LORA":
            raise UserError(Problem(str(adapter), f"is no plain LoRA adapter ({', '.join(more) or settings['peft_type']})",
                                    "merge it with the tool that trained it"))  # fmt: skip
        rank = settings["r"]
        self.scale = settings["lora_alpha"] / (rank**0.5 if settings.get("use_rslora") else rank)
        self.file = safe_open(self.where, "pt")
        self.keys: dict[str, dict[str, str]] = {}
        for key in self.file.keys():  # noqa: SIM118 - a safetensors file is no dict
            match = LORA_KEY.match(key)
            if not match:
                raise UserError(
                    Problem(f"{self.where}: {key}", "is not a LoRA tensor that can be merged", "train it again with this tool")
                )
            self.keys.setdefault(match[1], {})[match[2]] = key
        self.left = set(self.keys)
        tied = [module for module in EMBEDDINGS if module in self.keys]
        if base_config.get("tie_word_embeddings") and len(tied) == 1:
            raise UserError(Problem(f"{self.where}: {tied[0]}", "changes one side of embeddings that the base ties together",
                                    "train without this module"))  # fmt: skip

    def of(self, key: str, shape: list[int]) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(B, A) in float32, B times the scale, for a checkpoint's key; None if the adapter does not touch it."""
        module = module_of(key)
        if module not in self.keys:
            return None
        pair = {side: self.file.get_tensor(name).float() for side, name in self.keys[module].items()}
        if pair.keys() != {"A", "B"} or [pair["B"].shape[0], pair["A"].shape[1]] != shape:
            found = {side: tuple(tensor.shape) for side, tensor in pair.items()}
            raise UserError(Problem(f"{self.where}: {module}", f"has shape {found}, the base {shape}",
                                    "give the right base with --model DIR"))  # fmt: skip
        self.left.discard(module)
        return pair["B"] * self.scale, pair["A"]


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


def merge_files(base: Path, folder: Path, deltas: Deltas, on_bytes: Callable[[int, int], None]) -> dict[str, str]:
    """Writes every safetensors file of `base`, merged, into `folder`; returns the sha256 of each by its name.

    `on_bytes` is told (bytes done, bytes in all). Raises UserError if an adapter tensor has no home.
    """
    shards = sorted(base.glob("*.safetensors"))
    if not shards:
        raise UserError(Problem(str(base), "holds no safetensors", "download the model in its safetensors form"))
    headers = {shard: read_header(shard) for shard in shards}  # all of them first: a damaged last one would show after an hour
    total, done = sum(shard.stat().st_size for shard in shards), 0
    digests = {}
    for shard, (head, tensors) in headers.items():
        digest = hashlib.sha256(head)
        with shard.open("rb") as source, (folder / shard.name).open("wb") as target:
            source.seek(target.write(head))
            for tensor in tensors:
                for block in _merged(source, tensor, deltas):
                    target.write(block)
                    digest.update(block)
                done += tensor.num_bytes
                on_bytes(done, total)
        digests[shard.name] = digest.hexdigest()
    if deltas.left:
        raise UserError(*(
            Problem(f"{deltas.where}: {module}", f"has no home in {base}", "give the right base with --model DIR")
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
            weight = torch.frombuffer(block, dtype=DTYPES[tensor.dtype]).view(-1, tensor.shape[1])
            weight.copy_(torch.addmm(weight.float(), left[row : row + step], right))
        yield block


def module_of(key: str) -> str:
    """The module that a checkpoint's key belongs to, as transformers 5 names it. Released Qwen2-VL and Qwen2.5-VL
    checkpoints have `visual.` and `model.` at the top where the model has `model.visual.` and `model.language_model.`."""
    module = key.removesuffix(".weight")
    if module.startswith("visual."):
        return "model." + module
    if module.startswith("model.") and not module.startswith(("model.visual.", "model.language_model.")):
        return "model.language_model." + module.removeprefix("model.")
    return module
