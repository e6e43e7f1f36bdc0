"""The real shapes of Qwen-VL models, random records for them, and ways to run LoRA: what scripts/bench_gpu.py trains and asks."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from peft.tuners.lora import Linear
from transformers import AutoConfig

from qwenvl_ft.data.chat import IGNORE
from qwenvl_ft.data.rows import SCALES, Row, positions, with_features
from qwenvl_ft.model.lora import FusedLora, fuse_lora, is_gated
from qwenvl_ft.model.loss import vision_features

# From the published config.json files; the ids of the placeholders are low ones, since nothing here was ever taught.
START, END, PICTURE, FILM, FIRST_WORD, WORDS = 3, 4, 5, 6, 10, 1000
IDS = {"image_token_id": PICTURE, "video_token_id": FILM, "vision_start_token_id": START, "vision_end_token_id": END}


def text(hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, vocabulary: int, tied: bool = False, **more: Any) -> Any:
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    return {
        "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "vocab_size": vocabulary, "tie_word_embeddings": tied, "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768, "rope_parameters": rope, "bos_token_id": 1, "eos_token_id": 2, **more,
    }  # fmt: skip


def qwen2_tower(hidden: int) -> dict[str, Any]:
    return {"depth": 32, "embed_dim": 1280, "hidden_size": hidden, "mlp_ratio": 4, "num_heads": 16, "patch_size": 14}


SEVEN = text(3584, 18944, 28, 28, 4, 152064)
INTERLEAVED = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
SHAPES = {
    "Qwen2-VL-2B": ("qwen2_vl", text(1536, 8960, 28, 12, 2, 151936, tied=True), qwen2_tower(1536)),
    "Qwen2-VL-7B": ("qwen2_vl", SEVEN, qwen2_tower(3584)),
    "Qwen2.5-VL-7B": ("qwen2_5_vl", SEVEN, {
        "depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14,
        "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2, "out_hidden_size": 3584,
    }),
    "Qwen3-VL-8B": ("qwen3_vl", text(4096, 12288, 36, 32, 8, 151936, head_dim=128, rope_parameters=INTERLEAVED), {
        "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "patch_size": 16, "out_hidden_size": 4096,
        "num_position_embeddings": 2304, "deepstack_visual_indexes": [8, 16, 24],
    }),
}  # fmt: skip
LEVERS = "Qwen2-VL-7B"


def config_of(name: str, toy: bool) -> Any:
    """The real shape; or a toy of two layers with the real sizes of a head, two of them."""
    model_type, language, tower = SHAPES[name]
    if toy:
        language = {**language, "hidden_size": 256, "intermediate_size": 320, "num_hidden_layers": 2, "num_attention_heads": 2,
                    "num_key_value_heads": 1, "vocab_size": 1024}  # fmt: skip
        width = 2 * tower.get("embed_dim", tower["hidden_size"]) // tower["num_heads"]
        sizes = {"depth": 2, "num_heads": 2, "fullatt_block_indexes": [1], "deepstack_visual_indexes": [0], "mlp_ratio": 2,
                 "intermediate_size": 320, "out_hidden_size": 256, "embed_dim": width,
                 "hidden_size": 256 if "embed_dim" in tower else width}  # fmt: skip
        tower = {**tower, **{key: size for key, size in sizes.items() if key in tower}}
    tied = language["tie_word_embeddings"]
    return AutoConfig.for_model(model_type, text_config=language, vision_config=tower, tie_word_embeddings=tied, **IDS)


def record(config: Any, tokens: int, height: int, width: int, taught: int, draw: random.Random) -> Row:
    """The example of a record of `tokens`, the last of them taught, that shows a picture of height x width patches."""
    seen, patch = height * width // 4, config.vision_config.patch_size
    ids = [START, *[PICTURE] * seen, END]
    ids += [draw.randrange(FIRST_WORD, WORDS) for _ in range(tokens - len(ids))]
    generator = torch.Generator().manual_seed(draw.randrange(2**31))
    return {
        "input_ids": torch.tensor(ids),
        "labels": torch.tensor([IGNORE] * (tokens - taught) + ids[tokens - taught :]),
        "position_ids": positions(ids, [((1, height, width), None)], [PICTURE], 2),
        "pixel_values": torch.randint(256, (4 * seen, 6 * patch**2), dtype=torch.uint8, generator=generator),
        "image_grid_thw": torch.tensor([[1, height, width]]),
        SCALES: torch.full((2, 2, 3), 127.5),
    }


def records(config: Any, tokens: int, count: int, taught: int, seed: int) -> list[Row]:
    """`count` records that fill a row of about `tokens`, most of them pictures: no two rows and no two records have one size."""
    draw, made = random.Random(seed), []
    for _ in range(count):
        length = tokens // count - draw.randrange(tokens // count // 16)
        side = int((4 * (length - taught // count) * 0.95) ** 0.5) // 2 * 2  # patches, if it were a square
        height = side - 2 * draw.randrange(1 + side // 8)
        made.append(record(config, length, height, side, taught // count, draw))
    return made


def floor_flops(config: Any, model: Any, rows: Sequence[Row]) -> float:
    """What the rows cannot do without, with a frozen base and tower: 2 FLOPs a weight and token forward, 2 back; taught tokens
    for the LM head, their own record for attention, 6 for weights of LoRA."""
    language, tower = config.text_config, config.vision_config
    width = getattr(tower, "embed_dim", tower.hidden_size)
    heads = language.num_attention_heads * (
        getattr(language, "head_dim", None) or language.hidden_size // language.num_attention_heads
    )
    whole = set(getattr(tower, "fullatt_block_indexes", range(tower.depth)))
    sizes = {"layers": 0, "lora_": 0, "merger": 0, "tower": 0}
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "pos_embed" not in name and ("visual" in name or ".layers." in name):
            part = (
                next(part for part in ("lora_", "merger", "tower") if part in name or part == "tower") if "visual" in name else None
            )
            sizes[part or ("lora_" if "lora_" in name else "layers")] += parameter.numel()
    total = 0.0
    for row in rows:
        tokens, patches = row["input_ids"].numel(), len(row.get("pixel_values", ()))
        bounds = row["cu_seq_lens_q"].tolist() if "cu_seq_lens_q" in row else [0, tokens]
        taught = int((row["labels"] != IGNORE).sum())
        total += tokens * (4 * sizes["layers"] + 6 * sizes["lora_"]) + 4 * taught * language.vocab_size * language.hidden_size
        if not patches:  # their features were kept
            continue
        total += 2 * patches * (sizes["tower"] + sizes["merger"] / 4)
        total += sum(6 * (end - start) ** 2 * heads for start, end in pairwise(bounds)) * language.num_hidden_layers
        for _, height, width_p in row["image_grid_thw"].tolist():
            own = height * width_p
            total += 4 * own * width * (own * len(whole) + 64 * (tower.depth - len(whole)))
    return total


def looked_at(run: Any, row: Row) -> Row:
    """The row as it is from the second epoch on: with features in place of pictures."""
    features = list[torch.Tensor]()
    vision_features(run.bare, row, False, lambda of: features.append(of.cpu()), run.accelerator.device)
    return with_features(row, features[0], run.bare.config.vision_config.spatial_merge_size)


@contextmanager
def lora_runs(model: Any, how: str) -> Iterator[None]:
    """Within it a model whose LoRA is "fused" keeps what its gates let through ("gate kept"), too, or runs all as "PEFT" has it."""
    if how != "fused":
        for layer in filter(is_gated, model.modules()):
            del layer.forward
    for layer in model.modules():
        if how == "PEFT" and type(layer) is FusedLora:
            layer.__class__ = Linear
            layer.cast_input_dtype_enabled = True
    try:
        with torch.autocast(
            next(model.parameters()).device.type, torch.bfloat16, enabled=how == "PEFT" and model.dtype == torch.bfloat16
        ):
            yield
    finally:
        fuse_lora(model)
