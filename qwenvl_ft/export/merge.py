"""Makes one folder of a base and an adapter that loads with `from_pretrained` and nothing else, proven before it is there.

    merged = base + (alpha / rank) * B @ A, summed in float32, cast back to the base's dtype, under the base's own key names

and where the adapter is DoRA, each row of that brought to the length that it has learnt. What it holds whole, as of a merger
that was trained in full, takes the base's place. Experts have a B and an A each; a base has them fused, its axes either way
round, or one by one. Where the adapter trained beside quantized layers, their base is what they stood for, dequantized(Q(base)):
that is the model that was trained, and the adapter has learnt to make up for the difference.

The weights are merged in one stream, so that memory does not grow with the model: a merged file has its base's header, byte for
byte; behind it come the tensors, block by block, changed or copied.
"""

import hashlib
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import product
from pathlib import Path
from threading import Event
from typing import IO, Any

import numpy as np
from threadpoolctl import threadpool_limits

from qwenvl_ft.config import load_config, read_yaml
from qwenvl_ft.data.chat import open_chat
from qwenvl_ft.data.families import Family, family_of
from qwenvl_ft.data.geometry import VIDEO_PROCESSORS, read_limits, read_video_limits, reading_of, video_settings
from qwenvl_ft.data.meta_file import read_records
from qwenvl_ft.data.quantization import is_quantized, not_installed
from qwenvl_ft.data.reading import Reading
from qwenvl_ft.data.targets import MERGERS
from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.evaluate.card import write_card
from qwenvl_ft.export.prove import prove
from qwenvl_ft.folders.adapter import (
    DTYPES,
    FUSED,
    LORA_KEY,
    MAGNITUDE_KEY,
    PLAIN_STARTS,
    Floats,
    Place,
    Stored,
    as_float32,
    dtype_of,
    module_of,
    quantization_of,
    read_header,
    scale_of,
    weight_of,
)
from qwenvl_ft.folders.model import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    INDEX,
    read_config,
    read_model_json,
    read_template,
    weight_files,
)
from qwenvl_ft.folders.problems import check_adapter
from qwenvl_ft.folders.runs import PROCESSORS, READING, holds_processor, run_folder_of
from qwenvl_ft.folders.whole import write_json, write_whole
from qwenvl_ft.infer.decoding import GENERATION_CONFIG, read_decoding
from qwenvl_ft.infer.engine import check_folders
from qwenvl_ft.values import Quantization

COPIED = (
    "config.json", "configuration.json", INDEX, "tokenizer.json", "tokenizer_config.json",
    "chat_template.jinja", "chat_template.json", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "video_preprocessor_config.json", *PROCESSORS, "LICENSE", "NOTICE",
)  # fmt: skip
TEMPLATED = ("tokenizer_config.json", *PROCESSORS)  # which may hold a template, too
OF_PICTURES = ("min_pixels", "max_pixels", "image_processor_type")  # in a file that old bases have for pictures and videos together
BLOCK_BYTES = 1 << 19  # a block and its float32 stay in a core's cache
# Settings of PEFT that make an adapter more than B @ A.
NOT_PLAIN = (
    "lora_bias", "use_qalora", "use_bdlora",
    "alora_invocation_tokens", "arrow_config", "layer_replication", "fan_in_fan_out", "trainable_token_indices",
)  # fmt: skip


def export(
    adapter: Path, out: Path, model_dir: Path | None, verify: int, on_bytes: Callable[[int, int], None]
) -> list[dict[str, Any]]:
    """Writes the merged model to `out`: whole and proven, or not at all.

    Returns, for each of `verify` training records, `where`, `difference` (the largest of a logit) and `largest` (logit); where the
    base was quantized in training, `unrounded`, too, the difference that the adapter on the base as it is makes.
    `model_dir` defaults to the base that the adapter names. Raises UserError if the base is quantized or not the one that
    was trained on, if an adapter tensor has no module in it, or if the merged model differs by more than rounding explains.
    """
    check_adapter(adapter)  # which names the base
    base = model_dir or Path(read_model_json(adapter / ADAPTER_CONFIG).get("base_model_name_or_path") or "")
    if not (base / "config.json").is_file():
        raise UserError(Problem(str(base), "is not a model's folder", "give the base with --model DIR"))
    if out.exists():
        raise UserError(Problem(str(out), "exists already", "choose another --out, or delete it"))
    config = read_config(base)
    if "quantization_config" in config:
        raise UserError(Problem(str(base), "is quantized", "merge into the same model in its full precision, with --model DIR"))
    quantization = quantization_of(adapter)
    if quantization != "none" and (problems := [*not_installed(f"{adapter}, which trained beside layers in {quantization}")]):
        raise UserError(*problems)
    decoding = read_decoding(base, check_folders(base, [adapter]).tokenizer)
    run = run_folder_of(adapter)
    dtype = dtype_of(adapter)
    deltas = Deltas(adapter, config, quantization, family_of(base), dtype)
    records = _sample(run, verify)
    proofs: list[dict[str, Any]] = []

    def write(folder: Path) -> dict[str, str]:
        digests = merge_files(weight_files(base), folder, deltas, on_bytes)
        _copy_settings(folder, run, base)
        write_json(folder / GENERATION_CONFIG, decoding.file())
        if records:
            proofs.extend(prove(folder, base, adapter, records, quantization, dtype))
        write_card(adapter, base, folder, proofs)
        return digests

    write_whole(out, write, replace=False)
    return proofs


