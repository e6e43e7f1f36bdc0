"""The training loop, on accelerate: one process or many, with or without DeepSpeed, the same steps and the same result.

A step takes `rows_per_step` rows over all processes and divides their summed loss ONCE, by the number of tokens taught in all
of them. Which rows those are, and every random draw, follows from (seed, epoch, row): not from the number of processes, nor
from what ran before, so a run that goes on from a checkpoint ends where the uninterrupted one does.
"""

import json
import math
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DistributedType
from transformers import AutoProcessor

from qwenvl_ft.config import Config
from qwenvl_ft.console import Display, counting, draw_plan, print_drawing, print_line, print_problems
from qwenvl_ft.data.prepare import prepare, schedule
from qwenvl_ft.data.rows import open_image_processor
from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.folders.runs import check_output_dir
from qwenvl_ft.model.load import add_lora, load_base, trainable
from qwenvl_ft.train.output_dir import METRICS, write_results, write_settings
from qwenvl_ft.train.resume import find_resume, fingerprint
from qwenvl_ft.train.state import ADAPTER, Run, Signals, load_file_into


def train(config: Config) -> None:
    """Trains and leaves in `output_dir` a plain PEFT adapter, the processor, the settings, the plan and the results.

    Raises UserError; exits with 128 + signal after SIGTERM or SIGINT, the work so far saved.
    """
    check_output_dir(config.output_dir)
    accelerator = start(config)
    main = accelerator.is_main_process
    with counting("reading records") as on_record:
        prepared = prepare(config, on_record=on_record)
        held_out = prepare(config, evaluation=True) if config.eval_meta_file else None
    steps = schedule(prepared, config)
    same = fingerprint(prepared, config)
    resume = find_resume(config, same, prepared)
    if main:
        print_drawing(draw_plan(prepared.summary(config)))
        if prepared.problems:
            print_problems(prepared.problems)
    open_trackers(accelerator, config)

    processor = AutoProcessor.from_pretrained(config.model)
    image_processor = open_image_processor(processor, prepared.chat)
    model = load_base(config.model, config.dtype, config.attn_implementation)
    bf16 = model.dtype == torch.bfloat16
    model = add_lora(
        model, prepared.chat.family, config.lora_on, config.lora_rank, config.lora_alpha, config.lora_dropout, config.seed
    )
    if config.gradient_checkpointing:  # after peft, whose hooks would run the frozen vision tower backward
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=config.learning_rate, weight_decay=config.weight_decay)
    if resume:
        load_file_into(model, resume / ADAPTER)
    sizes = (
        sum(p.numel() for p in trainable(model).values()),
        sum(p.numel() for p in model.parameters()),
    )  # before they are shared out
    run = Run(config, accelerator, *accelerator.prepare(model, optimizer), prepared, image_processor, bf16)
    done = run.load(resume) if resume else 0
    if main:
        write_settings(config, prepared, processor)
        report_start(config, run, sizes, resume)
    display = Display(len(steps), done, config.logging_steps, quiet=not main)
    metrics = open_metrics(config.output_dir, done) if main else None
    loader = iter(run.loader(steps[done:]))
    steps_per_epoch = math.ceil(len(prepared.plan.rows) / config.rows_per_step)
    try:
        with Signals() as signals:
            for step, (epoch, rows) in enumerate(steps[done:], start=done + 1):
                began = time.monotonic()
                rate = learning_rate(step, len(steps), config)
                for group in run.optimizer.param_groups:
                    group["lr"] = rate
                loss, stop = run.step(epoch, rows, loader, signals)
                seconds = time.monotonic() - began
                tokens = sum(prepared.scripts[index].length for row in rows for index in prepared.plan.rows[row])
                facts = {
                    "loss": loss, "learning_rate": rate, "epoch": round(step / steps_per_epoch, 4),
                    "tokens_per_s": tokens / seconds, "taught_tokens_per_s": sum(map(prepared.taught_tokens, rows)) / seconds,
                }  # fmt: skip
                if held_out and (step == len(steps) or (config.eval_steps and step % config.eval_steps == 0)):
                    facts["eval_loss"] = run.evaluate(held_out)
                    display.say(f"step {step}  eval_loss={facts['eval_loss']:.4f}")
                accelerator.log(facts, step=step)
                if metrics:
                    metrics.write(json.dumps({"step": step, **facts}) + "\n")
                    metrics.flush()
                display.step(step, facts)
                if stop or step % config.save_steps == 0 or step == len(steps):
                    run.save(step, same)
                if stop:
                    by = "Ctrl-C (SIGINT)" if stop == signal.SIGINT else "SIGTERM"
                    display.say(f"stopped by {by} after step {step}; go on with resume=true")
                    accelerator.end_training()
                    raise SystemExit(128 + stop)
    except UserError as error:
        if not accelerator.is_local_main_process:  # the command line prints the first one's, which knows nothing of this row
            print_problems(error.problems)
        raise
    finally:
        display.stop()
        if metrics:
            metrics.close()
    model = accelerator.unwrap_model(run.model)
    state = run.adapter_state()
    if main:
        write_results(config, model, state)
    accelerator.wait_for_everyone()
    accelerator.end_training()


