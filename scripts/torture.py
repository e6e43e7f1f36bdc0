"""Breaks training runs in every way that a machine does, and looks how they go on.

    python scripts/torture.py --minutes 10                                  # as many points as that, a seed of its own
    python scripts/torture.py --points 25 --seed 1                          # the same ones each time
    python scripts/torture.py --only "killed in a save" --seed 117          # one point again

A point is a way to launch, a fault and its moment, all drawn from the kind and a seed. After the fault the run is resumed and must
end with the bits and the losses of an uninterrupted run, or be refused: exit code 1, no traceback, and what is wrong named.
Anything else is a failure: another result, a traceback, a run that hangs or leaves processes, a file half written under its
name. Needs Linux, and DeepSpeed for ZeRO.
"""

import argparse
import errno
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.forks import Fault, Training, Way, adopt_orphans, import_everything, libc, orphans  # noqa: E402

WAYS = {
    "one": Way(), "one, 2 workers": Way(workers=2), "two": Way(2), "two, 1 worker": Way(2, workers=1),
    "ZeRO-2": Way(2, zero_stage=2), "ZeRO-3": Way(2, zero_stage=3),
}  # fmt: skip
STEPS, KEPT = 6, 3
TRACEBACK = "Traceback (most recent call last)"
RESUMED, REFUSED, FAILED = "resumed bit-equal", "refused in words", "FAILED"
Settings = dict[str, Any]


class Failed(Exception):
    """What a point did that it must not do."""


# --- what is trained ---


def write_inputs(folder: Path) -> None:
    """A random model of 100,000 parameters with the tokenizer of data/tiny, six pictures, eight records."""
    import torch
    from PIL import Image
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    facts = json.loads((ROOT / "data/tiny/config.json").read_text())
    facts["text_config"] |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
                             "num_key_value_heads": 1, "layer_types": ["full_attention"] * 2}  # fmt: skip
    facts["text_config"]["rope_parameters"]["mrope_section"] = [2, 3, 3]
    facts["vision_config"] |= {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2}
    torch.manual_seed(0)
    Qwen2VLForConditionalGeneration(Qwen2VLConfig(**facts)).save_pretrained(folder / "model")
    for path in (ROOT / "data/tiny").iterdir():
        if path.name not in ("config.json", "model.safetensors", "training.json"):
            shutil.copy(path, folder / "model")
    (folder / "pictures").mkdir()
    noise = random.Random(0)
    for number in range(6):  # stored as they are, so that all files are of one size
        Image.frombytes("RGB", (56, 56), noise.randbytes(56 * 56 * 3)).save(folder / f"pictures/{number}.png", compress_level=0)
    records = []
    for number in range(8):
        seen = f"<img>{number}.png</img>\n" if number < 6 else ""
        talk = [("user", f"{seen}What is the value of {number}?"), ("assistant", f"It is {number * 7919}" + " and more" * number)]
        records.append({"conversations": [{"from": who, "value": text} for who, text in talk]})
    (folder / "records.json").write_text(json.dumps(records))


def settings_of(inputs: Path, output_dir: Path) -> Settings:
    """Six steps of three rows with dropout, a checkpoint each step, evaluations."""
    return {
        "model": str(inputs / "model"), "train_meta_file": str(inputs / "records.json"), "train_data_dir": str(inputs / "pictures"),
        "eval_meta_file": str(inputs / "records.json"), "eval_steps": 2, "output_dir": str(output_dir), "row_tokens": 100,
        "rows_per_step": 3, "max_steps": STEPS, "save_steps": 1, "save_total_limit": KEPT, "learning_rate": 0.01, "lora_rank": 2,
        "lora_alpha": 4, "lora_dropout": 0.1, "dtype": "float32", "gradient_checkpointing": False, "logging_steps": 1,
    }  # fmt: skip


# --- faults inside a run ---


