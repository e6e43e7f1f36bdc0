"""Tiny random models of each family, with the real Qwen tokenizer, from what is installed: no hub."""

import base64
import shutil
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    Qwen3VLProcessor,
)
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

QWEN3 = {
    "qwen3_vl": (Qwen3VLConfig, Qwen3VLForConditionalGeneration),
    "qwen3_vl_moe": (Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration),
    "qwen3_5": (Qwen3_5Config, Qwen3_5ForConditionalGeneration),
    "qwen3_5_moe": (Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration),
}
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CONTROL_TOKENS = [f"<|{name}|>" for name in (
    "endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start quad_end "
    "vision_start vision_end vision_pad image_pad video_pad"
).split()]  # fmt: skip


@cache
def real_tokenizer() -> Tokenizer:
    """Qwen's BPE from the ranks that dashscope ships; the merges are found by splitting each token by the ranks below it."""
    import dashscope

    ranks_file = Path(dashscope.__file__).parent / "resources" / "qwen.tiktoken"
    ranks = {base64.b64decode(piece): int(rank) for piece, rank in (line.split() for line in ranks_file.read_bytes().splitlines())}
    letters = _byte_letters()
    spelt = {piece: "".join(letters[byte] for byte in piece) for piece in ranks}
    merges = []
    for piece, rank in ranks.items():
        if len(piece) > 1:
            parts = [bytes([byte]) for byte in piece]
            while len(parts) > 2:
                best = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], rank))
                if ranks.get(parts[best] + parts[best + 1], rank) >= rank:
                    break
                parts[best : best + 2] = [parts[best] + parts[best + 1]]
            if len(parts) == 2:
                merges.append((spelt[parts[0]], spelt[parts[1]]))
    tokenizer = Tokenizer(models.BPE(vocab={spelt[piece]: rank for piece, rank in ranks.items()}, merges=merges))
    splits = [pre_tokenizers.Split(Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS])
    return tokenizer


def _byte_letters() -> dict[int, str]:
    """The letter that byte-level BPE writes for each byte, as GPT-2 set it."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + number) for number, byte in enumerate(others)}


def template_of(model_type: str) -> str:
    """The family's chat template: Qwen2-VL's from the project's tiny base, the others' from trl."""
    import trl

    if model_type == "qwen2_vl":
        return (Path(__file__).parent.parent / "data" / "tiny" / "chat_template.jinja").read_text()
    name = {"qwen2_5_vl": "qwen2_5_vl", "qwen3_vl": "qwen3_vl", "qwen3_5": "qwen3_5_nothink"}[model_type.removesuffix("_moe")]
    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()


def lighten(folder: Path) -> Path:
    """The folder, with the few tokens of data/tiny instead of Qwen's 151,000, which take a second to read."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(__file__).parent.parent / "data" / "tiny" / name, folder / name)
    return folder


def make_family(model_type: str, folder: Path, light: bool = False) -> Path:
    """Writes a random model of the family, its processor and the real tokenizer to `folder`; `light`: the one of data/tiny, whose
    few tokens make a run of seconds one of a second."""
    tokenizer = AutoTokenizer.from_pretrained(Path(__file__).parent.parent / "data" / "tiny") if light else Qwen2Tokenizer(
        tokenizer_object=real_tokenizer(), unk_token=None, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=CONTROL_TOKENS[1:],
    )  # fmt: skip
    token = tokenizer.convert_tokens_to_ids
    ids = {
        "image_token_id": token("<|image_pad|>"), "video_token_id": token("<|video_pad|>"),
        "vision_start_token_id": token("<|vision_start|>"), "vision_end_token_id": token("<|vision_end|>"),
    }  # fmt: skip
    text = {
        "vocab_size": 1024 if light else 151680, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 4096, "eos_token_id": token("<|im_end|>"),
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
    }  # fmt: skip
    size = {"shortest_edge": 4 * 28 * 28, "longest_edge": 64 * 28 * 28}
    torch.manual_seed(0)
    if model_type in ("qwen2_vl", "qwen2_5_vl"):
        text.pop("head_dim")
        images, videos = Qwen2VLImageProcessor(size=size), Qwen2VLVideoProcessor(size=size)
        if model_type == "qwen2_vl":
            vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
            model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, **ids))
            processor = Qwen2VLProcessor(images, tokenizer, videos, chat_template=template_of(model_type))
        else:
            vision = {"depth": 2, "hidden_size": 32, "out_hidden_size": 32, "num_heads": 2, "intermediate_size": 48,
                      "fullatt_block_indexes": [1]}  # fmt: skip
            model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids))
            processor = Qwen2_5_VLProcessor(images, tokenizer, videos, chat_template=template_of(model_type))
    else:
        size = {"shortest_edge": 4 * 32 * 32, "longest_edge": 64 * 32 * 32}
        images = Qwen2VLImageProcessor(size=size, patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3)
        vision = {"depth": 2, "hidden_size": 32, "out_hidden_size": 32, "num_heads": 2, "intermediate_size": 48,
                  "num_position_embeddings": 64}  # fmt: skip
        if model_type.endswith("_moe"):
            text |= {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24}
        if model_type.startswith("qwen3_vl"):
            vision["deepstack_visual_indexes"] = [0]
        else:
            text |= {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
                     "layer_types": ["linear_attention", "full_attention"]}  # fmt: skip
        of_config, of_model = QWEN3[model_type]
        model = of_model(of_config(text_config=text, vision_config=vision, **ids))
        processor = Qwen3VLProcessor(images, tokenizer, Qwen3VLVideoProcessor(), chat_template=template_of(model_type))
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:  # larger than the library's start, so that a wrong mask or position shows
            torch.nn.init.normal_(parameter, std=0.2 if "embed" not in name else 0.5)
    model.save_pretrained(folder)
    if model_type == "qwen3_vl_moe":  # as released files have them, and transformers reads both
        weights = load_file(folder / "model.safetensors")
        turned = {name: tensor.mT.contiguous() if ".experts." in name else tensor for name, tensor in weights.items()}
        save_file(turned, folder / "model.safetensors", {"format": "pt"})
    processor.save_pretrained(folder)
    return folder
