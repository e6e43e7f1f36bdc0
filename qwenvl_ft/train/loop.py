"""The training loop, on accelerate: one process or many, with or without DeepSpeed, the same steps and the same result.

A step takes `rows_per_step` rows over all processes and divides their summed loss ONCE, by the number of tokens taught in all
of them. Which rows those are, and every random draw, follows from (seed, epoch, row): not from the number of processes, nor
from what ran before, so a run that goes on from a checkpoint ends where the uninterrupted one does.
"""

import json
import math
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from transformers import AutoProcessor

from qwenvl_ft.config import Config
from qwenvl_ft.console import Display, draw_plan, print_drawing, print_line, print_problems
from qwenvl_ft.data.chat import IGNORE
from qwenvl_ft.data.prepare import Prepared, Ready, make_ready, schedule
from qwenvl_ft.data.reading import Reading
from qwenvl_ft.data.rows import Built, Row
from qwenvl_ft.data.targets import find_layers
from qwenvl_ft.errors import NonFiniteLoss, Problem, UserError
from qwenvl_ft.folders.runs import checkpoints, set_aside
from qwenvl_ft.folders.whole import short_hash, writing
from qwenvl_ft.model.attention import attention_of
from qwenvl_ft.model.load import add_lora, limited, load_base, trainable
from qwenvl_ft.model.lora import fuse_lora
from qwenvl_ft.model.loss import Keep, summed_loss
from qwenvl_ft.train.activations import keep_what_fits, recompute
from qwenvl_ft.train.alike import check_alike
from qwenvl_ft.train.answers import Answers
from qwenvl_ft.train.beginning import begin
from qwenvl_ft.train.best import Best
from qwenvl_ft.train.dtypes import Multiplications
from qwenvl_ft.train.groups import groups_of
from qwenvl_ft.train.launch import Signals, alone, check_shared, lost, open_trackers, start
from qwenvl_ft.train.memory import memory_for, out_of_memory, peak_bytes
from qwenvl_ft.train.output_dir import METRICS_FILE, Metrics, read_metrics, was_evaluated, write_results, write_settings
from qwenvl_ft.train.sharded import share_out
from qwenvl_ft.train.state import STATE, OnSaved, Run, find_resume, find_weights, fingerprint


class Taught(NamedTuple):
    """What rows came to, over all processes: their summed loss, the tokens that they taught, the records that broke."""

    summed_loss: float
    tokens: int
    skipped: list[Problem]
    grad_norm: float = 0.0  # of a step, before it was clipped

    @property
    def loss(self) -> float:
        """Per taught token; 0 where every record broke."""
        return self.summed_loss / max(1, self.tokens)


class Evaluated(NamedTuple):
    """What an evaluation came to: its loss and, with an eval_metric, that, by their keys; the records that broke."""

    scores: dict[str, float]
    skipped: list[Problem]


def train_step(run: Run, epoch: int, rows: list[int], loader: Iterator[Built | UserError], signals: Signals) -> Taught | None:
    """One optimizer step; None where all processes gave it up between two rows, for a signal: nothing of it has happened then."""
    accelerator, prepared = run.accelerator, run.prepared
    run.model.train()
    mine = run.mine(rows, prepared)
    planned = divisor = sum(prepared.taught_tokens(row) for row in rows)
    built: Iterator[Built] = map(raised_here, islice(loader, len(mine)))
    # DeepSpeed's engine clips and steps in the last backward: what is really taught has to be known before the first.
    if run.deepspeed and run.config.on_bad_record == "skip":
        held = list(built)
        built = iter(held)
        here = sum(taught_tokens(tensors) for row, (tensors, _) in zip(mine, held, strict=True) if row is not None)
        divisor = max(1, int(accelerator.reduce(torch.tensor(here, device=accelerator.device)).item()))
    counted = Count(run)
    for number, (row, (tensors, problems)) in enumerate(zip(mine, built, strict=True)):
        if signals.stop(accelerator, midway=True):
            run.optimizer.zero_grad()
            return None
        torch.manual_seed(draw_seed(run.config.seed, epoch, row))
        last = number == len(mine) - 1
        with run.exchange(last), memory_for(run, prepared, row):
            loss = row_loss(run, *run.looked_at(prepared, row, tensors, problems)) * (row is not None)
            counted.add(row, loss, tensors, problems)
            if last:
                counted.check_finite("the loss", prepared)
            # Processes average their gradients, so times their number: what is left is one division by the global count.
            run.backward(loss * (accelerator.num_processes / divisor), last)
    taught = counted.over_all_processes()
    if not run.deepspeed and taught.tokens < planned:  # some records broke
        for parameter in trainable(run.bare).values():
            if parameter.grad is not None:
                parameter.grad *= planned / max(1, taught.tokens)
    if run.deepspeed:  # whose engine has clipped and stepped in the last backward, or undone the step without a word
        norm = accelerator.deepspeed_engine_wrapped.get_global_grad_norm() if run.model.was_step_applied() else math.nan
    else:
        norm = float(accelerator.clip_grad_norm_(run.model.parameters(), run.config.max_grad_norm))
    if not 0 <= norm < math.inf:  # ZeRO-2 says -1 of one that is not finite
        places = "; ".join(prepared.places(row) for row in rows)
        if not accelerator.is_local_main_process:
            raise SystemExit(1)  # every process has this norm, and one of them says so
        raise NonFiniteLoss(Problem(places, f"the gradient's norm is {'nan' if norm < 0 else norm}", "lower learning_rate"))
    if not run.deepspeed:
        run.untouched = {name: parameter for name, parameter in run.untouched.items() if parameter.grad is None}
        run.optimizer.step()
        run.optimizer.zero_grad()
    return taught._replace(grad_norm=norm)