def on_file_operation(folder: Path, act: Callable[[str, str, Any], object]) -> None:
    """Calls `act(event, path, args)` before each operation of this process on a file or folder in `folder`."""
    me, inside = os.getpid(), str(folder) + os.sep
    places = {"open": None, "os.mkdir": 2, "os.rename": 2, "os.remove": 1, "os.rmdir": 1, "os.link": 2, "os.truncate": None,
              "os.chmod": 2}  # fmt: skip  # where the arguments hold the folder that a path is relative to

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in places and os.getpid() == me and isinstance(args[0], str | os.PathLike):
            path, at = os.fspath(args[0]), places[event]
            if at and args[at] >= 0:
                path = os.path.join(os.readlink(f"/proc/self/fd/{args[at]}"), path)
            if path.startswith(inside):
                act(event, path.removeprefix(inside), args)

    sys.addaudithook(hook)


def writes(event: str, args: Any) -> bool:
    """Whether the operation needs room on the disk."""
    return event in ("os.mkdir", "os.rename") or (event == "open" and bool(args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)))


def noting(folder: Path, log: Path) -> Fault:
    """No fault: writes down each operation and what it is part of."""

    def start(rank: int) -> None:
        file = os.open(log.with_suffix(f".{rank}"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)

        def note(event: str, path: str, args: Any) -> None:
            frame, inside = sys._getframe(), []
            while frame := frame.f_back:  # type: ignore[assignment]
                inside.append(frame.f_code.co_name)
            stage = next((stage for stage in ("rotate", "write_results", "save") if stage in inside), "start")
            os.write(file, f"{stage}\t{event}\t{path}\n".encode())

        on_file_operation(folder, note)

    return start


def dying(folder: Path, number: int, who: int, whole_group: bool, opened: bool) -> Fault:
    """A SIGKILL before the operation; `opened`: where that is to open a file for writing, when it has been made and is empty."""

    def start(rank: int) -> None:
        done = 0

        def die(event: str, path: str, args: Any) -> None:
            nonlocal done
            if done == number:
                if opened and event == "open" and writes(event, args):
                    done += 1  # this very open is an operation, too
                    os.close(os.open(args[0], args[2]))
                os.kill(0 if whole_group else os.getpid(), signal.SIGKILL)
                time.sleep(60)
            done += 1

        if rank == who:
            on_file_operation(folder, die)

    return start


def full_disk(folder: Path, number: int) -> Fault:
    """From this writing operation on, none has room."""

    def start(rank: int) -> None:
        done = 0

        def refuse(event: str, path: str, args: Any) -> None:
            nonlocal done
            done += writes(event, args)
            if done > number and writes(event, args):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / path))

        on_file_operation(folder, refuse)

    return start


def limited_files(limit: int) -> Fault:
    """No file of a process may grow beyond this; the system answers EFBIG, since Python ignores SIGXFSZ."""
    return lambda rank: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def spoiling(what: str, call: int, who: int) -> Fault:
    """A NaN in the loss, its gradient, the evaluation's loss or, after a step of the optimizer, in the weights."""

    def start(rank: int) -> None:
        import torch

        from qwenvl_ft.train import loop

        row_loss, step, calls = loop.row_loss, torch.optim.AdamW.step, Counter[bool]()

        def spoilt(*args: Any) -> Any:
            loss, learns = row_loss(*args), torch.is_grad_enabled()
            calls[learns] += 1
            if rank == who and calls[learns] == call and learns == (what != "evaluation"):
                if what == "gradient":
                    loss.register_hook(lambda gradient: gradient * float("nan"))
                elif what != "weights":
                    return loss * float("nan")
            return loss

        def spoilt_step(self: Any, *args: Any, **kwargs: Any) -> Any:
            done = step(self, *args, **kwargs)
            if what == "weights" and calls[True] >= call:
                self.param_groups[0]["params"][0].data.view(-1)[0] = float("nan")
            return done

        loop.row_loss, torch.optim.AdamW.step = spoilt, spoilt_step  # type: ignore[method-assign]

    return start


