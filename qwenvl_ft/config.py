"""Every setting of a training run, read from YAML 1.2 with all complaints at once. Imports nothing heavy.

The keys have the names that Hugging Face's TrainingArguments and PEFT use where they mean the same. configs/lora.yaml says
what each does. An unknown key is an error that names the right one; a peer's key is answered with ours.
"""

import json
from collections.abc import Sequence
from difflib import get_close_matches
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationError, ValidationInfo, field_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent, CollectionStartEvent, ScalarEvent

from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.values import (
    MAX_NEW_TOKENS,
    VIDEO_FPS,
    VIDEO_MAX_FRAMES,
    Area,
    BoxUnit,
    Checkpointing,
    Count,
    Form,
    Layers,
    LoraOn,
    MediaPosition,
    Meta,
    Metric,
    Number,
    Own,
    Positive,
    Quantization,
    Rate,
    Resume,
    Share,
    Start,
    Step,
    Thinking,
    Tower,
    Trackers,
    rate_by_width,
)


class Config(BaseModel):
    """The resolved settings. Paths are as the user wrote them, relative to the current folder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Path
    train_meta_file: Meta
    train_data_dir: Path | None = None
    output_dir: Path
    eval_meta_file: Meta | None = None
    eval_data_dir: Path | None = None

    min_pixels: Area | None = None
    max_pixels: Annotated[Area, Field(validate_default=True)] = 1280 * 28 * 28
    video_fps: Annotated[Rate, Field(le=120)] = VIDEO_FPS
    video_max_frames: Annotated[Number, Field(ge=2)] = VIDEO_MAX_FRAMES
    video_max_pixels: Area = 768 * 28 * 28
    row_tokens: Positive = 4096
    share_prefix: Literal["auto", "off"] = "auto"
    cache_features: Literal["auto", "off"] = "auto"
    thinking: Thinking = "off"
    boxes: BoxUnit | None = None
    media_position: MediaPosition = "as_written"
    fetch_media: StrictBool = False
    format: Form | None = None
    columns: dict[str, str | None] = {}
    on_bad_record: Literal["error", "skip"] = "error"
    dataloader_num_workers: Count = 2

    lora_on: LoraOn = ["language"]
    lora_targets: Layers | None = None
    lora_rank: Positive = 16
    lora_alpha: Rate = 32
    lora_dropout: Share = 0.0
    use_rslora: StrictBool = False
    use_dora: StrictBool = False
    loraplus_lr_ratio: Annotated[Rate, Field(ge=1)] | None = None
    init_lora_weights: Start = True
    init_adapter: Path | None = None

    num_train_epochs: Positive = 3
    max_steps: Positive | None = None
    rows_per_step: Positive = 8
    learning_rate: Step = 4.8e-4
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: Share = 0.03
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    max_grad_norm: Rate = 1.0
    seed: Number = 42

    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    quantization: Quantization = "none"
    attn_implementation: Literal["auto", "varlen", "sdpa", "eager", "flash_attention_2"] = "auto"
    gradient_checkpointing: Checkpointing = "auto"
    fit: Annotated[Rate, Field(gt=1)] | None = None
    shard_base: StrictBool = False
    ddp_timeout: Positive = 600

    logging_steps: Positive = 10
    eval_steps: Positive | None = None
    eval_metric: Metric = "loss"
    eval_samples: Positive = 200
    eval_max_new_tokens: Positive = MAX_NEW_TOKENS
    save_steps: Positive = 100
    save_total_limit: Positive = 3
    keep_best: StrictBool = False
    early_stopping_patience: Positive | None = None
    resume: Resume = False
    report_to: Trackers = []
    run_name: str | None = None

    @field_validator("max_pixels")
    @classmethod
    def bounds_are_in_order(cls, value: int, info: ValidationInfo) -> int:
        """A picture cannot be larger than min_pixels and smaller than max_pixels if these cross."""
        if (info.data.get("min_pixels") or 0) > value:
            raise ValueError(f"set it to at least min_pixels, {info.data['min_pixels']}")
        return value

    @property
    def held_out_dir(self) -> Path | None:
        """Where the pictures of evaluation are: those of training, where nothing else is said."""
        return self.eval_data_dir or self.train_data_dir

    @property
    def own(self) -> dict[Tower, Own]:
        """What the towers have of their own, where lora_on is an object."""
        return {tower: Own(**given) for tower, given in self.lora_on.items()} if isinstance(self.lora_on, dict) else {}

    @field_validator("init_lora_weights")
    @classmethod
    def pissa_is_no_dora(cls, value: Literal[True] | str, info: ValidationInfo) -> Literal[True] | str:
        """What DoRA makes of the base without its largest values is no adapter of the base with them."""
        if value is not True and info.data.get("use_dora"):
            raise ValueError("choose one of PiSSA and use_dora")
        return value

    @field_validator("quantization")
    @classmethod
    def pissa_is_not_quantized(cls, value: Quantization, info: ValidationInfo) -> Quantization:
        """What PiSSA leaves of a weight is rounded otherwise than the weight: its adapter would belong to no base that there is."""
        if value != "none" and info.data.get("init_lora_weights", True) is not True:
            raise ValueError("choose one of quantization and PiSSA")
        return value

    @field_validator("lora_dropout", "use_dora", "init_lora_weights")
    @classmethod
    def experts_are_plain(cls, value: Any, info: ValidationInfo) -> Any:
        """PEFT's LoRA on a fused tensor has no input to drop, no rows to measure, and no singular values."""
        if "experts" in info.data.get("lora_on", ()) and (value is not True if info.field_name == "init_lora_weights" else value):
            raise ValueError("leave it at its default, or experts out of lora_on: PEFT trains them with plain LoRA only")
        return value

    @field_validator("init_adapter")
    @classmethod
    def one_start(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        """PiSSA is a start, too."""
        if value and info.data.get("init_lora_weights") is not True:
            raise ValueError("choose one of init_adapter and init_lora_weights: pissa")
        return value

    @field_validator("eval_metric")
    @classmethod
    def there_are_questions(cls, value: Metric, info: ValidationInfo) -> Metric:
        """Those of the evaluation are asked."""
        if value != "loss" and not info.data.get("eval_meta_file"):
            raise ValueError("set eval_meta_file, whose questions are asked")
        return value

    @field_validator("keep_best", "early_stopping_patience")
    @classmethod
    def there_are_evaluations(cls, value: int | None, info: ValidationInfo) -> int | None:
        """One at the end says of no step that it is the best."""
        if value and not (info.data.get("eval_meta_file") and info.data.get("eval_steps")):
            raise ValueError("set eval_meta_file and eval_steps, which it goes by")
        return value

    @field_validator("learning_rate", mode="before")
    @classmethod
    def auto_is_by_width(cls, value: Any, info: ValidationInfo) -> Any:
        """From here on it is a number, also in the run's own config.yaml."""
        if value != "auto":
            return value
        try:
            settings = json.loads((info.data["model"] / "config.json").read_text(encoding="utf-8"))
            return rate_by_width((settings.get("text_config") or settings)["hidden_size"])
        except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
            raise ValueError("set a number: auto goes by the hidden_size in the model's config.json, which is not there") from error

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
    "lora_target": "lora_targets", "target_modules": "lora_targets", "lora_target_modules": "lora_targets", "freeze_vit": "lora_on",
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
    "resume_from_checkpoint": "resume", "auto_resume_from_checkpoints": "resume", "ckpt_dir": "resume",
    "output_directory": "output_dir", "wandb_name": "run_name", "wandb_run_name": "run_name", "logging_interval": "logging_steps",
    "val_set_size": "eval_meta_file", "split_dataset_ratio": "eval_meta_file", "eval_file": "eval_meta_file",
    "dataset_use": "train_meta_file", "max_model_len": "row_tokens", "max_packed_sequence_len": "row_tokens",
    "peft_use_dora": "use_dora", "peft_use_rslora": "use_rslora", "init_weights": "init_lora_weights",
    "load_best_model_at_end": "keep_best", "early_stopping_steps": "early_stopping_patience",
    "metric_for_best_model": "eval_metric", "lorap_lr_ratio": "loraplus_lr_ratio",
    "adapter_name_or_path": "init_adapter", "adapters": "init_adapter", "adapter": "init_adapter", "lora_model_dir": "init_adapter",
    "lora_weight_path": "init_adapter", "resume_only_model": "resume", "pissa_init": "init_lora_weights",
    "pissa_iter": "init_lora_weights", "target_parameters": "lora_on", "lora_target_parameters": "lora_on",
    "load_in_4bit": "quantization", "load_in_8bit": "quantization", "quantization_bit": "quantization", "bits": "quantization",
    "quantization_method": "quantization", "quant_method": "quantization", "quant_bits": "quantization",
    "bnb_4bit_quant_type": "quantization", "quant_type": "quantization",
    "lora_target_linear": "lora_targets", "target_regex": "lora_targets", "vision_tower": "lora_on", "tune_merger": "lora_on",
    "xformers_attention": "attn_implementation", "sdp_attention": "attn_implementation",
    "formatting": "format", "dataset_type": "format", "field_messages": "columns", "field_instruction": "columns",
    "video_maxlen": "video_max_frames", "fps_max_frames": "video_max_frames", "fps": "video_fps",
    "video_max_token_num": "video_max_pixels", "fsdp": "shard_base", "fsdp_config": "shard_base",
    "saves_per_epoch": "save_steps", "evals_per_epoch": "eval_steps", "use_wandb": "report_to", "wandb_project": "report_to",
    "use_swanlab": "report_to", "use_mlflow": "report_to",
}  # fmt: skip
CLOSE = 0.85  # of two keys that are one misspelt: lower, and a key of another meaning is near enough
# What has to be known besides the name, by our key.
REMARKS = {
    "lora_on": "[language] to keep the vision tower and the merger frozen, [language, vision, merger] to train them, too; "
    "experts, where there are, are named as well",
    "lora_targets": "[q_proj, v_proj], names of linear layers, or a regular expression; lora_on says in which towers",
    "init_lora_weights": "pissa, or pissa_niter_16",
    "rows_per_step": "another number, the rows of one step over all processes together",
    "row_tokens": "records share rows of so many tokens, and a longer one is reported, never cut",
    "eval_meta_file": "a file of held-out records; none are split off",
    "warmup_ratio": "a share of the run, not a number of steps",
    "learning_rate": "a number, or auto: by the width of the model",
    "gradient_checkpointing": "auto recomputes only what does not fit into memory, true everything, false nothing",
    "format": "the name of a form: documented, llava, sharegpt, messages ...; without it each record says so itself",
    "columns": "our word and the key that your records have for it: {question: query, answer: label}",
    "resume": "true goes on from the newest whole checkpoint in output_dir, weights takes its adapter alone",
    "eval_metric": "exact, relaxed, cer ...: each evaluation answers eval_samples questions, too, and goes by their score",
    "keep_best": "true keeps the checkpoint that is best by eval_metric, and names it in the results",
    "early_stopping_patience": "a number of evaluations that are no better by eval_metric",
    "init_adapter": "the folder of an adapter to train on from",
    "shard_base": "true shares the frozen base out over the processes, by FSDP2",
    "quantization": "nf4 for 4 bits or int8 for 8, by bitsandbytes; none leaves the base as it is",
}
BITS = "quantization: nf4 quantizes its scales, too, and multiplies in dtype, both by bitsandbytes"
LORA_ONLY = "this tool trains LoRA, and the merger in full, and nothing else"
NO_HUB = "training uploads nothing; `qwenvl-ft export --push modelscope:ORG/NAME` (or hf:) uploads the merged model"
OWN_RATES = "write it into lora_on: {language: {}, vision: {learning_rate: 2e-5}, merger: {learning_rate: 2e-5}}"
ANSWERS_ONLY = 'only assistant turns are taught, but for those with "loss": false in the meta-file'
# What is not offered, or is so without a key: the keys of peers, and what to know in their place.
NOT_NEEDED = {key: why for why, keys in {
    BITS:
        "double_quant double_quantization bnb_4bit_use_double_quant bnb_4bit_compute_dtype use_bnb_nested_quant torchao "
        "bnb_4bit_quant_storage",
    "what is saved of a run with init_lora_weights: pissa is plain LoRA already": "pissa_convert",
    "A and B are trained with AdamW, without a bias; use_rslora, use_dora, loraplus_lr_ratio and init_lora_weights vary that":
        "loraplus_lr_embedding lora_bias bias use_galore use_badam use_apollo lora_dtype",
    LORA_ONLY:
        "finetuning_type train_type tuner_type lora_enable use_peft use_lora tuner_backend task_type "
        "freeze_trainable_layers freeze_trainable_modules unfreeze_topk_llm unfreeze_topk_vision",
    "of whole modules only the merger is trained: lora_on: {language: {}, merger: {full: true}}":
        "modules_to_save lora_modules_to_save additional_target",
    "this tool does supervised fine-tuning and nothing else":
        "stage rlhf_type pref_beta pref_loss beta ref_model reward_model rl loss_type",
    "`qwenvl-ft train` trains": "do_train",
    "`qwenvl-ft eval` scores answers, and so does training with eval_metric":
        "do_eval do_predict predict_with_generate compute_accuracy max_new_tokens temperature top_p top_k num_beams",
    "init_adapter is trained on as it is, and resume goes on with the one of output_dir": "create_new_adapter",
    "a run is never overwritten: name a new output_dir, or delete the old one": "overwrite_output_dir",
    "every record is used; for a try write a smaller meta-file, or set max_steps":
        "max_samples max_train_samples max_eval_samples",
    "meta-files are always read in little memory": "streaming buffer_size",
    "train_meta_file takes a list of {file, data_dir, weight}": "interleave_probs mix_strategy",
    "write train_meta_file: hf:ORG/NAME#train, or another split behind the #":
        "dataset_config dataset_name dataset_train_split dataset_test_split",
    "the meta-file is read as it stands":
        "overwrite_cache tokenized_path dataset_prepared_path cache_dir dataset_text_field dataset_kwargs lazy_preprocess "
        "lazy_tokenize skip_prepare_dataset load_from_cache_file",
    "a checkpoint holds the adapter and all that resume needs; save_total_limit says how many are kept":
        "save_only_model save_safetensors save_on_each_node save_first_step create_checkpoint_symlink",
    NO_HUB:
        "push_to_hub hub_model_id hub_strategy hub_token hub_private_repo hub_always_push hub_revision use_hf",
    "what is logged lies in output_dir": "logging_dir add_version",
    "metrics.jsonl in output_dir has the loss of every step":
        "plot_loss logging_first_step logging_strategy log_level disable_tqdm include_num_input_tokens_seen "
        "include_tokens_per_second",
    "its own environment variables say that (WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE); run_name names the run":
        "wandb_entity wandb_run_id wandb_log_model wandb_watch",
    "its own environment variables say that (SWANLAB_PROJ_NAME, SWANLAB_MODE)": "swanlab_project",
    "wandb, tensorboard, swanlab and mlflow are reported to": "use_comet",
    OWN_RATES:
        "vision_lr vit_lr merger_lr projector_lr aligner_lr mm_projector_lr vision_tower_lr",
    "the embeddings are not trained": "embedding_learning_rate",
    "it is AdamW with its usual constants":
        "optim optimizer optim_args adam_beta1 adam_beta2 adam_epsilon optim_target_modules",
    "the rate ends at zero, or stays with lr_scheduler_type: constant":
        "min_lr min_lr_ratio cosine_min_lr_ratio lr_scheduler_kwargs",
    "the loss is the plain one, a mean over the taught tokens":
        "label_smoothing_factor neftune_noise_alpha loss_scale",
    "a metric knows which way is better": "greater_is_better",
    "a row of evaluation is one of training":
        "per_device_eval_batch_size eval_batch_size eval_accumulation_steps bf16_full_eval",
    "the model's own chat template is used":
        "template chat_template chat_template_path use_chat_template tool_format agent_template response_prefix "
        "special_tokens eos_token pad_token",
    "a record's first turn may be from system":
        "default_system system system_prompt",
    "it is read from the model's config.json":
        "model_type tokenizer_type processor_type base_model_config is_multimodal",
    "records always share rows":
        "packing neat_packing sample_packing eval_sample_packing eval_packing packing_strategy data_packing "
        "data_flatten",
    "rows are never padded":
        "padding_free group_by_length pad_to_sequence_len pad_to_multiple_of length_column_name",
    "a record is never cut: one that is longer than row_tokens is reported":
        "truncation_strategy truncation_mode",
    "a column that is not read is a problem; columns: {NAME: null} leaves it out": "remove_unused_columns",
    "start with `accelerate launch --config_file configs/zero2.yaml train.py ...`":
        "deepspeed deepspeed_config zero_stage",
    "accelerate's launcher says that: `accelerate launch --config_file configs/ddp.yaml train.py ...`":
        "local_rank ddp_backend use_cpu nproc_per_node",
    ANSWERS_ONLY:
        "train_on_prompt train_on_inputs assistant_only_loss completion_only_loss mask_history roles_to_train "
        "ignore_pad_token_for_loss",
    "it is set where it is needed":
        "ddp_find_unused_parameters use_reentrant_gc gradient_checkpointing_kwargs use_cache",
    "every run draws the same from the same seed":
        "full_determinism dataset_shuffle train_dataloader_shuffle val_dataset_shuffle shuffle_dataset",
    "the last rows of an epoch are trained on, too": "dataloader_drop_last",
    "dataloader_num_workers is the only setting of the workers":
        "dataloader_pin_memory dataloader_prefetch_factor dataloader_persistent_workers",
    "no kernels are exchanged; attn_implementation is the choice there is":
        "use_liger_kernel enable_liger_kernel use_liger use_unsloth shift_attn torch_compile lora_qkv_kernel "
        "lora_mlp_kernel lora_o_kernel tf32",
    "a long record wants more memory here: nothing is shared out along it":
        "sequence_parallel_size context_parallel_size sequence_parallel_degree rope_scaling",
    "for less memory set gradient_checkpointing: true, and lower max_pixels and row_tokens":
        "activation_offloading auto_find_batch_size",
    "a short video is drawn whole, 4 frames at least; one of its own size says so in its record":
        "video_min_frames video_min_pixels video_resized_width video_resized_height nframes",
    "boxes are written as the model's family writes them; the key boxes says what the numbers of the meta-file are": "norm_bbox",
    "sound is not trained on": "audio_sampling_rate",
    "pictures keep their shape; min_pixels and max_pixels bound their area":
        "image_resized_width image_resized_height",
    "no code of a model is ever run": "trust_remote_code plugins",
}.items() for key in keys.split()}  # fmt: skip