class Timed(Iterator[Built | UserError]):
    """Rows as they come, with the seconds that were waited for them since the last look."""

    def __init__(self, rows: Iterator[Built | UserError]):
        self.rows, self.seconds = rows, 0.0

    def __next__(self) -> Built | UserError:
        began = time.monotonic()
        try:
            return next(self.rows)
        finally:
            self.seconds += time.monotonic() - began

    def waited(self) -> float:
        seconds, self.seconds = self.seconds, 0.0
        return seconds


def raised_here(built: Built | UserError) -> Built:
    """Raises what a worker of the loader could not."""
    if isinstance(built, UserError):
        raise built
    return built


def taught_tokens(row: Row) -> int:
    """How many tokens a row does teach."""
    return int((row["labels"] != IGNORE).sum())


class Count:
    """Adds up rows of this process, then those of all. Losses stay on the device: a look at one waits until it is computed."""

    def __init__(self, run: Run):
        self.accelerator = run.accelerator
        self.rows: list[int | None] = []
        self.losses: list[torch.Tensor] = []
        self.tokens, self.problems = 0, list[Problem]()

    def add(self, row: int | None, loss: torch.Tensor, tensors: Row, problems: list[Problem]) -> None:
        """One row; of None, one that stands in for no row, its loss of 0 alone."""
        self.rows.append(row)
        self.losses.append(loss.detach())
        if row is not None:
            self.tokens += taught_tokens(tensors)
            self.problems += problems

    def check_finite(self, what: str, prepared: Prepared) -> None:
        """Raises NonFiniteLoss that names the records of the first row whose loss is not."""
        for row, loss in zip(self.rows, torch.stack(self.losses).tolist(), strict=True):
            if not math.isfinite(loss):
                fix = "lower learning_rate; look at this row's records with `qwenvl-ft show`"
                raise NonFiniteLoss(Problem(prepared.places(row or 0), f"{what} is {loss}", fix))

    def over_all_processes(self) -> Taught:
        """Every process has to ask."""
        summed = torch.stack(self.losses).double().sum()
        here = torch.stack([summed, *(summed.new_tensor(count) for count in (self.tokens, len(self.problems)))])
        loss, tokens, problems = self.accelerator.reduce(here).tolist()
        return Taught(loss, int(tokens), gather_object(self.problems) if problems else [])


def row_loss(run: Run, row: Row, keep: Keep | None = None) -> torch.Tensor:
    """Summed loss of one row, on this process's device. For `keep` see vision_features."""
    return summed_loss(run.model, run.bare, row, run.tower_trains, keep, run.accelerator.device)


@torch.no_grad()
def evaluate(run: Run, held_out: Prepared, signals: Signals) -> Taught | None:
    """What the held-out records come to; None where all processes gave up between two rows, for a signal."""
    run.model.eval()
    counted = Count(run)
    mine = run.mine(range(len(held_out.plan.rows)), held_out)
    with run.built(mine, held_out) as loader:
        for row, built in zip(mine, loader, strict=True):
            if signals.stop(run.accelerator, midway=True):
                return None
            tensors, problems = raised_here(built)
            with memory_for(run, held_out, row):
                loss = row_loss(run, *run.looked_at(held_out, row, tensors, problems)) * (row is not None)
            counted.add(row, loss, tensors, problems)
    counted.check_finite("the loss of held-out records", held_out)
    return counted.over_all_processes()