def _copy_settings(folder: Path, run: Path, base: Path) -> None:
    """Config, tokenizer, processor and the like as the base has them, so that whatever reads the base reads this, too; in the
    processor the limits that training used, and a template that asks as was taught. Beside them what of the run's settings says
    how it is asked."""
    settings = read_yaml(run / "config.yaml")[0] if (run / "config.yaml").is_file() else {}
    if how := {key: of for key in ("boxes", "media_position") if (of := settings.get(key)) not in (None, "as_written")}:
        write_json(folder / READING, how)
    for name in COPIED:
        if (base / name).is_file():
            shutil.copy(base / name, folder / name)
    if (source := open_chat(base, adapter=run).source) != read_template(base):
        for path in (folder / name for name in TEMPLATED if (folder / name).is_file()):
            write_json(path, {key: value for key, value in read_model_json(path).items() if key != "chat_template"})
        (folder / "chat_template.json").unlink(missing_ok=True)
        (folder / "chat_template.jinja").write_text(source, encoding="utf-8")
    if not holds_processor(run):
        return
    limits, videos, reading = read_limits(run), read_video_limits(run, family_of(base).clock == "written"), reading_of(run)
    values = dict.fromkeys(("min_pixels", "shortest_edge"), limits.min_pixels)
    values |= dict.fromkeys(("max_pixels", "longest_edge"), limits.max_pixels)
    for path in (folder / name for name in PROCESSORS if (folder / name).is_file()):
        content = read_model_json(path)
        settings = content.get("image_processor", content)
        if "patch_size" in settings:
            for place in (settings, settings.get("size") or {}):
                place |= {key: value for key, value in values.items() if place.get(key) is not None}
            write_json(path, content)
    of_videos = {key: value for key, value in video_settings(base).items() if key not in OF_PICTURES} | {
        "size": {"shortest_edge": videos.min_pixels, "longest_edge": videos.max_pixels}, "cap_pixels_per_frame": True,
        "max_video_tokens": videos.max_video_tokens, "fps": reading.video_fps, "max_frames": reading.video_max_frames,
    }  # fmt: skip
    new, old = (folder / name for name in VIDEO_PROCESSORS[:2])
    if new.is_file() and "video_processor" in (content := read_model_json(new)):
        write_json(new, content | {"video_processor": of_videos})
    else:
        write_json(old, of_videos)


def _sample(run: Path, number: int) -> list[tuple[str, Any]]:
    """(place, conversation) of the first records that the run trained on; a question about a picture where they are gone."""
    settings = run / "config.yaml"
    if number and settings.is_file():
        config = load_config(settings)
        found = read_records(config.train_meta_file, config.train_data_dir, most=number, reading=Reading.of(config))
        if records := found.records[:number]:
            return [(record.where, record.turns) for record in records]
    from PIL import Image

    picture = Image.linear_gradient("L").convert("RGB")
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "What is this?"}]
    return [("a made-up picture, the training records not being here", [{"role": "user", "content": content}])][:number]


