"""The kinds of fault: each takes a point to one of the two good outcomes, or raises Failed."""

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from math import gcd
from pathlib import Path
from typing import NamedTuple

from tests.torture.faults import dying, full_disk, keeping_features, limited_files, spoiling
from tests.torture.forks import children, libc, orphans
from tests.torture.points import KEPT, RESUMED, STEPS, WAYS, Failed, Point, Settings, result, settings_of

DAMAGES = ("deleted", "emptied", "cut in half", "with one bit flipped", "with a tail of zeros", "of another step")
CLONE_NEWNS, MS_REMOUNT, MS_REC_PRIVATE = 0x20000, 0x20, 0x44000


def spread(seed: int, count: int) -> int:
    """A number below `count`: another one for each of `count` consecutive seeds, and far from the one before."""
    stride = next(stride for stride in range(round(count * 0.618) or 1, 2 * count + 2) if gcd(stride, count) == 1)
    return seed * stride % count


def killed_at_any_time(point: Point) -> str:
    """Twice: the run, and the one that went on with it."""
    run = point.train()
    for again in (False, True):
        who, moment = point.random.choice([None, 0, WAYS[point.way].processes - 1]), point.moment()
        point.note += f"{' and ' * again}{'all' if who is None else f'process {who}'} after {moment:.2f} s"
        time.sleep(moment)
        run.kill(signal.SIGKILL, who)
        if not any(run.wait()):
            break
        point.check_whole()
        if not again:
            run = point.resume()
    return point.equal_after(run)


def killed_in(point: Point, *stages: str) -> str:
    """Before an operation on files; before every one of them with as many consecutive seeds."""
    who = point.random.randrange(2) if point.way.startswith("ZeRO") else 0
    who = who if point.reference["operations"][who] else 0  # the second process may have nothing to do with the run's files
    operations = [line.split("\t") for line in point.reference["operations"][who]]
    numbers = [number for number, (stage, *_) in enumerate(operations) if stage in stages]
    if not numbers and who == 0:
        raise Failed(f"no operation was seen in {' or '.join(stages)}: are the functions called so?")
    number = numbers[spread(point.seed, len(numbers))] if numbers else len(operations) // 2
    group, opened = point.random.random() < 0.5, point.random.random() < 0.5
    point.note = f"process {who} before operation {number}: {' '.join(operations[number][1:3])}{', opened' * opened}"
    return point.equal_after(point.train(dying(point.run, number, who, group, opened)))


def killed_in_a_save(point: Point) -> str:
    return killed_in(point, "save")


def killed_in_a_rotation(point: Point) -> str:
    return killed_in(point, "rotate")


def killed_at_start_or_end(point: Point) -> str:
    return killed_in(point, "start", "write_results")


def killed_keeping_features(point: Point) -> str:
    """While a row of them is written; before the run goes on one of those that are kept may be damaged."""
    number, share = point.random.randrange(5), point.random.choice([0, 0.5, 1])
    point.note = f"row {number}, {share:.0%} of it written"
    run = point.train(keeping_features(point.folder / "cache", number, share))
    if not any(run.wait()):
        return point.equal(run)
    point.check_whole()
    parts = sorted(part for part in (point.folder / "cache").rglob("*.part") if part.stat().st_size)
    if parts and point.random.random() < 0.5:
        damaged = bytearray(parts[0].read_bytes())
        damaged[point.random.randrange(len(damaged))] ^= 1 << point.random.randrange(8)
        parts[0].write_bytes(damaged)
        point.note += ", and one damaged"
    return point.equal(point.resume(keeping_features(point.folder / "cache")))


def killed_worker(point: Point) -> str:
    """A process that decodes pictures is killed, as where memory runs out: the run says so, and can be resumed."""
    run, moment = point.train(), point.moment()
    point.note = f"after {moment:.2f} s"
    time.sleep(moment)
    for worker in [child for pid in run.pids if run.running() and pid not in run.codes for child in children(pid)][:1]:
        os.kill(worker, signal.SIGKILL)
    if any(run.wait()):
        point.refused(run, "worker|process|resume")
    return point.equal_after(run)