def draw_seed(seed: int, epoch: int, row: int | None) -> int:
    """The seed of a row's dropout, from (seed, epoch, row) alone."""
    return hash((seed, epoch, -1 if row is None else row)) % 2**63  # a tuple of integers hashes the same in every process


def new_optimizer(groups: list[dict[str, Any]], config: Config, accelerator: Accelerator) -> torch.optim.AdamW:
    """AdamW, in one kernel on a GPU; DeepSpeed keeps the state in another form, flat, where there is nothing to gain."""
    fused = accelerator.device.type == "cuda" and accelerator.distributed_type != DistributedType.DEEPSPEED
    return torch.optim.AdamW(groups, lr=config.learning_rate, weight_decay=config.weight_decay, fused=fused or None)


def straight_to(accelerator: Accelerator, quantized: bool = False) -> torch.device | None:
    """Where the base is read to, past the CPU, whose memory would hold it once a process; DeepSpeed places it by itself, but not
    the scales of what is quantized."""
    by_itself = accelerator.distributed_type == DistributedType.DEEPSPEED and not quantized
    return accelerator.device if accelerator.device.type == "cuda" and not by_itself else None


def learning_rate(step: int, total: int, config: Config) -> float:
    """The rate of step 1 .. total: linear warm-up over `warmup_ratio` of the run, then the schedule down to zero."""
    warmup = math.ceil(config.warmup_ratio * total)
    if step <= warmup:
        return config.learning_rate * step / warmup
    left = 1 - (step - 1 - warmup) / max(1, total - warmup)
    shapes = {"cosine": 0.5 - 0.5 * math.cos(math.pi * left), "linear": left, "constant": 1.0}
    return config.learning_rate * shapes[config.lr_scheduler_type]


def train(config: Config, ready: Ready | None = None, on_saved: OnSaved | None = None) -> None:
    """Trains and leaves in `output_dir` a plain PEFT adapter, the processor, the settings, the plan and the results.

    `ready` is what `make_ready` returned, where that was called before torch was imported. `on_saved` is called with every
    checkpoint once it is whole, by the main process, while the others wait.

    Raises UserError; exits with 128 + signal after SIGTERM or SIGINT, the work so far saved.
    """
    prepared, held_out = ready or make_ready(config)
    accelerator = start(config)
    try:
        with alone(accelerator, config):
            check_shared(accelerator, config, kept_elsewhere=on_saved is not None)
            run_steps(config, accelerator, prepared, held_out, on_saved)
    except (RuntimeError, EOFError, ConnectionError) as error:
        problem = lost(error, config, accelerator.num_processes)
        if isinstance(error, torch.OutOfMemoryError):  # outside the work on a row
            problem = out_of_memory(error, config, f"model: {config.model}", "what every step needs, the model itself",
                                    keeps=config.gradient_checkpointing is not True)  # fmt: skip
        if problem is None:
            raise
        # The command line prints the first process's; but that one may be gone, and of a lost worker only its own knows.
        if accelerator.local_process_index == 1 or (problem.where != "launch" and not accelerator.is_local_main_process):
            print_problems([problem])
        raise UserError(problem) from error


