"""The training loop, on accelerate: one process or many, with or without DeepSpeed, the same steps and the same result.

A step takes `rows_per_step` rows over all processes and divides their summed loss ONCE, by the number of tokens taught in all
of them. Which rows those are, and every random draw, follows from (seed, epoch, row): not from the number of processes, nor
from what ran before, so a run that goes on from a checkpoint ends where the uninterrupted one does.
"""

import math
import signal
import time
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import islice
from typing import NamedTuple, NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from qwenvl_ft.config import Config
from qwenvl_ft.console import Display, draw_plan, print_drawing, print_problems
from qwenvl_ft.data.chat import IGNORE
from qwenvl_ft.data.packing import Schedule
from qwenvl_ft.data.prepare import Prepared, Ready, make_ready, schedule
from qwenvl_ft.data.rows import Built, Row
from qwenvl_ft.errors import NonFiniteLoss, Problem, UserError
from qwenvl_ft.folders.whole import writing
from qwenvl_ft.model.load import trainable
from qwenvl_ft.train.answers import Answers
from qwenvl_ft.train.dtypes import Multiplications
from qwenvl_ft.train.launch import Signals, alone, check_shared, lost, start
from qwenvl_ft.train.memory import memory_for, out_of_memory, peak_bytes
from qwenvl_ft.train.origin import agree
from qwenvl_ft.train.output_dir import METRICS_FILE, was_evaluated, write_results
from qwenvl_ft.train.setup import processor_of, set_up
from qwenvl_ft.train.state import OnSaved, Run


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
            loss = run.loss(*run.looked_at(prepared, row, tensors, problems)) * (row is not None)
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
                loss = run.loss(*run.looked_at(held_out, row, tensors, problems)) * (row is not None)
            counted.add(row, loss, tensors, problems)
    counted.check_finite("the loss of held-out records", held_out)
    return counted.over_all_processes()


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
    main, steps = accelerator.is_main_process, schedule(prepared, config)
    origin = agree(config, prepared, held_out)
    if main:
        print_drawing(draw_plan(prepared.summary(config)))
        if prepared.problems:
            print_problems(prepared.problems)
    processor = processor_of(config, prepared)
    # Before the model is loaded, since it may refuse.
    answers = Answers(config, processor, held_out) if held_out and config.eval_metric != "loss" else None
    run = set_up(config, accelerator, origin, prepared, held_out, processor, steps, on_saved)
    display = Display(len(steps), run.done, quiet=not main)
    with Signals(config.ddp_timeout) as signals:  # to the end: what is learnt is written though one comes
        try:
            take_steps(run, steps, Evaluations(run, len(steps), answers, signals, display), signals, display)
        except UserError as error:
            if not accelerator.is_local_main_process:  # the command line prints the first one's, which knows nothing of this row
                print_problems(error.problems)
            raise
        finally:
            display.stop()
            if run.metrics:
                with writing(config.output_dir / METRICS_FILE):  # what is left of a line goes out with it
                    run.metrics.close()
        state = run.adapter_state()
        if run.metrics:
            with writing(config.output_dir):
                peaks = {group["name"]: config.learning_rate * group["share"] for group in run.optimizer.param_groups}
                write_results(config, prepared, run.adapter_settings(), state, processor, run.metrics.lines, peaks, run.activations)
        accelerator.wait_for_everyone()
        accelerator.end_training()