def damaged_checkpoint(point: Point) -> str:
    """A file of one checkpoint or several; what resumes passes over them and says so, and may be killed and resumed itself."""
    point.copy()
    steps = point.random.choice([[5], [5], [4, 5], [3, 4, 5]])
    killed = len(steps) < 3 and point.random.random() < 0.4
    newest = point.run / "checkpoint-5"
    grid = [(path.relative_to(newest), how) for path in sorted(newest.rglob("*")) if path.is_file() for how in DAMAGES]
    name, how = grid[spread(point.seed, len(grid))]
    point.note = f"{name} of {len(steps)} checkpoints {how}{', then killed with one kept' * killed}"
    other = [damage(point, f"checkpoint-{step}/{name}", how) for step in steps]
    changed = {"save_total_limit": 1 if killed else KEPT}
    if killed:
        point.resume(dying(point.run, point.random.randrange(150)), changed=changed).wait()
    run = point.resume(changed=changed)
    if len(steps) == 3 and all(other):
        return point.refused(run, r"checkpoint-5: (.|\n)*checkpoint-4: (.|\n)*checkpoint-3: ")
    outcome = point.equal(run)
    if any(other) and not killed and "passed over checkpoint-5" not in run.said():
        raise Failed("a damaged checkpoint was used without a word")
    return outcome


def damaged_file_of_the_run(point: Point) -> str:
    """A file beside the checkpoints."""
    point.copy()
    grid = [(name, how) for name in ("plan.json", "metrics.jsonl", "config.yaml", "base_model.json") for how in DAMAGES[:-1]]
    name, how = grid[spread(point.seed, len(grid))]
    point.note = f"{name} {how}"
    damage(point, name, how)
    run = point.resume()
    return point.refused(run, re.escape(name)) if any(run.wait()) else point.equal(run)


def damage(point: Point, name: str, how: str) -> bool:
    """Whether the file is another one now."""
    path = point.run / name
    before = path.read_bytes() if path.is_file() else b""
    after, half = bytearray(before), len(before) // 2
    if how == "of another step":
        other = point.work / point.way / "run" / f"checkpoint-{STEPS}" / Path(*Path(name).parts[1:])
        after = bytearray(other.read_bytes())
    elif how == "with one bit flipped" and before:
        after[point.random.randrange(len(before))] ^= 1 << point.random.randrange(8)
    elif how == "with a tail of zeros":
        after[half:] = bytes(len(before) - half)
    else:
        del after[half if how == "cut in half" else 0 :]
    path.unlink(missing_ok=True)
    if how != "deleted":
        path.write_bytes(after)
    return how == "deleted" or after != before


def full(point: Point) -> str:
    """The disk is full, or a file may grow no more; with room again, the run goes on."""
    hows = ["a small disk", "no room from a write on", *["small files"] * (point.way in ("one", "two"))]
    how, share = point.random.choice(hows), point.random.random()
    point.run.mkdir()
    if how == "a small disk" and mount(point.run, size := int((0.2 + share) * point.reference["bytes"])):
        point.note = f"{how} of {size:,} bytes"
        run = point.train()
    elif how == "small files":
        point.note = f"no file over {(limit := int(2 ** (14 + 3 * share))):,} bytes"
        run = point.train(limited_files(limit))
    else:
        number = int(share * sum(line.endswith("1") for line in point.reference["operations"][0]))
        point.note = f"no room from write {number} on"
        run = point.train(full_disk(point.run, number))
    if any(run.wait()):
        point.refused(run, "No space left|File too large")
        if how == "a small disk":
            mount(point.run, 2**28, again=True)
        return point.equal_after(run)
    return point.equal(run)


def mount(folder: Path, size: int, again: bool = False) -> bool:
    """A disk of this size at the folder, which this process and its forks see; or another size. False where that is not permitted."""
    if not again and (libc.unshare(CLONE_NEWNS) or libc.mount(None, b"/", None, MS_REC_PRIVATE, None)):
        return False
    return not libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", MS_REMOUNT * again, f"size={size}".encode())