def run_steps(
    config: Config, accelerator: Accelerator, prepared: Prepared, held_out: Prepared | None, on_saved: OnSaved | None
) -> None:
    """The run from its rows to its results, `output_dir` being its own."""
    main = accelerator.is_main_process
    steps = schedule(prepared, config)
    same = fingerprint(prepared, held_out, config)
    if len(set(gather_object([short_hash(same)]))) > 1:  # each node may have its own cache, and its own copy of the files
        what, fix = "its processes read different records, pictures or settings", "give all machines the same files"
        raise UserError(Problem("launch", what, fix))
    resume = find_resume(config, same, prepared)
    weights = None if resume else find_weights(config)
    if len(found := set(gather_object([begins.name if (begins := resume or weights) else "the beginning"]))) > 1:
        what, fix = f"its processes would go on from {' and '.join(sorted(found))}", "give all machines the same checkpoints"
        raise UserError(Problem("launch", what, fix))
    if main:
        print_drawing(draw_plan(prepared.summary(config)))
        if prepared.problems:
            print_problems(prepared.problems)
    before = json.loads((resume / STATE).read_text()) if resume else {}
    tracker_ids = open_trackers(accelerator, config, {name: before[name] for name in ("wandb", "mlflow") if name in before})

    processor = AutoProcessor.from_pretrained(config.model)
    processor.chat_template = prepared.chat.source  # which asks as was taught
    limited(processor, prepared.chat, Reading(video_fps=config.video_fps, video_max_frames=config.video_max_frames))
    answers = Answers(config, processor, held_out) if held_out and config.eval_metric != "loss" else None
    trees = prepared.shares or (held_out and held_out.shares)  # which flash_attention_2 does not run, and auto could take
    attention = "varlen" if trees else config.attn_implementation
    straight = None if config.shard_base else straight_to(accelerator, config.quantization != "none")
    model = load_base(config.model, config.dtype, attention, packed=True, device=straight, quantization=config.quantization)
    bf16 = model.dtype == torch.bfloat16
    model = add_lora(
        model, prepared.chat.family, config.lora_on, config.lora_rank, config.lora_alpha, config.lora_dropout, config.seed,
        config.own, find_layers(config), config.use_rslora, config.use_dora,
    )  # fmt: skip
    fuse_lora(model)
    if config.gradient_checkpointing:
        recompute(model)
    optimizer = new_optimizer(groups_of(model, config), config, accelerator)
    beginning = begin(model, config, accelerator.device, resume, weights)
    sizes = model.get_nb_trainable_parameters()
    if config.shard_base:
        share_out(model, accelerator)
    model, optimizer = accelerator.prepare(model, optimizer)
    run = Run(config, accelerator, model, optimizer, prepared, processor, bf16, on_saved, beginning)
    check_alike(run, row_loss)
    done = run.load(resume) if resume else 0
    run.tracker_ids = tracker_ids
    run.best = best = Best(read_metrics(resume) if resume else [], config.early_stopping_patience, config.eval_metric)
    accelerator.wait_for_everyone()  # all have read the checkpoint that may be moved now
    with writing(config.output_dir):
        if main and config.resume == "weights" and checkpoints(config.output_dir):
            print_line(f"the checkpoints of the run before are in {set_aside(config.output_dir)} now")
        if main:
            write_settings(config, prepared, processor)
        run.metrics = metrics = Metrics(config.output_dir, resume, config.logging_steps, len(steps)) if main else None
    kept = [("its rows", run.keep_features(prepared, len(steps) > steps.steps_per_epoch))]
    if held_out:
        again = config.eval_steps is not None and config.eval_steps < len(steps)
        kept.append(("the held-out rows", run.keep_features(held_out, again)))
    activations = keep_what_fits(run, row_loss) if config.gradient_checkpointing == "auto" else None
    if main:
        report_start(config, run, sizes, resume, weights)
        if activations:
            print_line(str(activations))
        for of, said_of in kept:
            if said_of:
                print_line(f"what the vision tower makes of {of} {said_of}")
    display = Display(len(steps), done, quiet=not main)

    def is_saved(step: int) -> bool:
        return step in (done, len(steps)) or step % config.save_steps == 0

    def is_evaluated(step: int) -> bool:
        return bool(held_out and (step == len(steps) or (config.eval_steps and step % config.eval_steps == 0)))

    def score(step: int, held_out: Prepared) -> Evaluated | None:
        taught = evaluate(run, held_out, signals)
        scored = answers.score(run, taught.skipped, signals) if answers and taught else None
        if taught is None or (answers and scored is None):
            display.say(f"step {step}  the evaluation was given up; resuming does it")
            return None
        scores = {"eval_loss": taught.loss} | ({best.key: scored.value} if scored else {})
        best.add(step, scores[best.key])
        said_of = "  ".join(f"{key}={value:.4f}" for key, value in scores.items())
        if scored:
            cut = f", {scored.cut} answers cut at {config.eval_max_new_tokens} tokens" if scored.cut else ""
            said_of += f" ({scored.questions} questions{cut})"
        display.say(f"step {step}  {said_of}")
        return Evaluated(scores, taught.skipped)

    def tell(skipped: Sequence[Problem]) -> None:
        for problem in skipped:
            if problem not in said:
                display.say(f"skipped {problem.where}: {problem.what}")
        said.update(skipped)

    said: set[Problem] = set()
    multiplied = Multiplications(run.bare)
    with Signals(config.ddp_timeout) as signals:  # to the end: what is learnt is written though one comes
        try:
            if resume and held_out and is_evaluated(done) and not was_evaluated(resume, config.eval_metric):
                if (evaluated := score(done, held_out)) is None:
                    leave(run, signals, display, done, None)
                tell(evaluated.skipped)
                if metrics:
                    metrics.amend(evaluated.scores, evaluated.skipped)
            end = done if best.over else len(steps)
            rows_to_come = (row for _, rows in islice(steps.since(done), end - done) for row in run.mine(rows, prepared))
            with run.built(rows_to_come, prepared) as built:
                loader = Timed(iter(built))
                for step, (epoch, rows) in enumerate(islice(steps.since(done), end - done), start=done + 1):
                    began = time.monotonic()
                    rate = learning_rate(step, len(steps), config)
                    for group in run.optimizer.param_groups:
                        group["lr"] = rate * group["share"]
                    first = run.bf16 and step == done + 1
                    with multiplied if first else nullcontext():
                        taught = train_step(run, epoch, rows, loader, signals)
                    if first and (slow := multiplied.problem()):
                        display.say(slow)
                    if taught is None:
                        leave(run, signals, display, step - 1, None if is_saved(step - 1) else same)
                    seconds, skipped = time.monotonic() - began, taught.skipped
                    tokens = sum(map(prepared.tokens, rows))
                    facts = {
                        "loss": taught.loss, "taught_tokens": taught.tokens, "learning_rate": rate,
                        **{group["name"]: group["lr"] for group in run.optimizer.param_groups},
                        "epoch": round(step / steps.steps_per_epoch, 4), "tokens_per_s": tokens / seconds,
                        "taught_tokens_per_s": taught.tokens / seconds, "grad_norm": taught.grad_norm,
                        "data_wait_s": loader.waited(),
                        **({"peak_memory_gib": peak / 2**30} if (peak := peak_bytes(accelerator.device)) else {}),
                    }  # fmt: skip
                    if held_out and is_evaluated(step) and (evaluated := score(step, held_out)):
                        skipped += evaluated.skipped
                        facts |= evaluated.scores
                    tell(skipped)
                    if metrics:
                        with writing(config.output_dir / METRICS_FILE):
                            facts = metrics.add(step, facts, skipped)
                    accelerator.log(facts, step=step)
                    display.step(step, facts)
                    if saved := is_saved(step) or best.over or (config.keep_best and best.step == step):
                        with writing(config.output_dir):
                            run.save(step, same)
                    if signals.stop(accelerator):
                        leave(run, signals, display, step, None if saved else same)
                    if best.over:
                        break
            if run.untouched and end > done:
                named = ", ".join(list(run.untouched)[:3])
                display.say(
                    f"{len(run.untouched)} of {len(trainable(run.bare))} trained weights had no gradient in this run: {named} ..."
                )
            if best.over:
                than = f"{'below' if best.lower_is_better else 'above'} {best.values[best.step]:.4f}"
                display.say(f"stopped early: no {best.key} {than} since step {best.step}")
        except UserError as error:
            if not accelerator.is_local_main_process:  # the command line prints the first one's, which knows nothing of this row
                print_problems(error.problems)
            raise
        finally:
            display.stop()
            if metrics:
                with writing(config.output_dir / METRICS_FILE):  # what is left of a line goes out with it
                    metrics.close()
        state = run.adapter_state()
        if metrics:
            with writing(config.output_dir):
                peaks = {group["name"]: config.learning_rate * group["share"] for group in run.optimizer.param_groups}
                write_results(config, prepared, run.adapter_settings(), state, processor, metrics.lines, peaks,
                              activations and activations.facts)  # fmt: skip
        accelerator.wait_for_everyone()
        accelerator.end_training()


def leave(run: Run, signals: Signals, display: Display, step: int, same: dict[str, str] | None) -> NoReturn:
    """Ends the process for the signal that came; first it saves the state after `step`, as that of the run `same`, if given."""
    stop = signals.stop(run.accelerator)
    by = {signal.SIGINT: "Ctrl-C (SIGINT)"}.get(signal.Signals(stop), signal.Signals(stop).name)
    if same:
        with writing(run.config.output_dir):
            run.save(step, same)
    display.say(f"stopped by {by} after step {step}; go on with resume=true" if step else
                f"stopped by {by} before the first step was done: nothing is saved")  # fmt: skip
    if signals.launched:
        display.say("what follows is the launcher's, which ends with exit code 1 and a traceback for every signal")
    run.accelerator.end_training()
    raise SystemExit(128 + stop)


def report_start(config: Config, run: Run, sizes: tuple[int, int], resume: Path | None, weights: Path | None) -> None:
    """What runs, on what, and how much of it trains."""
    trains, total = sizes
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
        print_line(f"a new run, which begins with the weights of {weights}")
