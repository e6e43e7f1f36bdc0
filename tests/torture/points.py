"""A point of the battery: what its runs train, what an uninterrupted run leaves, and how another is compared with it."""

import hashlib
import json
import random
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.torture.faults import noting
from tests.torture.forks import ROOT, Fault, Training, Way

WAYS = {
    "one": Way(), "one, 2 workers": Way(workers=2), "two": Way(2), "two, 1 worker": Way(2, workers=1),
    "ZeRO-2": Way(2, zero_stage=2), "ZeRO-3": Way(2, zero_stage=3),
}  # fmt: skip
STEPS, KEPT = 6, 4
RESUMED, REFUSED = "resumed bit-equal", "refused in words"
Settings = dict[str, Any]


class Failed(Exception):
    """What a point met and must not meet."""


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
        Image.frombytes("RGB", (84, 84), noise.randbytes(84 * 84 * 3)).save(folder / f"pictures/{number}.png", compress_level=0)
    records = []
    for number in range(8):
        seen = f"<img>{number}.png</img>\n" if number < 6 else ""
        talk = [("user", f"{seen}What is the value of {number}?"), ("assistant", f"It is {number * 7919}" + " and more" * number)]
        records.append({"conversations": [{"from": who, "value": text} for who, text in talk]})
    (folder / "records.json").write_text(json.dumps(records))


def settings_of(inputs: Path, output_dir: Path) -> Settings:
    """Six steps of three rows with dropout, a checkpoint each step, an evaluation each second."""
    return {
        "model": str(inputs / "model"), "train_meta_file": str(inputs / "records.json"), "train_data_dir": str(inputs / "pictures"),
        "eval_meta_file": str(inputs / "records.json"), "eval_steps": 2, "output_dir": str(output_dir), "row_tokens": 100,
        "rows_per_step": 3, "max_steps": STEPS, "save_steps": 1, "save_total_limit": KEPT, "learning_rate": 0.01, "lora_rank": 2,
        "lora_alpha": 4, "lora_dropout": 0.1, "dtype": "float32", "gradient_checkpointing": False, "logging_steps": 1,
    }  # fmt: skip


def write_reference(way: str, work: Path) -> None:
    """The uninterrupted run of a way: its folder, and what is compared of it."""
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


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def losses(folder: Path) -> list[Settings]:
    """metrics.jsonl without what the clock says."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    measured = ("_per_s", "_wait_s", "_memory_gib")  # of the machine, not of the run
    return [{key: value for key, value in line.items() if not key.endswith(measured)} for line in lines]


def result(folder: Path) -> Settings:
    """What an uninterrupted run and a resumed one must agree on."""
    return {"weights": sha256(folder / "adapter_model.safetensors"), "losses": losses(folder)}


def half_written(folder: Path, weights: str) -> Iterator[str]:
    """What stands under its final name and is not whole: checkpoints against their manifest, the adapter, texts."""
    for checkpoint in folder.glob("checkpoint-*/"):
        try:
            listed = json.loads((checkpoint / "MANIFEST.json").read_text())
            yield from (f"{checkpoint.name}/{name}" for name, of in listed.items() if sha256(checkpoint / name) != of["sha256"])
        except (OSError, ValueError) as error:
            yield f"{checkpoint.name} ({error})"
    for path in [*folder.glob("*.json"), *folder.glob("*.jinja"), *folder.glob("*.yaml")]:
        try:
            if not (text := path.read_text()) or (path.suffix == ".json" and json.loads(text) is None):
                yield path.name
        except ValueError:
            yield path.name
    if (final := folder / "adapter_model.safetensors").is_file() and sha256(final) != weights:
        yield final.name


class Point:
    """A kind of fault and a seed, from which all that is random follows; its folder holds the run."""

    def __init__(self, kind: str, ways: list[str], seed: int, work: Path):
        self.kind, self.seed, self.work = kind, seed, work
        self.random = random.Random(f"{kind} {seed}")
        self.way = self.random.choice(ways)
        self.folder = work / f"{kind} {seed}".replace(" ", "-")
        self.run = self.folder / "run"
        self.settings = settings_of(work, self.run)
        self.note = ""  # what exactly was done, for the report

    @property
    def reference(self) -> Settings:
        """What write_reference found."""
        found: Settings = json.loads((self.work / self.way / "reference.json").read_text())
        return found

    def moment(self, share: float = 1.05) -> float:
        """A second of a run, up to that share of it."""
        return self.random.uniform(0, share) * float(self.reference["seconds"])

    def train(self, fault: Fault = lambda rank: None, way: str | None = None, changed: Settings | None = None) -> Training:
        """The run under way, or one with some settings changed."""
        log = self.folder / f"{len(list(self.folder.glob('*.log')))}.log"
        log.touch()
        return Training(WAYS[way or self.way], self.settings | (changed or {}), log, fault)

    def resume(self, fault: Fault = lambda rank: None, way: str | None = None, changed: Settings | None = None) -> Training:
        """Goes on with it."""
        return self.train(fault, way, {"resume": True, **(changed or {})})

    def copy(self) -> None:
        """The folder as a kill in the last step leaves it: from the uninterrupted run, with checkpoint-3 to 5."""
        shutil.copytree(self.work / self.way / "run", self.run)
        for name in ("adapter_model.safetensors", "all_results.json"):
            (self.run / name).unlink()
        shutil.rmtree(self.run / f"checkpoint-{STEPS}")

    def ended(self, run: Training) -> list[int]:
        """Its exit codes, once it has ended by itself and without a traceback."""
        codes, said = run.wait(), run.said()
        if run.hung:
            raise Failed("hung")
        if "Traceback (most recent call last)" in said:
            errors = [
                line[:150] for line in said.splitlines() if re.match(r"(\[rank\d\]: )?[\w.]*(Error|Exception|Interrupt)\b", line)
            ]
            raise Failed(
                f"traceback: {' / '.join(dict.fromkeys(errors)) or 'of a process that was ended meanwhile'} (exit {codes})"
            )
        return codes

    def refused(self, run: Training, naming: str) -> str:
        """It stopped with exit code 1 and said why."""
        codes, said = self.ended(run), run.said()
        if 1 not in codes or 0 in codes:
            raise Failed(f"was not refused: exit {codes}")
        if "fix:" not in said or not re.search(naming, said):
            raise Failed(f"the refusal does not name {naming}: {said.strip()[-200:]!r}")
        return REFUSED

    def equal(self, run: Training) -> str:
        """It ended as the uninterrupted run did."""
        if any(codes := self.ended(run)):
            raise Failed(f"did not finish: exit {codes}: {run.said().strip()[-200:]!r}")
        found = result(self.run)
        if changed := [key for key in found if found[key] != self.reference[key]]:
            raise Failed(f"finished with other {' and '.join(changed)}")
        self.check_whole()
        return RESUMED

    def equal_after(self, run: Training) -> str:
        """After `run` was cut off: whole files only, and a resume that ends as the uninterrupted run did."""
        if not any(run.wait()):
            return self.equal(run)
        self.check_whole()
        return self.equal(self.resume())

    def check_whole(self) -> None:
        """No file is half written under its name."""
        if half := list(half_written(self.run, self.reference["weights"])):
            raise Failed(f"half written: {', '.join(half)}")