def start(config: Config) -> Accelerator:
    """The accelerator; raises UserError where the launch does not do what was asked."""
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    find = bool({"vision", "merger"} & set(config.lora_on))  # a row without pictures leaves the tower unused
    accelerator = Accelerator(
        log_with=list(config.report_to) or None,
        project_dir=config.output_dir,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=find)],
    )
    wrong = None
    if asked != accelerator.num_processes:
        wrong = f"{asked} processes were asked for (WORLD_SIZE) and {accelerator.num_processes} came up"
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" and accelerator.distributed_type != DistributedType.DEEPSPEED:
        wrong = "DeepSpeed was asked for and did not come up"
    if wrong:
        fix = "start with `accelerate launch --num_processes N train.py --config FILE` (configs/ddp.yaml for several GPUs)"
        raise UserError(Problem("launch", wrong, fix))
    if plugin := accelerator.state.deepspeed_plugin:
        rows = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "gradient_clipping": config.max_grad_norm}
        plugin.deepspeed_config.update(rows)
    if missing := [name for name in config.report_to if name not in map(str, accelerator.log_with)]:
        raise UserError(*(Problem("report_to", f"{name} is not installed", f"pip install {name}") for name in missing))
    try:
        config.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(Problem(f"output_dir: {config.output_dir}", f"{error.strerror}", "choose another folder")) from error
    return accelerator


def open_trackers(accelerator: Accelerator, config: Config) -> None:
    """Opens what `report_to` names, before the model is loaded: wandb wants a key and its server."""
    settings = {
        key: value if isinstance(value, (int, float, str)) else str(value) for key, value in config.model_dump(mode="json").items()
    }
    try:
        accelerator.init_trackers("qwenvl_ft", settings, {"wandb": {"name": config.run_name}})
    except Exception as error:
        if type(error).__module__.split(".")[0] != "wandb":  # which is installed where it is wanted only
            raise
        fix = "run `wandb login`, or set WANDB_MODE=offline in the environment, or report_to=none"
        raise UserError(Problem("report_to: wandb", str(error).splitlines()[0], fix)) from error


def learning_rate(step: int, total: int, config: Config) -> float:
    """The rate of step 1 .. total: linear warm-up over `warmup_ratio` of the run, then the schedule down to zero."""
    warmup = math.ceil(config.warmup_ratio * total)
    if step <= warmup:
        return config.learning_rate * step / warmup
    left = 1 - (step - 1 - warmup) / max(1, total - warmup)
    shapes = {"cosine": 0.5 - 0.5 * math.cos(math.pi * left), "linear": left, "constant": 1.0}
    return config.learning_rate * shapes[config.lr_scheduler_type]


def open_metrics(output_dir: Path, done: int) -> Any:
    """The metrics file to append to; lines of steps after `done` are of a run that was cut off and are taken out."""
    path = output_dir / METRICS
    lines = path.read_text().splitlines() if path.is_file() and done else []
    path.write_text("".join(line + "\n" for line in lines if line.endswith("}") and json.loads(line)["step"] <= done))
    return path.open("a")


def report_start(config: Config, run: Run, sizes: tuple[int, int], resume: Path | None) -> None:
    """What runs, on what, and how much of it trains."""
    trains, total = sizes
    kind = "bfloat16" if run.bf16 else "float32"
    print_line(f"{run.accelerator.num_processes} x {run.accelerator.device.type}, {kind}; {trains:,} of {total:,} parameters train "
                  f"({trains / total:.2%}; LoRA on {', '.join(config.lora_on)})")  # fmt: skip
    if resume:
        print_line(f"going on from {resume}")
