"""In how many bits the base is held while LoRA trains beside it: which of its layers, what they take, and what does not go with it.

Those are attention and MLP of the language model, nearly all of its weights. The vision tower, the merger, the embeddings, the LM
head and the norms stay as they are: pictures are seen as they will be when the model answers.
"""

import re
from collections.abc import Iterator
from importlib.util import find_spec

from qwenvl_ft.config import Config
from qwenvl_ft.data.families import Family, family_of
from qwenvl_ft.errors import Problem
from qwenvl_ft.folders.model import read_config
from qwenvl_ft.values import Quantization

# nf4: half a byte; for 64 weights a scale of one byte, for 256 of these their own, a float32. int8: a scale for a whole row is
# left out, 4 bytes over as many weights as the layer has inputs.
BYTES = {"nf4": 0.5 + (1 + 4 / 256) / 64, "int8": 1.0}


def bytes_per_weight(quantization: Quantization, plain: float = 2) -> float:
    """What a weight of a layer that is quantized takes in memory; `plain`: what it takes where none is, 2 in bfloat16."""
    return BYTES.get(quantization, plain)


def is_quantized(family: Family, module: str) -> bool:
    """Whether a module of the base, by its whole name, is among the layers that are."""
    return bool(re.fullmatch(family.language, module))


def not_installed(where: str) -> Iterator[Problem]:
    """A problem where bitsandbytes, which comes with the extra quantization, is not there."""
    if not find_spec("bitsandbytes"):
        yield Problem(where, "bitsandbytes is not installed", "pip install bitsandbytes")


def quantization_problems(config: Config) -> Iterator[Problem]:
    """What keeps a run from having its base quantized, known without torch."""
    if config.quantization == "none":
        return
    where, base = f"quantization: {config.quantization}", read_config(config.model)
    yield from not_installed(where)
    if "quantization_config" in base:
        fix = "give the same model in its full precision, or set quantization: none"
        yield Problem(where, f"{config.model} is quantized already", fix)
    if family_of(config.model).experts:
        what = "the experts of a mixture are no linear layers, and would stay in 16 bits: nearly all there is"
        yield Problem(where, what, "set quantization: none")