def signalled(point: Point) -> str:
    """To one process or to all: what is done is saved, the exit code says which signal, and nothing runs on."""
    number = point.random.choice([signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    who, moment = point.random.choice([None, None, 0]), point.moment()
    point.note = f"{number.name} to {'the group' if who is None else 'the first process'} after {moment:.2f} s"
    run = point.train()
    time.sleep(moment)
    run.kill(number, who)
    codes = run.wait()
    metrics, finished = point.run / "metrics.jsonl", (point.run / "all_results.json").is_file()
    # Before the first step, and once everything is written, it may die as it likes.
    if any(codes) and not finished and metrics.is_file() and (done := len(metrics.read_text().splitlines())):
        point.ended(run)
        if codes[0] != 128 + number:
            raise Failed(f"exit {codes}: {run.said().strip()[-200:]!r}")
        if not (point.run / f"checkpoint-{done}").is_dir():
            raise Failed(f"step {done} was done and not saved")
    if left := orphans(6):
        raise Failed(f"left processes running: {left}")
    return point.equal_after(run)


def two_runs_at_once(point: Point) -> str:
    """Another run, of another seed, in the same folder: one is refused, the other ends as if it had been alone."""
    moment, resume = point.moment(0.7), point.random.random() < 0.5
    point.note = f"another seed after {moment:.2f} s{', with resume' * resume}"
    runs = [point.train()]
    time.sleep(moment)
    runs.append(point.train(changed={"seed": 7, "resume": resume}))
    codes = [run.wait() for run in runs]
    if any(codes[0]) == any(codes[1]):
        raise Failed(f"exit {codes[0]} and {codes[1]}: {'none' if any(codes[0]) else 'both'} ran")
    if not any(codes[0]):
        point.refused(runs[1], "run")
        return point.equal(runs[0])
    point.refused(runs[0], "run")
    point.ended(point.train(changed={"seed": 7, "output_dir": str(point.folder / "alone")}))
    if result(point.folder / "alone") != result(point.run):
        raise Failed("the other run was not refused, and did not end as if it had been alone")
    return RESUMED


def changed_inputs(point: Point) -> str:
    """The run is killed, something that it reads is changed, and the resume is refused and names it."""
    point.note, change = list(CHANGES.items())[spread(point.seed, len(CHANGES))]
    inputs = point.folder / "inputs"
    for part in ("model", "pictures"):
        shutil.copytree(point.work / part, inputs / part)
    shutil.copy(point.work / "records.json", inputs)
    point.settings = settings_of(inputs, point.run)
    run = point.train()
    while run.running() and not (point.run / "checkpoint-2").is_dir():
        time.sleep(0.002)
    run.kill(signal.SIGKILL)
    run.wait()
    change.files(inputs)
    run = point.resume(way=change.way, changed=change.settings)
    return point.refused(run, change.naming) if change.naming else point.equal(run)


class Change(NamedTuple):
    """What is another at the resume, and what the refusal must name; nothing for what the result does not depend on."""

    naming: str
    files: Callable[[Path], object] = lambda inputs: None
    settings: Settings | None = None
    way: str | None = None


def replacing(name: str, old: str, new: str) -> Callable[[Path], object]:
    """Another text in a file of the inputs."""

    def change(inputs: Path) -> None:
        before = (inputs / name).read_text()
        if (after := before.replace(old, new, 1)) == before:
            raise ValueError(f"{name} does not hold {old}")
        (inputs / name).write_text(after)

    return change


def repaint(inputs: Path) -> None:
    """One pixel; the file keeps its size."""
    from PIL import Image

    path = inputs / "pictures/3.png"
    with Image.open(path) as picture:
        picture.putpixel((30, 30), (0, 0, 0))
        picture.save(path, compress_level=0)


def swap(inputs: Path) -> None:
    """The names of two pictures."""
    for old, new in (("0.png", "aside"), ("1.png", "0.png"), ("aside", "1.png")):
        (inputs / "pictures" / old).rename(inputs / "pictures" / new)


def poke_weights(inputs: Path) -> None:
    """The last bit of the first value of the first tensor, which is a large one."""
    path = inputs / "model/model.safetensors"
    content = bytearray(path.read_bytes())
    content[8 + int.from_bytes(content[:8], "little")] ^= 1
    path.write_bytes(content)


def drop_record(inputs: Path) -> None:
    path = inputs / "records.json"
    path.write_text(json.dumps(json.loads(path.read_text())[:-1]))


CHANGES = {
    "an answer": Change("training records", replacing("records.json", "It is 7919", "It is 7918")),
    "a record less": Change("training records", drop_record),
    "a pixel of a picture": Change("picture", repaint),
    "the names of two pictures": Change("picture", swap),
    "a weight of the base": Change("base model|weights", poke_weights),
    "the mean of the processor": Change("processor|mean|base", replacing("model/processor_config.json", "0.48145466", "0.4")),
    "the chat template": Change("training records|template", replacing("model/chat_template.jinja", "assistant", "helper")),
    "max_pixels": Change("max_pixels", settings={"max_pixels": 3136}),
    "the learning rate": Change("learning_rate was 0.01 and is now 0.02", settings={"learning_rate": 0.02}),
    "the seed": Change("seed was 42 and is now 7", settings={"seed": 7}),
    "ZeRO": Change("DeepSpeed", way="ZeRO-2"),
    "the number of workers": Change("", way="one, 2 workers"),
    "how often it saves": Change("", settings={"save_steps": 2}),
}


def not_a_number(point: Point) -> str:
    """It stops the run in words; without it, the newest checkpoint goes on to the same bits."""
    processes, zero = WAYS[point.way].processes, point.way.startswith("ZeRO")
    what = point.random.choice(["base", "learning rate", "loss", "gradient", "evaluation", *["weights"] * (not zero)])
    if what in ("base", "learning rate"):
        changed: Settings = {"learning_rate": point.random.choice([1e30, 1e38, 1e39])}
        point.note = f"from {changed}"
        if what == "base":
            model = shutil.copytree(point.work / "model", point.folder / "model")
            weights = (model / "model.safetensors").read_bytes()
            (model / "model.safetensors").write_bytes(weights[:-4] + b"\0\0\xc0\x7f")  # in what sees the pictures
            changed, point.note = {"model": str(model)}, "in the base"
        outcome = point.refused(point.train(changed=changed), "learning_rate|finite|nan|NaN")
        if (point.run / "adapter_model.safetensors").exists():
            raise Failed("left a final adapter")
        return outcome
    who, number = point.random.randrange(processes), point.random.randint(1, 7 if what == "evaluation" else 14)
    number = (number - 1) // processes + 1
    point.note = f"in the {what}, row {number} of process {who}"
    run = point.train(spoiling(what, number, who))
    point.refused(run, "finite|nan|NaN|inf")
    for name in ("metrics.jsonl", "all_results.json"):
        if (point.run / name).is_file() and "NaN" in (point.run / name).read_text():
            raise Failed(f"NaN in {name}, which is no JSON")
    return point.equal_after(run)


ONE, ALL = ["one"], ["one", "one", "one, 2 workers", "two", "two, 1 worker", "ZeRO-2", "ZeRO-3"]
# The ways that each is tried in, and as often as they are named.
KINDS: dict[str, tuple[Callable[[Point], str], list[str]]] = {
    "killed at any time": (killed_at_any_time, ALL),
    "killed in a save": (killed_in_a_save, [*ONE * 6, "two", "ZeRO-2", "ZeRO-3"]),
    "killed in a rotation": (killed_in_a_rotation, [*ONE * 6, "two", "ZeRO-2"]),
    "killed at start or end": (killed_at_start_or_end, [*ONE * 4, "two"]),
    "killed keeping features": (killed_keeping_features, ["one", "one, 2 workers", "two"]),
    "killed worker": (killed_worker, ["one, 2 workers", "two, 1 worker"]),
    "damaged checkpoint": (damaged_checkpoint, [*ONE * 3, "two", "ZeRO-2", "ZeRO-3"]),
    "damaged file of the run": (damaged_file_of_the_run, [*ONE * 4, "two"]),
    "full disk": (full, [*ONE * 4, "two", "ZeRO-2", "ZeRO-3"]),
    "signal": (signalled, ALL),
    "two runs at once": (two_runs_at_once, [*ONE * 2, "one, 2 workers", "two"]),
    "changed inputs": (changed_inputs, ONE),
    "NaN": (not_a_number, [*ONE * 3, "two", "ZeRO-2", "ZeRO-3"]),
}