def take_steps(run: Run, steps: Schedule, evaluations: "Evaluations", signals: Signals, display: Display) -> None:
    """Every step that is left, each with what follows it: an evaluation, a line of metrics, a checkpoint."""
    config, prepared, best, done = run.config, run.prepared, run.best, run.done
    if (resume := run.origin.resume) and evaluations.due(done) and not was_evaluated(resume, config.eval_metric):
        if (evaluated := evaluations.at(done)) is None:
            leave(run, signals, display, done, saved=True)
        display.skipped(evaluated.skipped)
        if run.metrics:
            run.metrics.amend(evaluated.scores, evaluated.skipped)
    multiplied = Multiplications(run.bare)
    end, saved = done if best.over else len(steps), True  # what it goes on from is, and of nothing there is nothing to save
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
                leave(run, signals, display, step - 1, saved)
            seconds, skipped = time.monotonic() - began, taught.skipped
            tokens = sum(map(prepared.tokens, rows))
            facts = {
                "loss": taught.loss, "taught_tokens": taught.tokens, "learning_rate": rate,
                **{group["name"]: group["lr"] for group in run.optimizer.param_groups},
                "epoch": round(step / steps.steps_per_epoch, 4), "tokens_per_s": tokens / seconds,
                "taught_tokens_per_s": taught.tokens / seconds, "grad_norm": taught.grad_norm,
                "data_wait_s": loader.waited(),
                **({"peak_memory_gib": peak / 2**30} if (peak := peak_bytes(run.accelerator.device)) else {}),
            }  # fmt: skip
            if evaluations.due(step) and (evaluated := evaluations.at(step)):
                skipped += evaluated.skipped
                facts |= evaluated.scores
            display.skipped(skipped)
            if run.metrics:
                with writing(config.output_dir / METRICS_FILE):
                    facts = run.metrics.add(step, facts, skipped)
            run.accelerator.log(facts, step=step)
            display.step(step, facts)
            saved = step == len(steps) or step % config.save_steps == 0 or best.over or (config.keep_best and best.step == step)
            if saved:
                with writing(config.output_dir):
                    run.save(step)
            if signals.stop(run.accelerator):
                leave(run, signals, display, step, saved)
            if best.over:
                break
    if run.untouched and end > done:
        named, num_trained = ", ".join(list(run.untouched)[:3]), len(trainable(run.bare))
        display.say(f"{len(run.untouched)} of {num_trained} trained weights had no gradient in this run: {named} ...")
    if best.over:
        than = f"{'below' if best.lower_is_better else 'above'} {best.values[best.step]:.4f}"
        display.say(f"stopped early: no {best.key} {than} since step {best.step}")


class Evaluations:
    """The evaluations of a run: after which of its `steps`, and what they come to. `answers`: the questions of an eval_metric."""

    def __init__(self, run: Run, steps: int, answers: Answers | None, signals: Signals, display: Display):
        self.run, self.steps, self.answers, self.signals, self.display = run, steps, answers, signals, display

    def due(self, step: int) -> bool:
        """After the last step, too."""
        every = self.run.config.eval_steps
        return self.run.held_out is not None and (step == self.steps or bool(every and step % every == 0))

    def at(self, step: int) -> Evaluated | None:
        """One, whose score is kept among those of the run; None where all processes gave it up for a signal."""
        run, best = self.run, self.run.best
        assert run.held_out
        taught = evaluate(run, run.held_out, self.signals)
        scored = self.answers.score(run, taught.skipped, self.signals) if self.answers and taught else None
        if taught is None or (self.answers and scored is None):
            self.display.say(f"step {step}  the evaluation was given up; resuming does it")
            return None
        scores = {"eval_loss": taught.loss} | ({best.key: scored.value} if scored else {})
        best.add(step, scores[best.key])
        said_of = "  ".join(f"{key}={value:.4f}" for key, value in scores.items())
        if scored:
            cut = f", {scored.cut} answers cut at {run.config.eval_max_new_tokens} tokens" if scored.cut else ""
            said_of += f" ({scored.questions} questions{cut})"
        self.display.say(f"step {step}  {said_of}")
        return Evaluated(scores, taught.skipped)


def leave(run: Run, signals: Signals, display: Display, step: int, saved: bool) -> NoReturn:
    """Ends the process for the signal that came; first it saves the state after `step`, if it is not saved yet."""
    stop = signals.stop(run.accelerator)
    by = {signal.SIGINT: "Ctrl-C (SIGINT)"}.get(signal.Signals(stop), signal.Signals(stop).name)
    if not saved:
        with writing(run.config.output_dir):
            run.save(step)
    display.say(f"stopped by {by} after step {step}; go on with resume=true" if step else
                f"stopped by {by} before the first step was done: nothing is saved")  # fmt: skip
    if signals.launched:
        display.say("what follows is the launcher's, which ends with exit code 1 and a traceback for every signal")
    run.accelerator.end_training()
    raise SystemExit(128 + stop)