def load_config(path: Path | str | None, overrides: Sequence[str] = (), job: Sequence[str] = ()) -> Config:
    """The settings of a YAML file, on top of them those of a `job`, and then `overrides`, both as key=value.

    A job may have all of them, and no file. Raises UserError with every problem of all three.
    """
    place = Path(path or "PAI job")
    values, lines = read_yaml(place) if path else ({}, {})
    problems = []
    for by, given in (("PAI job", job), ("command line", overrides)):
        for whole, group in groupby(given, lambda word: "=" in word and word != "="):
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
                lines[key] = f"{by}, {override}"
    for key in [key for key in values if key not in Config.model_fields]:
        problems.append(Problem(lines[key], f"unknown key {key}", _right_key(key)))
        del values[key]
    # What Python, and with it PAI's hyperparameters, call null.
    values |= {key: None for key in values if values[key] == "None" and Config.model_fields[key].default is None}
    try:
        config = Config(**values)
    except ValidationError as error:
        problems += [_problem(detail, place, lines) for detail in error.errors()]
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
    close = next(iter(get_close_matches(word, [*Config.model_fields, *PEERS, *NOT_NEEDED], 1, cutoff=CLOSE)), "")
    if close in NOT_NEEDED:
        return f"delete it, if {close} is meant: {NOT_NEEDED[close]}"
    return f"did you mean {PEERS.get(close, close)}?" if close else "delete it; configs/lora.yaml lists every key"


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
