"""What a setting of config.py may be: its types, each with the words that say why a value is none. Imports nothing heavy."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, StrictBool, ValidationError


def _number(value: Any) -> Any:
    if isinstance(value, bool):  # which Python takes for 0 and 1
        raise ValueError("write a number")
    return value


def _area(value: int) -> int:
    if value < FOUR_TOKENS:  # a side in px or a number of tokens was meant, and no picture would be seen
        raise ValueError(f"it is an area, height x width in px: write at least {FOUR_TOKENS}, four tokens of 28 x 28 px")
    return value


def _step(value: float) -> float:
    if value > 1:  # AdamW moves every weight by about so much; from 1e38 on it ends in an OverflowError
        raise ValueError("write at most 1; 4.8e-4 is usual")
    return value


FOUR_TOKENS = 4 * 28 * 28
Number = Annotated[int, BeforeValidator(_number)]
Positive = Annotated[Number, Field(gt=0)]
Area = Annotated[Number, AfterValidator(_area)]
Count = Annotated[Number, Field(ge=0)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Step = Annotated[Rate, AfterValidator(_step)]
Share = Annotated[float, Field(ge=0, lt=1)]
# The forms of records that are told from what a meta-file holds; data/formats reads them.
Form = Literal["documented", "v1", "llava", "sharegpt", "messages", "openai", "prompt_completion", "query_response", "alpaca",
               "pairs", "columns"]  # fmt: skip
Thinking = Literal["off", "on", "template"]  # a thought before the answer; template: as the model's own chat template has it
BoxUnit = Literal["pixels", "unit", "thousand"]  # what the numbers of boxes are; pixels: of the picture as it is seen
MediaPosition = Literal["as_written", "first", "last", "both"]  # of media in their turn: before its text or behind it
# Qwen's own: what the bases were trained with, and what others draw who serve the merged model. Source: qwen_vl_utils.
VIDEO_FPS, VIDEO_MAX_FRAMES = 2.0, 768
Tower = Literal[
    "language", "experts", "vision", "merger"
]  # experts are the language model's, but trained only where they are named
Quantization = Literal["none", "nf4", "int8"]
# What evaluations go by: their loss, or a metric of evaluate/metrics.py, of answers.
Metric = Literal["loss", "exact", "relaxed", "anls", "f1", "cer", "wer", "choice", "class", "json", "json_valid", "mean_iou",
                 "iou_at_50", "ap_50"]  # fmt: skip
# Of a set's questions, in `eval`, `compare` and evaluations in training, unless told otherwise: how many are asked at a time,
# and how many tokens an answer has at most.
BATCH_SIZE, MAX_NEW_TOKENS = 8, 128


def _trackers(value: Any) -> Any:
    """`report_to: wandb` means `report_to: [wandb]`, and none means none."""
    return ([] if value == "none" else [value]) if isinstance(value, str) else value


Trackers = Annotated[list[Literal["wandb", "tensorboard", "swanlab", "mlflow"]], BeforeValidator(_trackers)]


class MixedFile(BaseModel):
    """One of several meta-files that are mixed: each of its records counts `weight` times."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: Path
    data_dir: Path | None = None
    weight: Rate = 1


def _meta(value: Any) -> Any:
    """A path, or a list of several, each of which may be a path alone; complained about as one thing."""
    if not isinstance(value, list):
        if not isinstance(value, str | Path):
            raise ValueError("it should be a path, a text, or a list of {file, data_dir, weight}")
        return Path(value)
    files = []
    for number, file in enumerate(value):
        try:
            files.append(MixedFile.model_validate({"file": file} if isinstance(file, str | Path) else file))
        except ValidationError as error:
            first = error.errors()[0]
            at, said = ".".join(map(str, [number, *first["loc"]])), first["msg"][0].lower() + first["msg"][1:]
            raise ValueError(f"write each of the list as {{file, data_dir, weight}}: of {at} {said}") from error
    if not files:
        raise ValueError("list at least one file")
    return files


Meta = Annotated[Path | list[MixedFile], PlainValidator(_meta)]


class Own(BaseModel):
    """What a tower of lora_on has of its own; `full`: it is trained itself, without LoRA."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rank: Positive | None = None
    alpha: Rate | None = None
    learning_rate: Step | None = None
    full: StrictBool = False


def _towers(value: Any) -> Any:
    """Names of towers, or an object of what each has of its own; complained about as one thing."""
    named = [value] if isinstance(value, str) else value
    if not named or not isinstance(named, list | dict) or any(tower not in get_args(Tower) for tower in named):
        towers = "list language, vision and merger, those to train, and experts of a mixture"
        raise ValueError(f"{towers}, or write {{language: {{rank: 16}}, vision: {{rank: 8}}}}")
    if isinstance(named, list):
        return named
    for tower, given in named.items():
        try:
            own = Own.model_validate(given or {})
        except ValidationError as error:
            first = error.errors()[0]
            at, said = ".".join(map(str, [tower, *first["loc"]])), first["msg"][0].lower() + first["msg"][1:]
            raise ValueError(f"write {{rank, alpha, learning_rate}} for each tower: of {at} {said}") from error
        if own.full and (tower != "merger" or own.rank or own.alpha):
            raise ValueError("write {full: true} for the merger only, without rank and alpha, which are LoRA's")
    if named.keys() == {"merger"} and own.full:
        raise ValueError("add a tower for LoRA: the merger alone makes no adapter")
    return {tower: given or {} for tower, given in named.items()}


LoraOn = Annotated[list[Tower] | dict[Tower, dict[str, Any]], PlainValidator(_towers)]


def _layers(value: Any) -> Any:
    """A regular expression, or names; complained about as one thing."""
    if isinstance(value, list) and value and all(isinstance(name, str) for name in value):
        return value
    try:
        return re.compile(value).pattern
    except (re.error, TypeError) as error:
        raise ValueError(f"write [q_proj, v_proj], or a regular expression of whole names ({error})") from error


def _start(value: Any) -> Any:
    if value is True or (isinstance(value, str) and re.fullmatch(r"pissa(_niter_[1-9]\d?)?", value)):
        return value
    raise ValueError("write true for a fresh start, pissa, or pissa_niter_16, which is much faster and nearly the same")


Layers = Annotated[str | list[str], PlainValidator(_layers)]


def _resume(value: Any) -> Any:
    if value is True or value is False or value == "weights":
        return value
    raise ValueError("write true, false, or weights")


Resume = Annotated[bool | Literal["weights"], PlainValidator(_resume)]
Start = Annotated[Literal[True] | str, PlainValidator(_start)]


def _checkpointing(value: Any) -> Any:
    if value != "auto" and not isinstance(value, bool):
        raise ValueError("write auto, true or false")
    return value


Checkpointing = Annotated[Literal["auto"] | bool, PlainValidator(_checkpointing)]


def rate_by_width(hidden_size: int) -> float:
    """The peak that LoRA with lora_alpha 32 learns best with, whatever its rank: a fit to Qwen models, of which wider ones want a
    lower one.

    Source: "LoRA Without Regret", Thinking Machines Lab, 2025: 5e-5 * 10 * (2000 / hidden_size) ** 0.0775.
    """
    return float(f"{5e-4 * (2000 / hidden_size) ** 0.0775:.2e}")
