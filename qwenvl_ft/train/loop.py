"""The training loop, on accelerate: one process or many, with or without DeepSpeed, the same steps and the same result.

A step takes `rows_per_step` rows over all processes and divides their summed loss ONCE, by the number of tokens taught in all
of them. Which rows those are, and every random draw, follows from (seed, epoch, row): not from the number of processes, nor
from what ran before, so a run that goes on from a checkpoint ends where the uninterrupted one does.
"""

import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoProcessor

from qwenvl_ft.config import Config
from qwenvl_ft.console import Display, counting, draw_plan, print_drawing, print_line, print_problems
from qwenvl_ft.data.prepare import Prepared, prepare, schedule
from qwenvl_ft.data.rows import Row
from qwenvl_ft.errors import NonFiniteLoss, Problem, UserError
from qwenvl_ft.folders.model import ADAPTER_WEIGHTS
from qwenvl_ft.folders.problems import check_model
from qwenvl_ft.folders.runs import check_output_dir
from qwenvl_ft.model.load import add_lora, limited_image_processor, load_base, trainable
from qwenvl_ft.model.loss import summed_loss
from qwenvl_ft.train.launch import Signals, open_trackers, start
from qwenvl_ft.train.output_dir import Metrics, write_results, write_settings
from qwenvl_ft.train.state import Run, find_resume, fingerprint


def train_step(run: Run, epoch: int, rows: list[int], loader: Iterator[Row | UserError], signals: Signals) -> tuple[float, int]:
    """One optimizer step. Returns the loss per taught token over all processes, and the signal that any of them got."""
    accelerator, prepared = run.accelerator, run.prepared
    run.model.train()
    mine = run.mine(rows)
    taught = sum(prepared.taught_tokens(row) for row in rows)
    total = torch.zeros(3, dtype=torch.float64, device=accelerator.device)  # the loss, who got SIGINT, who SIGTERM
    for number, row in enumerate(mine):
        torch.manual_seed(draw_seed(run.config.seed, epoch, row))
        if isinstance(built := next(loader), UserError):
            raise built
        loss = row_loss(run, built) * (row is not None)
        if not torch.isfinite(loss):
            raise NonFiniteLoss(Problem(prepared.places(row or 0), f"the loss is {loss.item()}",
                                        "lower learning_rate; look at this row's records with `qwenvl-ft show`"))  # fmt: skip
        total[0] += loss.item()
        # Processes average their gradients, so times their number: what is left is one division by the global count.
        run.backward(loss * (accelerator.num_processes / taught), last=number == len(mine) - 1)
    if not run.deepspeed:  # whose engine has clipped and stepped in the last backward
        norm = accelerator.clip_grad_norm_(run.model.parameters(), run.config.max_grad_norm)
        if not torch.isfinite(norm):
            places = "; ".join(prepared.places(row) for row in rows)
            if not accelerator.is_local_main_process:
                raise SystemExit(1)  # every process has this norm, and one of them says so
            raise NonFiniteLoss(Problem(places, f"the gradient's norm is {norm.item()}", "lower learning_rate"))
        run.optimizer.step()
        run.optimizer.zero_grad()
    total[1:] = torch.tensor([signals.received == number for number in (signal.SIGINT, signal.SIGTERM)])
    total = accelerator.reduce(total)
    stop = signal.SIGTERM if total[2] else signal.SIGINT if total[1] else 0
    return total[0].item() / taught, int(stop)


def row_loss(run: Run, row: Row) -> torch.Tensor:
    """Summed loss of one row on this process's device."""
    device = run.accelerator.device
    row = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in row.items()}
    with torch.autocast(device.type, torch.bfloat16, enabled=run.bf16):
        return summed_loss(run.model, run.bare, row, run.tower_trains)


@torch.no_grad()
def evaluate(run: Run, held_out: Prepared) -> float:
    """Loss per taught token of the held-out records, over all processes."""
    run.model.eval()
    data = run.rows_of(held_out)
    rows = list(range(len(data)))
    total = torch.zeros((), dtype=torch.float64, device=run.accelerator.device)
    for row in run.mine(rows):
        total += row_loss(run, data[row or 0]) * (row is not None)
    return float(run.accelerator.reduce(total).item()) / sum(map(held_out.taught_tokens, rows))


def draw_seed(seed: int, epoch: int, row: int | None) -> int:
    """The seed of a row's dropout, from (seed, epoch, row) alone."""
    return hash((seed, epoch, -1 if row is None else row)) % 2**63  # a tuple of integers hashes the same in every process