class Deltas:
    """What the adapter adds to each weight of the base, by the weight's module as transformers 5 names it.

    Raises UserError for an adapter that is more than LoRA, or that changes one side of tied embeddings.
    """

    def __init__(self, adapter: Path, base_config: dict[str, Any], quantization: Quantization = "none",
                 family: Family | None = None, dtype: str = "auto"):  # fmt: skip
        self.where, self.quantization, self.family, self.dtype = adapter / ADAPTER_WEIGHTS, quantization, family, dtype
        settings = read_model_json(adapter / ADAPTER_CONFIG)
        more = [key for key in NOT_PLAIN if settings.get(key)]
        more += [
            name for name in settings.get("target_parameters") or () if not name.endswith(tuple(f"experts.{of}" for of in FUSED))
        ]
        more += ["bias"] if settings.get("bias", "none") != "none" else []
        more += ["init_lora_weights"] if settings.get("init_lora_weights") not in PLAIN_STARTS else []
        if more:
            raise UserError(Problem(str(adapter), f"is no plain LoRA adapter ({', '.join(more)})",
                                    "merge it with the tool that trained it"))  # fmt: skip
        self.settings = settings
        of_text = base_config.get("text_config", base_config)
        self.num_experts = of_text.get("num_experts") or of_text.get("num_local_experts") or 1  # transformers 5 writes the second
        self.factors = lru_cache(8)(self._factors)  # a layer's experts may be asked for one by one, by several threads
        self.pairs: dict[str, dict[str, Stored]] = {}  # of each module its A and B
        self.magnitudes: dict[str, Stored] = {}  # of DoRA
        self.whole: dict[str, Stored] = {}  # in place of the base's
        for tensor in read_header(self.where)[1]:
            name = module_of(tensor.key.removeprefix("base_model.model."))
            if settings.get("modules_to_save") and re.fullmatch(rf"{MERGERS}\..+", name) and ".lora_" not in name:
                self.whole[name] = tensor
                continue
            if (match := MAGNITUDE_KEY.match(tensor.key)) and settings.get("use_dora") and tensor.dtype in DTYPES:
                self.magnitudes[module_of(match[1])] = tensor
                continue
            match = LORA_KEY.match(tensor.key)
            if not match or tensor.dtype not in DTYPES:
                raise UserError(Problem(f"{self.where}: {tensor.key}", "is not a LoRA tensor that can be merged",
                                        "train it again with this tool"))  # fmt: skip
            self.pairs.setdefault(weight_of(module_of(match[1]), settings), {})[match[2]] = tensor
        self.left = {*self.pairs, *self.whole}
        self.parts: dict[str, set[Place]] = {}  # of experts that the base has one by one, those that were asked for
        if settings.get("use_dora") and (unlike := self.pairs.keys() ^ self.magnitudes.keys()):
            raise UserError(Problem(f"{self.where}: {min(unlike)}", "has no DoRA magnitude with its A and B", "copy it again"))
        tied = base_config.get("tie_word_embeddings") or base_config.get("text_config", {}).get("tie_word_embeddings")
        if tied and "lm_head" in self.pairs:
            raise UserError(Problem(f"{self.where}: lm_head", "changes one side of embeddings that the base ties together",
                                    "train without this module"))  # fmt: skip

    def of(self, key: str, shape: list[int]) -> tuple[Floats, Floats] | None:
        """(N, ., R) and (N, R, .) in float32, whose products are what is added to each of the N matrices of a checkpoint's tensor,
        of which most have one and fused experts some; None if the adapter does not touch it."""
        place = Place.of(module_of(key))
        if place.weight not in self.pairs:
            return None
        if len(shape) != 2 and not (len(shape) == 3 and place.weight.endswith(FUSED)):
            raise UserError(Problem(f"{self.where}: {place.weight}", "is LoRA on a convolution, which is not merged here",
                                    "merge it with the tool that trained it"))  # fmt: skip
        left, right = self.factors(place.weight)
        if place.expert is not None:
            left, right = place.part(left), right[place.expert : place.expert + 1]
        wanted = [len(left), left.shape[1], right.shape[2]]
        stored = [1, *shape][-3:]
        if stored == [wanted[0], wanted[2], wanted[1]] != wanted:  # as Qwen3-VL's experts lie in released files
            left, right, wanted = right.swapaxes(1, 2), left.swapaxes(1, 2), stored
        if wanted != stored:
            what, fix = f"has shape {wanted[-len(shape) :]}, the base {shape}", "give the right base with --model DIR"
            raise UserError(Problem(f"{self.where}: {place.weight}", what, fix))
        if place.expert is not None:
            asked = self.parts.setdefault(place.weight, set())
            asked.add(place)
            whole = len(asked) == self.num_experts * (1 if place.half is None else 2)
        if place.expert is None or whole:
            self.left.discard(place.weight)
        return left, right

    def _factors(self, weight: str) -> tuple[Floats, Floats]:
        """(E, out, R), times the scale, and (E, R, in) of a weight, E being 1 where there are no experts."""
        pair = {side: tensor.read() for side, tensor in self.pairs[weight].items()}
        if not all(np.isfinite(matrix).all() for matrix in pair.values()):
            raise UserError(Problem(f"{self.where}: {weight}", "holds NaN or infinity", "take an earlier checkpoint"))
        number = self.num_experts if weight.endswith(FUSED) and ".experts." in weight else 1
        if pair.keys() != {"A", "B"} or (pair["A"].shape[0], pair["A"].shape[0] % number) != (pair["B"].shape[1], 0):
            found = {side: list(matrix.shape) for side, matrix in pair.items()}
            raise UserError(Problem(f"{self.where}: {weight}", f"has shape {found}, which is no product",
                                    "give the right base with --model DIR"))  # fmt: skip
        # As PEFT's ParamWrapper lays them out: A an expert after the other, in B of each rank all experts.
        right = pair["A"].reshape(number, -1, pair["A"].shape[1])
        left = pair["B"].reshape(len(pair["B"]), -1, number).transpose(2, 0, 1)
        return left * np.float32(scale_of(self.settings, weight)), right

    def rounded(self, tensor: Stored) -> Floats | None:
        """What a tensor of a checkpoint stood for beside the adapter, all of it, over which its scales are quantized, too; None
        where that was itself."""
        if self.quantization == "none" or not self.family or not is_quantized(self.family, module_of(tensor.key)):
            return None
        import torch

        from qwenvl_ft.model.load import dtype_here
        from qwenvl_ft.model.quantized import rounded

        dtype = dtype_here() if self.dtype == "auto" else self.dtype
        return rounded(tensor.read(), self.quantization, getattr(torch, dtype))

    def in_place_of(self, key: str, shape: list[int]) -> Floats | None:
        """The tensor that takes the place of a checkpoint's; None if it stays."""
        if not (stored := self.whole.get(module_of(key))):
            return None
        if stored.shape != shape or not np.isfinite(found := stored.read()).all():
            raise UserError(Problem(f"{self.where}: {stored.key}", f"is no {shape} of finite numbers, as the base has it",
                                    "take an earlier checkpoint, or give the right base with --model DIR"))  # fmt: skip
        self.left.discard(module_of(key))
        return found

    def lengths(self, key: str) -> Floats | None:
        """Of each row of a checkpoint's weight the length that DoRA gives it; None where it does not."""
        stored = self.magnitudes.get(module_of(key))
        return stored.read() if stored else None


