"""What there is before a run's first step: the processor, the model with its adapter, the optimizer, and all of it as a Run."""

import json
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from transformers import AutoProcessor

from qwenvl_ft.config import Config
from qwenvl_ft.console import print_line
from qwenvl_ft.data.families import family_of
from qwenvl_ft.data.packing import Schedule
from qwenvl_ft.data.prepare import Prepared
from qwenvl_ft.data.reading import Reading
from qwenvl_ft.data.targets import find_layers
from qwenvl_ft.folders.adapter import quantization_of
from qwenvl_ft.folders.runs import checkpoints, set_aside
from qwenvl_ft.folders.whole import writing
from qwenvl_ft.model.attention import attention_of
from qwenvl_ft.model.load import add_lora, limited, load_base
from qwenvl_ft.model.lora import fuse_lora
from qwenvl_ft.train.activations import keep_what_fits, recompute
from qwenvl_ft.train.alike import check_alike
from qwenvl_ft.train.groups import groups_of
from qwenvl_ft.train.initial import set_initial
from qwenvl_ft.train.launch import open_trackers
from qwenvl_ft.train.origin import STATE, Origin
from qwenvl_ft.train.output_dir import Metrics, write_settings
from qwenvl_ft.train.sharded import share_out
from qwenvl_ft.train.state import OnSaved, Run


def processor_of(config: Config, prepared: Prepared) -> Any:
    """The base's, with the template and the limits that the records were read with."""
    processor = AutoProcessor.from_pretrained(config.model)
    processor.chat_template = prepared.chat.source  # which asks as was taught
    return limited(processor, prepared.chat, Reading.of(config))


def adapted(model: Any, config: Config) -> Any:
    """A model with fresh LoRA as the settings say."""
    model = add_lora(
        model, family_of(config.model), config.lora_on, config.lora_rank, config.lora_alpha, config.lora_dropout, config.seed,
        config.own, find_layers(config), config.use_rslora, config.use_dora,
    )  # fmt: skip
    fuse_lora(model)
    return model


def set_up(
    config: Config, accelerator: Accelerator, origin: Origin, prepared: Prepared, held_out: Prepared | None, processor: Any,
    steps: Schedule, on_saved: OnSaved | None,
) -> Run:  # fmt: skip
    """The run, ready for its next step and its output folder begun. Says what runs, on what, and how much of it trains."""
    main, (_, resume, weights) = accelerator.is_main_process, origin
    before = json.loads((resume / STATE).read_text()) if resume else {}
    tracker_ids = open_trackers(accelerator, config, {name: before[name] for name in ("wandb", "mlflow") if name in before})
    trees = prepared.shares or (held_out and held_out.shares)  # which flash_attention_2 does not run, and auto could take
    attention = "varlen" if trees else config.attn_implementation
    straight = None if config.shard_base else straight_to(accelerator, config.quantization != "none")
    base = load_base(config.model, config.dtype, attention, packed=True, device=straight, quantization=config.quantization)
    model = adapted(base, config)
    if config.gradient_checkpointing:
        recompute(model)
    optimizer = new_optimizer(groups_of(model, config), config, accelerator)
    pissa_start = set_initial(model, config, accelerator.device, resume, weights)
    sizes = model.get_nb_trainable_parameters()
    if config.shard_base:
        share_out(model, accelerator)
    run = Run(config, accelerator, origin, prepared, held_out, processor, model, optimizer, pissa_start, on_saved)
    check_alike(run)
    if resume:
        run.load(resume)
    run.tracker_ids = tracker_ids
    accelerator.wait_for_everyone()  # all have read the checkpoint that may be moved now
    with writing(config.output_dir):
        if main and config.resume == "weights" and checkpoints(config.output_dir):
            print_line(f"the checkpoints of the run before are in {set_aside(config.output_dir)} now")
        if main:
            write_settings(config, prepared, processor)
            run.metrics = Metrics(config.output_dir, resume, config.logging_steps, len(steps))
    kept = [("its rows", run.keep_features(prepared, len(steps) > steps.steps_per_epoch))]
    if held_out:
        again = config.eval_steps is not None and config.eval_steps < len(steps)
        kept.append(("the held-out rows", run.keep_features(held_out, again)))
    fits = keep_what_fits(run) if config.gradient_checkpointing == "auto" else None
    run.activations = fits and fits.facts
    if main:
        report_start(run, sizes)
        if fits:
            print_line(str(fits))
        for of, said_of in kept:
            if said_of:
                print_line(f"what the vision tower makes of {of} {said_of}")
    return run


def new_optimizer(groups: list[dict[str, Any]], config: Config, accelerator: Accelerator) -> torch.optim.AdamW:
    """AdamW, in one kernel on a GPU; DeepSpeed keeps the state in another form, flat, where there is nothing to gain."""
    fused = accelerator.device.type == "cuda" and accelerator.distributed_type != DistributedType.DEEPSPEED
    return torch.optim.AdamW(groups, lr=config.learning_rate, weight_decay=config.weight_decay, fused=fused or None)


def straight_to(accelerator: Accelerator, quantized: bool = False) -> torch.device | None:
    """Where the base is read to, past the CPU, whose memory would hold it once a process; DeepSpeed places it by itself, but not
    the scales of what is quantized."""
    by_itself = accelerator.distributed_type == DistributedType.DEEPSPEED and not quantized
    return accelerator.device if accelerator.device.type == "cuda" and not by_itself else None


def report_start(run: Run, sizes: tuple[int, int]) -> None:
    """What runs, on what, and how much of it trains: `sizes`, of all."""
    config, (trains, total), (_, resume, weights) = run.config, sizes, run.origin
    kind = "bfloat16" if run.bf16 else "float32"
    if config.dtype == "auto" and not run.bf16 and run.accelerator.device.type == "cuda":
        kind += " (this GPU has no bfloat16)"
    if config.quantization != "none":
        kind += f", attention and MLP in {config.quantization}"
    if config.shard_base:
        kind += ", the base shared out among them"
    print_line(f"{run.accelerator.num_processes} x {run.accelerator.device.type}, {kind}; {trains:,} of {total:,} parameters train "
                  f"({trains / total:.2%}); attention: {attention_of(run.bare)}")  # fmt: skip
    if resume:
        print_line(f"going on from {resume}")
    if weights:
        beside = f", which trained beside layers in {held}" if (held := quantization_of(weights)) != config.quantization else ""
        print_line(f"a new run, which begins with the weights of {weights}{beside}")