# --- looking at what a run left ---


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def losses(folder: Path) -> list[Settings]:
    """metrics.jsonl without what the clock says."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.endswith("_per_s")} for line in lines]


def result(folder: Path) -> Settings:
    """What an uninterrupted run and a resumed one must agree on."""
    return {"weights": sha256(folder / "adapter_model.safetensors"), "losses": losses(folder)}


def half_written(folder: Path, weights: str) -> Iterator[str]:
    """Files that stand under their final name and are not whole."""
    for manifest in folder.glob("checkpoint-*/"):
        try:
            listed = json.loads((manifest / "MANIFEST.json").read_text())
            wrong = [name for name, of in listed.items() if sha256(manifest / name) != of["sha256"]]
        except (OSError, ValueError) as error:
            wrong = [str(error)]
        if wrong:
            yield f"{manifest.name}: {', '.join(wrong)}"
    for path in [*folder.glob("*.json"), *folder.glob("*.jinja"), *folder.glob("*.yaml")]:
        try:
            if not path.read_text().strip() or (path.suffix == ".json" and json.loads(path.read_text()) is None):
                yield path.name
        except ValueError:
            yield path.name
    final = folder / "adapter_model.safetensors"
    if final.is_file() and sha256(final) != weights:
        yield final.name


class Point:
    """One way, one fault, one moment; its folder holds the run."""

    def __init__(self, kind: str, seed: int, work: Path):
        self.kind, self.seed, self.work = kind, seed, work
        self.random = random.Random(f"{kind} {seed}")
        self.way = self.random.choice(KINDS[kind][1])
        self.folder = work / f"{kind} {seed}".replace(" ", "-")
        self.run = self.folder / "run"
        self.settings = settings_of(work, self.run)
        self.note = ""  # what exactly was done, for the report

    @property
    def reference(self) -> Settings:
        """What the uninterrupted run of this way left: see write_reference."""
        found: Settings = json.loads((self.work / self.way / "reference.json").read_text())
        return found

    def train(self, fault: Fault = lambda rank: None, **changed: Any) -> Training:
        """The run under way; resume=True goes on with it."""
        log = self.folder / f"{len(list(self.folder.glob('*.log')))}.log"
        log.touch()
        return Training(WAYS[changed.pop("way", self.way)], self.settings | changed, log, fault)

    def moment(self) -> float:
        """Any second of a run."""
        return self.random.uniform(0, 1.05) * float(self.reference["seconds"])

    def ended(self, run: Training) -> list[int]:
        """Its exit codes, once it has ended by itself and without a traceback."""
        codes, said = run.wait(), run.said()
        if run.hung:
            raise Failed("hung")
        if TRACEBACK in said:
            raise Failed(f"traceback: {[line for line in said.splitlines() if line.strip()][-1][:150]} (exit {codes})")
        return codes

    def refused(self, run: Training, naming: str) -> str:
        """It stopped with exit code 1 and said why."""
        codes, said = self.ended(run), run.said()
        if 1 not in codes or 0 in codes:
            raise Failed(f"was not refused: exit {codes}")
        if "fix:" not in said or not re.search(naming, said):
            raise Failed(f"the refusal names no {naming}: {said.strip()[-200:]!r}")
        return REFUSED

    def equal(self, run: Training) -> str:
        """It ended like the uninterrupted run."""
        codes = self.ended(run)
        if any(codes):
            raise Failed(f"did not finish: exit {codes}: {run.said().strip()[-200:]!r}")
        return self.compared()

    def compared(self) -> str:
        found, wanted = result(self.run), self.reference
        if found["weights"] != wanted["weights"]:
            raise Failed("other weights")
        if found["losses"] != wanted["losses"]:
            raise Failed("the same weights, other losses in metrics.jsonl")
        self.check_whole()
        return RESUMED

    def check_whole(self) -> None:
        if half := list(half_written(self.run, self.reference["weights"])):
            raise Failed(f"half written: {'; '.join(half)}")

    def resumed(self, run: Training) -> str:
        """After `run` was killed: whole files only, and a resume to the same bits."""
        if not any(run.wait()):
            return self.compared()
        self.check_whole()
        return self.equal(self.train(resume=True))

    def copy(self, checkpoints: int) -> None:
        """The folder of the uninterrupted run as a kill in its last step would have left it, with so many checkpoints."""
        shutil.copytree(self.work / self.way / "run", self.run)
        for name in ("adapter_model.safetensors", "all_results.json"):
            (self.run / name).unlink()
        for step in [STEPS, *range(STEPS - checkpoints)]:
            shutil.rmtree(self.run / f"checkpoint-{step}", ignore_errors=True)


def write_reference(way: str, work: Path) -> None:
    """The uninterrupted run of a way."""
    folder = work / way
    folder.mkdir()
    run, began = folder / "run", time.monotonic()
    training = Training(WAYS[way], settings_of(work, run), folder / "log", noting(run, folder / "operations"))
    if any(codes := training.wait()):
        raise Failed(f"the uninterrupted run ended with {codes}: {training.said()[-2000:]}")
    operations = [(folder / f"operations.{rank}").read_text().splitlines() for rank in range(WAYS[way].processes)]
    found = {"seconds": time.monotonic() - began, "operations": operations, **result(run)}
    found["bytes"] = sum(path.stat().st_blocks * 512 for path in run.rglob("*"))
    (folder / "reference.json").write_text(json.dumps(found))


# --- the kinds of fault: each a point to one of the two good outcomes, or Failed ---


def killed_at_any_time(point: Point) -> str:
    """Twice at random; the second time it had gone on, or begun anew."""
    run = point.train()
    for again in (False, True):
        who = point.random.choice([None, 0, WAYS[point.way].processes - 1])
        moment = point.moment()
        point.note += f"{' and ' * again}{'all' if who is None else f'process {who}'} after {moment:.2f} s"
        time.sleep(moment)
        run.kill(signal.SIGKILL, who)
        if not any(run.wait()):
            break
        point.check_whole()
        if not again:
            run = point.train(resume=True)
    return point.resumed(run)


def killed_before(point: Point, stages: tuple[str, ...]) -> str:
    """Before an operation on files; with consecutive seeds, before every one of them."""
    who = point.random.randrange(WAYS[point.way].processes) if point.way.startswith("ZeRO") else 0
    operations = [line.split("\t") for line in point.reference["operations"][who]]
    numbers = [number for number, (stage, _, _) in enumerate(operations) if stage in stages]
    if not numbers:
        raise Failed(f"no file operation was seen in {stages}: the names that `noting` looks for have changed")
    number = numbers[spread(point.seed, len(numbers))]
    whole_group, opened = point.random.random() < 0.5, point.random.random() < 0.5
    point.note = f"process {who} before its operation {number}, {' '.join(operations[number])}{', opened' * opened}"
    return point.resumed(point.train(dying(point.run, number, who, whole_group, opened)))


def killed_in_a_save(point: Point) -> str:
    return killed_before(point, ("save",))


def killed_in_a_rotation(point: Point) -> str:
    return killed_before(point, ("rotate",))


def killed_at_start_or_end(point: Point) -> str:
    return killed_before(point, ("start", "write_results"))


def killed_worker(point: Point) -> str:
    """A process that decodes pictures is killed, as by a system without memory; the run says so, and goes on when resumed."""
    run, moment = point.train(), point.moment()
    point.note = f"after {moment:.2f} s"
    time.sleep(moment)
    workers = [child for pid in run.pids if pid not in run.codes and run.running() for child in children(pid)]
    for worker in workers[:1]:
        os.kill(worker, signal.SIGKILL)
    if any(point.ended(run)):
        point.refused(run, "worker|killed|resume")
    return point.resumed(run)


def damaged_checkpoint(point: Point) -> str:
    """A file of the newest checkpoint, or of both; the resume passes it over and says so, and may be killed and resumed, too."""
    both, then_killed = point.random.random() < 0.2, point.random.random() < 0.3
    point.copy(checkpoints=2)
    files = sorted(
        path.relative_to(point.run / "checkpoint-5") for path in (point.run / "checkpoint-5").rglob("*") if path.is_file()
    )
    grid = [(name, how) for name in files for how in DAMAGES]
    name, how = grid[spread(point.seed, len(grid))]
    point.note = f"{name} of {'both checkpoints' if both else 'checkpoint-5'} {how}{', then killed' * then_killed}"
    same = [damage(point.run / f"checkpoint-{step}" / name, how, point) for step in ([4, 5] if both else [5])]
    if then_killed:
        run = point.train(dying(point.run, point.random.randrange(150), 0, True, False), resume=True)
        run.wait()
    run = point.train(resume=True)
    if both and all(same):
        return point.refused(run, "checkpoint-5: .*\n(.*\n)*.*checkpoint-4: ")
    if any(same) and not then_killed and "passed over checkpoint-5" not in (run.wait() and run.said()):
        raise Failed(f"nothing was said of checkpoint-5: {run.said().strip()[-200:]!r}")
    return point.equal(run)


def damaged_file_of_the_run(point: Point) -> str:
    """A file beside the checkpoints."""
    point.copy(checkpoints=2)
    grid = [(name, how) for name in ("plan.json", "metrics.jsonl", "config.yaml", "base_model.json") for how in DAMAGES]
    name, how = grid[spread(point.seed, len(grid))]
    point.note = f"{name} {how}"
    damage(point.run / name, how, point)
    run = point.train(resume=True)
    return point.refused(run, name) if any(run.wait()) else point.equal(run)


DAMAGES = ("deleted", "emptied", "cut in half", "with one bit flipped", "with a tail of zeros", "of another step")


def damage(path: Path, how: str, point: Point) -> bool:
    """Whether the file is another one now."""
    before = path.read_bytes() if path.is_file() else b""
    after = bytearray(before)
    if how == "with one bit flipped" and before:
        after[point.random.randrange(len(before))] ^= 1 << point.random.randrange(8)
    elif how == "with a tail of zeros":
        after[len(before) // 2 :] = bytes(len(before) - len(before) // 2)
    elif how == "of another step":
        other = point.run.parent / "other" / path.relative_to(point.run)
        shutil.copytree(point.work / point.way / "run", point.run.parent / "other", dirs_exist_ok=True)
        other = Path(str(other).replace(path.parent.name, f"checkpoint-{STEPS}")) if "checkpoint" in path.parent.name else other
        after = bytearray(other.read_bytes() if "checkpoint" in str(other) else before[: before[:-1].rfind(b"\n") + 1])
    else:
        after = after[: len(before) // 2] if how == "cut in half" else bytearray()
    path.unlink(missing_ok=True)
    if how != "deleted":
        path.write_bytes(after)
    return how == "deleted" or after != before


def full(point: Point) -> str:
    """The disk is full, or a file may grow no more; when there is room again, the run goes on."""
    variants = ["a small disk", "no room for an operation"] + ["a limit on files"] * (point.way in ("one", "two"))
    how = point.random.choice(variants)
    if how == "a small disk" and not (point.run.mkdir(parents=True) or mount(point.run, size := int(
            point.random.uniform(0.2, 1.1) * point.reference["bytes"]))):  # fmt: skip
        how = "no room for an operation"
    if how == "a small disk":
        point.note = f"{how} of {size:,} bytes"
        run = point.train()
    elif how == "a limit on files":
        limit = int(2 ** point.random.uniform(14, 17))
        point.note = f"{how} of {limit:,} bytes"
        run = point.train(limited_files(limit))
    else:
        count = sum("open" in line or "mkdir" in line or "rename" in line for line in point.reference["operations"][0])
        number = point.random.randrange(count // 2)
        point.note = f"no room from writing operation {number} on"
        run = point.train(full_disk(point.run, number))
    if any(run.wait()):
        point.refused(run, "No space left|File too large|GiB free")
        if how == "a small disk":
            mount(point.run, 2**28, again=True)
        point.check_whole()
        run = point.train(resume=True)
    return point.equal(run)


def mount(folder: Path, size: int, again: bool = False) -> bool:
    """A disk of this size at the folder, seen by this process and its forks alone; false where that is not permitted."""
    if not again:
        if libc.unshare(0x20000):  # CLONE_NEWNS
            return False
        libc.mount(None, b"/", None, 0x44000, None)  # MS_REC | MS_PRIVATE
    return not libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", 32 * again, f"size={size}".encode())  # MS_REMOUNT


def signalled(point: Point) -> str:
    """A signal to one process or to all: what is done is saved, the exit code says which signal, the resume ends alike."""
    number = point.random.choice([signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    who, moment = point.random.choice([None, None, 0]), point.moment()
    point.note = f"{number.name} to {'the group' if who is None else 'the first process'} after {moment:.2f} s"
    run = point.train()
    time.sleep(moment)
    run.kill(number, who)
    codes = run.wait()
    began = (point.run / "metrics.jsonl").is_file() and (point.run / "metrics.jsonl").read_text()
    if not any(codes):
        return point.equal(run)
    if began or run.hung:  # before the first step it may die as it likes
        point.ended(run)
        if codes[0] != 128 + number:
            raise Failed(f"exit {codes} after {number.name}: {run.said().strip()[-200:]!r}")
        last = losses(point.run)[-1]["step"]
        if not (point.run / f"checkpoint-{last}").is_dir():
            raise Failed(f"step {last} was done and not saved")
    if left := orphans(3):
        raise Failed(f"{left} ran on")
    return point.resumed(run)


def two_runs_at_once(point: Point) -> str:
    """Another run of another seed in the same folder: one is refused, the other is as it was alone."""
    moment = point.random.uniform(0, 0.7) * float(point.reference["seconds"])
    point.note = f"the other, of another seed, after {moment:.2f} s"
    first = point.train()
    time.sleep(moment)
    resume = point.random.random() < 0.5
    second = point.train(seed=7, resume=resume)
    codes = first.wait(), second.wait()
    if any(codes[0]) == any(codes[1]):
        raise Failed(f"exit {codes[0]} and {codes[1]}, so both ran or none")
    if any(codes[0]):
        point.refused(first, "run|output_dir")
        alone = point.folder / "alone"
        point.ended(point.train(seed=7, output_dir=str(alone)))
        if result(alone) != result(point.run):
            raise Failed("the other run won, and is not as it was alone")
        return RESUMED
    point.refused(second, "run|output_dir")
    return point.equal(first)


def changed_inputs(point: Point) -> str:
    """The run is killed, something that it reads is changed, and the resume is refused and names it."""
    name, (changed, naming) = list(CHANGES.items())[spread(point.seed, len(CHANGES))]
    point.note = name
    inputs = point.folder / "inputs"
    for part in ("model", "pictures"):
        shutil.copytree(point.work / part, inputs / part)
    shutil.copy(point.work / "records.json", inputs)
    point.settings = settings_of(inputs, point.run)
    run, deadline = point.train(), time.monotonic() + 60
    while not (point.run / "checkpoint-2").is_dir() and run.running() and time.monotonic() < deadline:
        time.sleep(0.002)
    run.kill(signal.SIGKILL)
    run.wait()
    return point.refused(point.train(resume=True, **(changed(inputs) or {})), naming)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    if old not in text:
        raise ValueError(f"{path} holds no {old}")
    path.write_text(text.replace(old, new, 1))


def poke(path: Path, at: int) -> None:
    """One bit of one byte, `at` counted from the end where it is negative; the file keeps its size."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def repaint(inputs: Path) -> None:
    from PIL import Image

    shown = Image.open(inputs / "pictures/3.png").convert("RGB")
    shown.putpixel((30, 30), tuple(255 - value for value in shown.getpixel((30, 30))))  # type: ignore[union-attr, arg-type]
    shown.save(inputs / "pictures/3.png", compress_level=0)


