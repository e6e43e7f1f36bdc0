"""Every setting of a training run, read from YAML 1.2 with all complaints at once. Imports nothing heavy.

The keys have the names that Hugging Face's TrainingArguments and PEFT use where they mean the same. configs/lora.yaml says
what each does. An unknown key is an error that names the right one; a peer's key is answered with ours.
"""

from collections.abc import Sequence
from difflib import get_close_matches
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent, CollectionStartEvent, ScalarEvent

from qwenvl_ft.errors import Problem, UserError


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
        raise ValueError("write at most 1; 1e-4 is usual")
    return value


FOUR_TOKENS = 4 * 28 * 28
Number = Annotated[int, BeforeValidator(_number)]
Positive = Annotated[Number, Field(gt=0)]
Area = Annotated[Number, AfterValidator(_area)]
Count = Annotated[Number, Field(ge=0)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Step = Annotated[Rate, AfterValidator(_step)]
Share = Annotated[float, Field(ge=0, lt=1)]
Tower = Literal["language", "vision", "merger"]


class Config(BaseModel):
    """The resolved settings. Paths are as the user wrote them, relative to the current folder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Path
    train_meta_file: Path
    train_data_dir: Path
    output_dir: Path
    eval_meta_file: Path | None = None
    eval_data_dir: Path | None = None

    min_pixels: Area | None = None
    max_pixels: Annotated[Area, Field(validate_default=True)] = 1280 * 28 * 28
    row_tokens: Positive = 4096
    thinking: Literal["off", "on", "template"] = "off"
    on_bad_record: Literal["error", "skip"] = "error"
    dataloader_num_workers: Count = 2

    lora_on: Annotated[list[Tower], Field(min_length=1)] = ["language"]
    lora_rank: Positive = 16
    lora_alpha: Rate = 32
    lora_dropout: Share = 0.0

    num_train_epochs: Positive = 3
    max_steps: Positive | None = None
    rows_per_step: Positive = 8
    learning_rate: Step = 1e-4
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: Share = 0.03
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    max_grad_norm: Rate = 1.0
    seed: Number = 42

    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    gradient_checkpointing: StrictBool = True

    logging_steps: Positive = 10
    eval_steps: Positive | None = None
    save_steps: Positive = 100
    save_total_limit: Positive = 3
    resume: StrictBool = False
    report_to: list[Literal["wandb", "tensorboard"]] = []
    run_name: str | None = None

    @field_validator("max_pixels")
    @classmethod
    def bounds_are_in_order(cls, value: int, info: ValidationInfo) -> int:
        """A picture cannot be larger than min_pixels and smaller than max_pixels if these cross."""
        if (info.data.get("min_pixels") or 0) > value:
            raise ValueError(f"set it to at least min_pixels, {info.data['min_pixels']}")
        return value

    @field_validator("lora_on", "report_to", mode="before")
    @classmethod
    def one_is_a_list(cls, value: Any) -> Any:
        """`report_to: wandb` means `report_to: [wandb]`, and none means none."""
        if isinstance(value, str):
            return [] if value == "none" else [value]
        return value

    @field_validator("thinking", mode="before")
    @classmethod
    def off_and_on_are_words(cls, value: Any) -> Any:
        """`thinking: true`, as peers' enable_thinking has it, means on."""
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


# What ruamel.yaml raises: also what its constructors stumble over, such as `!!bool x`, `!!int ""` and a list as a key.
NOT_YAML = (YAMLError, ValueError, RecursionError, LookupError, AttributeError, TypeError)
# What peers call it -> what to write here.
PEERS = {
    "model_name_or_path": "model", "model_id": "model", "model_path": "model", "base_model": "model", "pretrained_model": "model",
    "dataset": "train_meta_file", "data_path": "train_meta_file", "train_file": "train_meta_file", "datasets": "train_meta_file",
    "dataset_dir": "train_data_dir", "image_folder": "train_data_dir", "media_dir": "train_data_dir",
    "image_root": "train_data_dir",
    "val_size": "eval_meta_file", "eval_dataset": "eval_meta_file", "val_dataset": "eval_meta_file", "eval_path": "eval_meta_file",
    "image_max_pixels": "max_pixels", "image_min_pixels": "min_pixels", "max_image_pixels": "max_pixels",
    "image_resolution": "max_pixels",
    "cutoff_len": "row_tokens", "max_length": "row_tokens", "max_seq_length": "row_tokens", "model_max_length": "row_tokens",
    "sequence_len": "row_tokens", "max_seq_len": "row_tokens", "packing_length": "row_tokens",
    "enable_thinking": "thinking",
    "strict": "on_bad_record", "on_bad_sample": "on_bad_record",
    "preprocessing_num_workers": "dataloader_num_workers", "dataset_num_proc": "dataloader_num_workers",
    "lora_r": "lora_rank", "r": "lora_rank", "rank": "lora_rank", "alpha": "lora_alpha",
    "lora_target": "lora_on", "target_modules": "lora_on", "lora_target_modules": "lora_on", "freeze_vit": "lora_on",
    "freeze_vision_tower": "lora_on", "freeze_llm": "lora_on", "freeze_aligner": "lora_on", "freeze_merger": "lora_on",
    "freeze_multi_modal_projector": "lora_on", "vision_lora": "lora_on", "tune_mm_vision": "lora_on", "tune_mm_llm": "lora_on",
    "tune_mm_mlp": "lora_on", "freeze_language_model": "lora_on",
    "per_device_train_batch_size": "rows_per_step", "gradient_accumulation_steps": "rows_per_step", "batch_size": "rows_per_step",
    "micro_batch_size": "rows_per_step", "train_batch_size": "rows_per_step", "global_batch_size": "rows_per_step",
    "epochs": "num_train_epochs", "num_epochs": "num_train_epochs", "train_iters": "max_steps",
    "lr": "learning_rate", "lr_scheduler": "lr_scheduler_type", "warmup_steps": "warmup_ratio",
    "gradient_clipping": "max_grad_norm",
    "data_seed": "seed", "bf16": "dtype", "fp16": "dtype", "torch_dtype": "dtype", "mixed_precision": "dtype",
    "flash_attn": "attn_implementation", "attn_impl": "attn_implementation", "use_flash_attention": "attn_implementation",
    "disable_flash_attn2": "attn_implementation", "flash_attention": "attn_implementation",
    "disable_gradient_checkpointing": "gradient_checkpointing",
    "evaluation_strategy": "eval_steps", "eval_strategy": "eval_steps", "save_strategy": "save_steps",
    "resume_from_checkpoint": "resume", "overwrite_output_dir": "resume", "use_wandb": "report_to", "wandb_project": "report_to",
}  # fmt: skip
# What has to be known besides the name, by our key.
REMARKS = {
    "lora_on": "[language] to keep the vision tower and the merger frozen, [language, vision, merger] to train them, too",
    "rows_per_step": "another number, the rows of one step over all processes together",
    "row_tokens": "records share rows of so many tokens, and a longer one is reported, never cut",
    "eval_meta_file": "a file of held-out records; none are split off",
}
FOUR_BIT = (
    "training in 4 or 8 bits is not offered; for less memory lower max_pixels and row_tokens, with gradient_checkpointing: true"
)
NOT_NEEDED = {
    "load_in_4bit": FOUR_BIT, "load_in_8bit": FOUR_BIT, "quantization_bit": FOUR_BIT, "quant_bits": FOUR_BIT, "bits": FOUR_BIT,
    "use_dora": "DoRA is not offered; for more than LoRA learns raise lora_rank",
    "finetuning_type": "this tool trains LoRA and nothing else", "train_type": "this tool trains LoRA and nothing else",
    "tuner_type": "this tool trains LoRA and nothing else", "lora_enable": "this tool trains LoRA and nothing else",
    "stage": "this tool does supervised fine-tuning and nothing else", "do_train": "`qwenvl-ft train` trains",
    "template": "the model's own chat template is used", "model_type": "it is read from the model's config.json",
    "packing": "records always share rows", "neat_packing": "records always share rows", "padding_free": "rows are never padded",
    "group_by_length": "rows are never padded", "remove_unused_columns": "there are no columns",
    "deepspeed": "start with `accelerate launch --config_file configs/zero2.yaml train.py ...`",
    "fsdp": "start with `accelerate launch --config_file configs/zero3.yaml train.py ...`",
    "train_on_prompt": "only assistant turns are taught", "train_on_inputs": "only assistant turns are taught",
    "assistant_only_loss": "only assistant turns are taught", "ddp_find_unused_parameters": "it is set where it is needed",
    "trust_remote_code": "no code of a model is ever run",
}  # fmt: skip


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """The settings of a YAML file, `key=value` overrides on top. Raises UserError with every problem of both."""
    path = Path(path)
    values, lines = read_yaml(path)
    problems = []
    for whole, group in groupby(overrides, lambda word: "=" in word and word != "="):
        words = list(group)
        if not whole:  # learning_rate 1e-4 is one mistake, not two
            pair = [word for word in words if word != "="]
            fix = f"write {pair[0].lstrip('-').replace('-', '_')}={pair[1]}" if len(pair) == 2 else "write key=value"
            if pair[0].endswith((".yaml", ".yml")):
                fix = f"write --config {pair[0]}"
            problems.append(Problem(" ".join(words), "is not an override", fix))
            continue
        for override in words:
            key, _, text = override.removeprefix("--").partition("=")
            if alias := _alias(text):
                problems.append(Problem(override, alias[0], "write the value out"))
                continue
            try:
                values[key] = YAML(typ="safe").load(text)
            except NOT_YAML:
                problems.append(Problem(override, "its value is not YAML", f"""quote it: '{key}="..."'"""))
                continue
            lines[key] = f"command line, {override}"
    for key in [key for key in values if key not in Config.model_fields]:
        problems.append(Problem(lines[key], f"unknown key {key}", _right_key(key)))
        del values[key]
    try:
        config = Config(**values)
    except ValidationError as error:
        problems += [_problem(detail, path, lines) for detail in error.errors()]
    if problems:
        raise UserError(*problems)
    return config


def _alias(text: str) -> tuple[str, int, int] | None:
    """(what, line, column) of the first alias of a list or an object, which no setting needs: nine that hold each other nine
    times never come to an end, and one may hold itself. None for what is not YAML, too: loading it says why.
    """
    collections: set[str | None] = set()
    try:
        for event in YAML(typ="safe", pure=True).parse(text):
            if isinstance(event, AliasEvent) and event.anchor in collections:
                mark = event.start_mark
                return f"the alias *{event.anchor} stands for a list or an object", mark.line + 1, mark.column + 1
            if isinstance(event, CollectionStartEvent):
                collections.add(event.anchor)
            elif isinstance(event, ScalarEvent):  # an anchor may be given again
                collections.discard(event.anchor)
    except (YAMLError, ValueError):
        return None
    return None


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The values of a file of settings and the place of each key, as file:line. Raises UserError."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        fix = "give yours with --config FILE; `qwenvl-ft init` writes a lora.yaml that explains every key"
        raise UserError(Problem(str(path), "is not there", fix)) from None
    except (OSError, UnicodeDecodeError):
        raise UserError(Problem(str(path), "cannot be read as a text file", "give a config such as configs/lora.yaml")) from None
    if alias := _alias(text):
        what, line, column = alias
        raise UserError(Problem(f"{path}:{line}:{column}", what, "write the value out"))
    try:
        marked = YAML(typ="rt").load(text)
        plain = YAML(typ="safe").load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        what = (error.problem or "is not YAML").split("\n")[0]
        raise UserError(Problem(place, what, "mend the file at this line and column")) from None
    except NOT_YAML as error:
        raise UserError(Problem(str(path), f"is not YAML: {(str(error).splitlines() or ['?'])[0]}", "mend the file")) from None
    if not isinstance(plain, dict):
        raise UserError(Problem(str(path), "holds no settings", "write key: value lines, as configs/lora.yaml does"))
    places = marked.lc.data or {}  # without the keys that come through a YAML merge
    lines = {str(key): f"{path}:{places[key][0] + 1}" if key in places else str(path) for key in plain}
    return {str(key): value for key, value in plain.items()}, lines


def _right_key(key: str) -> str:
    word = key.lower().replace("-", "_")
    if ours := PEERS.get(word):
        return f"write {ours}: {REMARKS[ours]}" if ours in REMARKS else f"write {ours} (see configs/lora.yaml)"
    if word in NOT_NEEDED:
        return f"delete it: {NOT_NEEDED[word]}"
    close = get_close_matches(word, [*Config.model_fields, *PEERS], 1, cutoff=0.6)
    return f"did you mean {PEERS.get(close[0], close[0])}?" if close else "delete it; configs/lora.yaml lists every key"


def _problem(detail: Any, path: Path, lines: dict[str, str]) -> Problem:
    key = str(detail["loc"][0])
    if detail["type"] == "missing":
        return Problem(str(path), f"has no key {key}", f"write {key}: ...")
    if detail["input"] is None:
        return Problem(lines.get(key, str(path)), f"{key} is empty", "give it a value")
    shown = str(detail["input"])[:200] if not isinstance(detail["input"], dict) else "an object"
    fix = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "path_type":
        fix = "it should be a path, a text"
    fix = fix[0].lower() + fix[1:]
    return Problem(lines.get(key, f"{path}, the default"), f"{key} is {shown}", fix.replace("input should be", "it should be"))