def merge_files(shards: Sequence[Path], folder: Path, deltas: Deltas, on_bytes: Callable[[int, int], None]) -> dict[str, str]:
    """Writes the safetensors files of a base, merged, into `folder`; returns the sha256 of each by its name.

    `on_bytes` is told (bytes done, bytes in all), from several threads. Raises UserError if an adapter tensor has no module there.
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
            Problem(f"{deltas.where}: {module}", "has no module in the base", "give the right base with --model DIR")
            for module in sorted(deltas.left)
        ))  # fmt: skip
    return digests


def _merged(source: IO[bytes], tensor: Stored, deltas: Deltas) -> Iterator[Any]:
    """The bytes of one tensor, some rows at a time, what the adapter adds included."""
    change, lengths = deltas.of(tensor.key, tensor.shape), deltas.lengths(tensor.key)
    whole, rounded = deltas.in_place_of(tensor.key, tensor.shape), deltas.rounded(tensor)
    if (change or whole is not None) and tensor.dtype not in DTYPES:
        raise UserError(Problem(f"{source.name}: {tensor.key}", f"is stored as {tensor.dtype}: the base is quantized",
                                "merge into the base in its full precision, with --model DIR"))  # fmt: skip
    if whole is not None:
        block = bytearray(source.read(tensor.num_bytes))
        store(np.frombuffer(block, DTYPES[tensor.dtype]).reshape(tensor.shape), whole)
        yield block
        return
    changes = change or rounded is not None
    matrices, rows = (len(change[0]) if change else 1, tensor.shape[-2]) if changes else (1, tensor.num_bytes)
    row_bytes = tensor.num_bytes // (matrices * rows) if changes else 1
    step = max(1, BLOCK_BYTES // row_bytes)
    for matrix, row in product(range(matrices), range(0, rows, step)):
        block = bytearray(source.read(min(step, rows - row) * row_bytes))
        if changes:
            stored = np.frombuffer(block, DTYPES[tensor.dtype]).reshape(-1, tensor.shape[-1])
            weight = as_float32(stored) if rounded is None else rounded[row : row + step]
            if change:
                left, right = change
                weight += left[matrix][row : row + step] @ right[matrix]
            if lengths is not None:
                weight *= (lengths[row : row + step] / np.linalg.norm(weight, axis=1))[:, None]
            store(stored, weight)
        yield block


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