def swap(inputs: Path) -> None:
    one, other = inputs / "pictures/0.png", inputs / "pictures/1.png"
    aside = one.rename(inputs / "aside")
    other.rename(one)
    aside.rename(other)


def poke_weights(inputs: Path) -> None:
    """The first byte of the largest tensor, far from its middle."""
    from qwenvl_ft.folders.adapter import read_header

    largest = max(read_header(inputs / "model/model.safetensors")[1], key=lambda tensor: tensor.num_bytes)
    poke(inputs / "model/model.safetensors", largest.start)


def new_mean(inputs: Path) -> None:
    path = inputs / "model/processor_config.json"
    facts = json.loads(path.read_text())
    facts["image_processor"]["image_mean"] = [0.4, 0.4, 0.4]
    path.write_text(json.dumps(facts))


# What is changed, how (settings that a function returns are the resume's), and what the refusal must name.
CHANGES: dict[str, tuple[Callable[[Path], Settings | None], str]] = {
    "an answer": (lambda inputs: edit(inputs / "records.json", "It is 7919", "It is 7918"), "training records"),
    "a record less": (lambda inputs: edit(inputs / "records.json", "[{", '[{"conversations": []}, {'), "record"),
    "a pixel of a picture": (repaint, "pictures? "),
    "the names of two pictures": (swap, "pictures? "),
    "max_pixels": (lambda inputs: {"max_pixels": 3136 // 2 * 2}, "max_pixels"),
    "a weight of the base": (poke_weights, "base model|weights"),
    "the mean of the processor": (new_mean, "processor|mean|base model"),
    "the chat template": (lambda inputs: edit(inputs / "model/chat_template.jinja", "assistant", "helper"), "records|template"),
    "the learning rate": (lambda inputs: {"learning_rate": 0.02}, "learning_rate was 0.01 and is now 0.02"),
    "the seed": (lambda inputs: {"seed": 7}, "seed was 42 and is now 7"),
    "the number of processes": (lambda inputs: {"way": "two"}, "process"),
}


def not_a_number(point: Point) -> str:
    """A NaN stops the run in words, and the newest checkpoint goes on to the same bits once the cause is gone."""
    what, changed, fault = point.random.choice(["base", "loss", "gradient", "evaluation", "weights", "learning rate"]), {}, None
    processes, zero = WAYS[point.way].processes, point.way.startswith("ZeRO")
    if what in ("base", "learning rate") or (zero and what == "weights"):
        rate = point.random.choice([1e30, 1e38, 1e39])
        if what == "base":
            changed["model"] = str(nan_base(point))
        else:
            changed["learning_rate"] = rate
        point.note = f"in the weights of the base, {what}" if what == "base" else f"learning_rate={rate}"
        outcome = point.refused(point.train(**changed), "learning_rate|finite|nan|NaN")
        if (point.run / "adapter_model.safetensors").exists():
            raise Failed("left a final adapter")
        return outcome
    call, who = point.random.randint(1, 9), point.random.randrange(processes)
    call = (call - 1) // processes + 1 if what != "evaluation" else point.random.randint(1, 7)
    point.note = f"in the {what}, pass {call} of process {who}"
    fault = spoiling(what, call, who)
    run = point.train(fault)
    point.refused(run, "finite|nan|NaN")
    for name in ("metrics.jsonl", "all_results.json"):
        if (point.run / name).is_file() and "NaN" in (point.run / name).read_text():
            raise Failed(f"NaN in {name}, which is no JSON")
    return point.resumed(run)


def nan_base(point: Point) -> Path:
    """The base with one NaN in its largest tensor but the embeddings."""
    from qwenvl_ft.folders.adapter import read_header

    folder = shutil.copytree(point.work / "model", point.folder / "model")
    tensors = read_header(folder / "model.safetensors")[1]
    place = next(tensor for tensor in tensors if tensor.key.endswith("layers.1.mlp.down_proj.weight")).start
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[place : place + 4] = b"\x00\x00\xc0\x7f"
    (folder / "model.safetensors").write_bytes(content)
    return folder


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def spread(seed: int, count: int) -> int:
    """A number below `count`, another one for each of `count` consecutive seeds, and far from the last."""
    stride = next(stride for stride in range(max(1, round(count * 0.618)), 2 * count + 2) if _coprime(stride, count))
    return seed * stride % count


def _coprime(one: int, other: int) -> bool:
    while other:
        one, other = other, one % other
    return one == 1


ONE, ALL = ["one"], ["one", "one", "one, 2 workers", "two", "two, 1 worker", "ZeRO-2", "ZeRO-3"]
KINDS: dict[str, tuple[Callable[[Point], str], list[str]]] = {
    "killed at any time": (killed_at_any_time, ALL),
    "killed in a save": (killed_in_a_save, [*ONE * 6, "two", "ZeRO-2", "ZeRO-3"]),
    "killed in a rotation": (killed_in_a_rotation, [*ONE * 6, "two", "ZeRO-2"]),
    "killed at start or end": (killed_at_start_or_end, [*ONE * 4, "two"]),
    "killed worker": (killed_worker, ["one, 2 workers", "two, 1 worker"]),
    "damaged checkpoint": (damaged_checkpoint, [*ONE * 3, "two", "ZeRO-2", "ZeRO-3"]),
    "damaged file of the run": (damaged_file_of_the_run, [*ONE * 4, "two"]),
    "full disk": (full, [*ONE * 4, "two", "ZeRO-2", "ZeRO-3"]),
    "signal": (signalled, ALL),
    "two runs at once": (two_runs_at_once, [*ONE * 2, "one, 2 workers", "two"]),
    "changed inputs": (changed_inputs, ONE),
    "NaN": (not_a_number, [*ONE * 3, "two", "ZeRO-2", "ZeRO-3"]),
}


# --- the battery ---


def judge(kind: str, seed: int, work: Path) -> tuple[str, str]:
    """The outcome of one point, and what was done."""
    adopt_orphans()
    point = Point(kind, seed, work)
    point.folder.mkdir()
    try:
        outcome = KINDS[kind][0](point)
        if left := orphans(10):
            raise Failed(f"left processes running: {left}")
    except Failed as error:
        outcome = f"{FAILED}: {error}"
    return outcome, f"{point.way}; {point.note}"


def in_fork(work: Callable[[], object], answer: Path) -> int:
    """The process that writes what `work` returns to `answer`, as JSON."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    try:
        answer.write_text(json.dumps(work()))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def points(base: int, only: str | None) -> Iterator[tuple[str, int]]:
    """Kind and seed of every point there is, kinds in turn."""
    seed = base
    while True:
        for kind in [only] if only else KINDS:
            yield kind, seed
        seed += 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, help="no new point after these")
    parser.add_argument("--points", type=int, help="how many; 25 without --minutes, one with --only")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(2), "big"), help="of the first point of each kind")
    parser.add_argument("--only", choices=KINDS, help="points of this kind alone")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="points at a time")
    parser.add_argument("--keep", type=Path, help="a new folder for the runs, which then stay there")
    asked = parser.parse_args()
    count = asked.points or (None if asked.minutes else 1 if asked.only else 25)
    print(f"seed {asked.seed}", flush=True)
    work = asked.keep or Path(tempfile.mkdtemp(prefix="torture-"))
    work.mkdir(parents=True, exist_ok=bool(asked.keep is None))
    try:
        return run(work.resolve(), points(asked.seed, asked.only), count, asked.minutes, asked.jobs, asked.keep is not None)
    finally:
        if not asked.keep:
            shutil.rmtree(work, ignore_errors=True)


def run(work: Path, wanted: Iterator[tuple[str, int]], count: int | None, minutes: float | None, jobs: int, keep: bool) -> int:
    """Prints each point's outcome and the table; 1 if any failed."""
    import_everything()
    chosen = [next(wanted) for _ in range(count)] if count else []
    ways = sorted({Point(kind, seed, work).way for kind, seed in chosen}) if count else list(WAYS)
    for job in [lambda: write_inputs(work), *((lambda way=way: write_reference(way, work)) for way in ways)]:  # type: ignore[misc]
        if os.waitpid(in_fork(job, work / "answer"), 0)[1]:
            return 1
    began, under_way, table = time.monotonic(), dict[int, tuple[str, int, float]](), Counter[tuple[str, str]]()
    repeats: list[str] = []
    source = iter(chosen) if count else wanted
    while True:
        while len(under_way) < jobs and not (minutes and time.monotonic() - began > 60 * minutes) and (point := next(source, None)):
            kind, seed = point
            pid = in_fork(lambda kind=kind, seed=seed: judge(kind, seed, work), work / f"{kind} {seed}.json")  # type: ignore[misc]
            under_way[pid] = (kind, seed, time.monotonic())
        if not under_way:
            break
        kind, seed, start = under_way.pop(os.wait()[0])
        answer = work / f"{kind} {seed}.json"
        outcome, note = (
            json.loads(answer.read_text()) if answer.is_file() and answer.read_text() else (f"{FAILED}: the harness", "")
        )
        print(f"{kind} {seed} ({note}): {outcome} [{time.monotonic() - start:.1f} s]", flush=True)
        table[kind, outcome.split(":")[0]] += 1
        if outcome.startswith(FAILED):
            repeats.append(f'python scripts/torture.py --only "{kind}" --seed {seed}')
        if not keep:
            shutil.rmtree(work / f"{kind} {seed}".replace(" ", "-"), ignore_errors=True)
    outcomes = (RESUMED, REFUSED, FAILED)
    print(f"\n{'':26}{''.join(f'{outcome:>20}' for outcome in outcomes)}")
    for kind in [*(kind for kind in KINDS if any(of == kind for of, _ in table)), "all"]:
        counts = [sum(number for (of, said), number in table.items() if kind in (of, "all") and said == out) for out in outcomes]
        print(f"{kind:26}{''.join(f'{number:20}' for number in counts)}")
    print(f"{time.monotonic() - began:.0f} s" + "".join(f"\nfailed; again: {line}" for line in repeats))
    return int(bool(repeats))


if __name__ == "__main__":
    sys.exit(main())