def learning_rate(step: int, total: int, config: Config) -> float:
    """The rate of step 1 .. total: linear warm-up over `warmup_ratio` of the run, then the schedule down to zero."""
    warmup = math.ceil(config.warmup_ratio * total)
    if step <= warmup:
        return config.learning_rate * step / warmup
    left = 1 - (step - 1 - warmup) / max(1, total - warmup)
    shapes = {"cosine": 0.5 - 0.5 * math.cos(math.pi * left), "linear": left, "constant": 1.0}
    return config.learning_rate * shapes[config.lr_scheduler_type]


def train(config: Config) -> None:
    """Trains and leaves in `output_dir` a plain PEFT adapter, the processor, the settings, the plan and the results.

    Raises UserError; exits with 128 + signal after SIGTERM or SIGINT, the work so far saved.
    """
    check_output_dir(config.output_dir)
    check_model(config.model)
    accelerator = start(config)
    main = accelerator.is_main_process
    with counting("reading records") as on_record:
        prepared = prepare(config, on_record=on_record)
        held_out = prepare(config, evaluation=True) if config.eval_meta_file else None
    steps = schedule(prepared, config)
    same = fingerprint(prepared, held_out, config)
    resume = find_resume(config, same, prepared)
    if main:
        print_drawing(draw_plan(prepared.summary(config)))
        if prepared.problems:
            print_problems(prepared.problems)
    open_trackers(accelerator, config)

    processor = AutoProcessor.from_pretrained(config.model)
    image_processor = limited_image_processor(processor, prepared.chat.limits)
    model = load_base(config.model, config.dtype, config.attn_implementation)
    bf16 = model.dtype == torch.bfloat16
    model = add_lora(
        model, prepared.chat.family, config.lora_on, config.lora_rank, config.lora_alpha, config.lora_dropout, config.seed
    )
    if config.gradient_checkpointing:  # after peft, whose hooks would run the frozen vision tower backward
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=config.learning_rate, weight_decay=config.weight_decay)
    if resume:
        set_peft_model_state_dict(model, load_file(resume / ADAPTER_WEIGHTS))
    sizes = model.get_nb_trainable_parameters()
    model, optimizer = accelerator.prepare(model, optimizer)
    run = Run(config, accelerator, model, optimizer, prepared, image_processor, bf16)
    done = run.load(resume) if resume else 0
    if main:
        write_settings(config, prepared, processor)
        report_start(config, run, sizes, resume)
    display = Display(len(steps), done, quiet=not main)
    run.metrics = metrics = Metrics(config.output_dir, resume, config.logging_steps, len(steps)) if main else None
    loader = iter(run.loader(steps[done:]))
    steps_per_epoch = math.ceil(len(prepared.plan.rows) / config.rows_per_step)
    try:
        with Signals() as signals:
            for step, (epoch, rows) in enumerate(steps[done:], start=done + 1):
                began = time.monotonic()
                rate = learning_rate(step, len(steps), config)
                for group in run.optimizer.param_groups:
                    group["lr"] = rate
                loss, stop = train_step(run, epoch, rows, loader, signals)
                seconds = time.monotonic() - began
                tokens = sum(prepared.scripts[index].length for row in rows for index in prepared.plan.rows[row])
                taught = sum(map(prepared.taught_tokens, rows))
                facts = {
                    "loss": loss, "taught_tokens": taught, "learning_rate": rate, "epoch": round(step / steps_per_epoch, 4),
                    "tokens_per_s": tokens / seconds, "taught_tokens_per_s": taught / seconds,
                }  # fmt: skip
                if held_out and (step == len(steps) or (config.eval_steps and step % config.eval_steps == 0)):
                    facts["eval_loss"] = evaluate(run, held_out)
                    display.say(f"step {step}  eval_loss={facts['eval_loss']:.4f}")
                if metrics:
                    facts = metrics.add(step, facts)
                accelerator.log(facts, step=step)
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
    if metrics:
        write_results(config, model, state, processor, metrics.lines)
    accelerator.wait_for_everyone()
    accelerator.end_training()


def report_start(config: Config, run: Run, sizes: tuple[int, int], resume: Path | None) -> None:
    """What runs, on what, and how much of it trains."""
    trains, total = sizes
    kind = "bfloat16" if run.bf16 else "float32"
    print_line(f"{run.accelerator.num_processes} x {run.accelerator.device.type}, {kind}; {trains:,} of {total:,} parameters train "
                  f"({trains / total:.2%}; LoRA on {', '.join(config.lora_on)})")  # fmt: skip
    if resume:
        print_line(f"going on from {resume}")
