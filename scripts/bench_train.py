"""Trains the same tiny model on the same records with this project, ms-swift, LLaMA-Factory, TRL and Qwen's recipe, side by side.

    python scripts/bench_train.py [--sets one five mixed text] [--toolkits ours trl] [--repeats 3] [--json FILE]
    python scripts/bench_train.py --start 10000      seconds from the start to the first step, of so many records

On the CPU, one thread each, without a network once the toolkits are installed: uv makes an environment for each of the others in
`--envs`, which is kept. Every process is a whole run of two epochs, and they alternate; the medians are printed. What was trained
is counted in the model of each process, so a toolkit that leaves something out is named. The least CPU load of others gives the
truest figures; the machine's load is printed.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from bench_train_probe import tree

ROOT = Path(__file__).parent.parent
PROBE = Path(__file__).with_name("bench_train_probe.py")
WORDS = "how many titles had the team won in which year what does sign say about price of red car left right total name".split()
RATE, RANK, ALPHA, EPOCHS, MAX_PIXELS = 1e-4, 8, 16, 2, 1003520
TARGETS = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
RECORDS_PER_STEP = 8  # of the others, unless ours has run: then they take as many steps
INSTALL = {  # into environments of their own; the rest runs in this one
    "ms-swift": ["ms-swift==4.6.0", "qwen_vl_utils", "torchvision"],
    "llamafactory": ["llamafactory==0.9.5", "torch==2.11.*", "torchaudio==2.11.*", "torchvision"],
}
COUNTED = "tokens padding patches taught summed layers layer_runs blocks block_runs".split()
PLACES = "model model_name_or_path train_meta_file dataset dataset_dir output_dir".split()
TOOLKITS = ["ours", "ms-swift", "llamafactory", "trl", "recipe"]


class Talks(NamedTuple):
    """A set: pictures, questions about each, records without a picture; px of a side, words of a question and of an answer."""

    what: str
    pictures: int
    questions: int
    texts: int
    side: tuple[int, int]
    asked: tuple[int, int]
    answered: tuple[int, int]


SETS = {
    "one": Talks("one question a picture", 32, 1, 0, (392, 504), (8, 20), (2, 20)),
    "five": Talks("five questions a picture", 12, 5, 0, (392, 504), (8, 20), (2, 20)),
    "mixed": Talks("pictures and text, half and half", 12, 1, 12, (140, 504), (8, 60), (10, 60)),
    "text": Talks("mostly text", 3, 1, 15, (224, 392), (20, 120), (40, 200)),
}


def write_set(talks: Talks, folder: Path) -> Path:
    """Draws the pictures and writes the records, in the form that LLaMA-Factory and ms-swift have in common."""
    from PIL import Image

    draw, records = random.Random(0), []
    folder.mkdir(parents=True)
    for number in range(talks.pictures + talks.texts):
        pictures = []
        if number < talks.pictures:
            pictures = [str(folder / f"{number}.jpg")]
            size = draw.randint(*talks.side), draw.randint(*talks.side)
            Image.frombytes("RGB", (16, 16), draw.randbytes(768)).resize(size).save(pictures[0], quality=90)
        for _ in range(talks.questions if pictures else 1):
            asked, answered = (" ".join(draw.choices(WORDS, k=draw.randint(*of))) for of in (talks.asked, talks.answered))
            turns = [{"role": "user", "content": "<image>" * len(pictures) + asked}, {"role": "assistant", "content": answered}]
            records.append({"messages": turns, "images": pictures})
    draw.shuffle(records)
    return write_records(records, folder)


def write_records(records: list[dict[str, Any]], folder: Path) -> Path:
    file = folder / "records.json"
    file.write_text(json.dumps(records))
    return file


def many_records(file: Path, count: int) -> Path:
    """So many records with a picture file each, the pictures being those of `file` under other names."""
    records = json.loads(file.read_text())
    for number in range(count):
        picture = records[number % len(records)]["images"][0]
        os.link(picture, file.parent / f"copy-{number}.jpg")
    return write_records(
        [records[n % len(records)] | {"images": [str(file.parent / f"copy-{n}.jpg")]} for n in range(count)], file.parent
    )


def write_model(folder: Path) -> None:
    """8.9 million random parameters in the proportions of Qwen2-VL, the tokenizer and template those of data/tiny."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(ROOT / "data/tiny")
    for part in (processor.image_processor, processor.video_processor):
        part.size = {"shortest_edge": 4 * 28 * 28, "longest_edge": MAX_PIXELS}
    config = AutoConfig.from_pretrained(ROOT / "data/tiny")
    text, vision = config.text_config, config.vision_config
    text.vocab_size, text.hidden_size, text.intermediate_size, text.num_hidden_layers = 4096, 256, 896, 7
    text.num_attention_heads, text.num_key_value_heads, text.layer_types = 4, 2, ["full_attention"] * 7
    text.rope_parameters = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]}
    vision.depth, vision.embed_dim, vision.num_heads, vision.mlp_ratio, vision.hidden_size = 4, 128, 4, 4, 256
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config, dtype=torch.float32).save_pretrained(folder)
    processor.save_pretrained(folder)


def measure_set(file: Path, model: Path) -> dict[str, Any]:
    """What an epoch holds if each record is run once, by the processor of transformers."""
    from PIL import Image
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(model)
    records, tokens, patches = json.loads(file.read_text()), 0, 0
    for record in records:
        text = processor.apply_chat_template(record["messages"]).replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>")
        made = processor(text=[text], images=[Image.open(path) for path in record["images"]] or None, return_tensors="pt")
        tokens += made["input_ids"].numel()
        patches += len(made.get("pixel_values", ()))
    pictures = len({path for record in records for path in record["images"]})
    return {"records": len(records), "pictures": pictures, "tokens": tokens, "patches": patches}


def settings(toolkit: str, model: Path, file: Path, records_per_step: int, max_steps: int) -> dict[str, Any]:
    """What a toolkit is told, in its own words: everything else is its default. The same for all where all have it.

    One record at a time, which pads nothing: so the documented examples of ms-swift and LLaMA-Factory do.
    """
    steps = {"max_steps": max_steps} if max_steps else {}
    if toolkit == "ours":
        return {"model": model, "train_meta_file": file, "output_dir": "out", "lora_rank": RANK, "lora_alpha": ALPHA,
                "num_train_epochs": EPOCHS, "rows_per_step": 1, "learning_rate": RATE, "lr_scheduler_type": "constant",
                "warmup_ratio": 0, **steps}  # fmt: skip
    trainer = {
        "output_dir": "out", "num_train_epochs": EPOCHS, "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": records_per_step, "learning_rate": RATE, "lr_scheduler_type": "constant", "weight_decay": 0.0,
        "max_grad_norm": 1.0, "dataloader_num_workers": 2, "save_strategy": "no", "report_to": "none", "logging_steps": 1, **steps,
    }  # fmt: skip
    if toolkit == "ms-swift":
        return trainer | {"model": model, "model_type": "qwen2_vl", "template": "qwen2_vl", "use_hf": True, "dataset": file,
                          "split_dataset_ratio": 0, "torch_dtype": "float32", "bf16": False, "fp16": False, "attn_impl": "sdpa",
                          "tuner_type": "lora", "target_modules": "all-linear", "freeze_vit": True, "freeze_aligner": True,
                          "lora_rank": RANK, "lora_alpha": ALPHA, "lora_dropout": 0, "gradient_checkpointing": True,
                          "max_length": 4096, "warmup_ratio": 0, "adam_beta2": 0.999, "check_model": False}  # fmt: skip
    if toolkit == "llamafactory":
        return trainer | {"model_name_or_path": str(model), "stage": "sft", "do_train": True, "finetuning_type": "lora",
                          "lora_rank": RANK, "lora_alpha": ALPHA, "lora_target": ",".join(TARGETS), "dataset": "records",
                          "dataset_dir": ".", "template": "qwen2_vl", "cutoff_len": 4096, "image_max_pixels": MAX_PIXELS,
                          "preprocessing_num_workers": 2, "freeze_vision_tower": True}  # fmt: skip
    trainer |= {"gradient_checkpointing": True}
    if toolkit == "trl":
        return trainer | {"max_length": None, "assistant_only_loss": True, "bf16": False}
    return trainer | {"remove_unused_columns": False}


def python_of(toolkit: str, envs: Path) -> Path:
    """The interpreter that has the toolkit, which is installed if need be."""
    if toolkit not in INSTALL:
        return Path(sys.executable)
    folder, wanted = envs / toolkit, " ".join(INSTALL[toolkit])
    if not (folder / "installed").exists() or (folder / "installed").read_text() != wanted:
        uv = ROOT / ".tools/bin/uv"
        uv = str(uv) if uv.exists() else "uv"
        say(f"{toolkit}: installing {wanted} into {folder}")
        subprocess.run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, folder], check=True)
        subprocess.run([uv, "pip", "install", "--quiet", "--python", folder / "bin/python", *INSTALL[toolkit]], check=True)
        (folder / "installed").write_text(wanted)
    return folder / "bin/python"


def peak_of(process: subprocess.Popen[bytes], limit: float) -> float:
    """Waits for a process and returns the most GiB that it and all below it held, looked at five times a second.

    Memory that several of them share counts once. Raises TimeoutExpired.
    """
    peak, until = 0, time.monotonic() + limit
    while process.poll() is None:
        held = 0
        for number in tree(process.pid):
            try:
                lines = Path(f"/proc/{number}/smaps_rollup").read_text().splitlines()
                held += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
            except (OSError, StopIteration):  # it has just ended
                continue
        peak = max(peak, held)
        if time.monotonic() > until:
            raise subprocess.TimeoutExpired(process.args, limit)
        time.sleep(0.2)
    return peak / 2**20


def run(
    toolkit: str, envs: Path, model: Path, file: Path, records_per_step: int, folder: Path, max_steps: int = 0
) -> dict[str, Any]:
    """One process: what its probe counted, epoch by epoch, or a `problem`."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "home").mkdir(parents=True)
    told = settings(toolkit, model, file, records_per_step, max_steps)
    found: dict[str, Any] = {"toolkit": toolkit, "settings": {key: str(value) for key, value in told.items()}}
    found["load"] = os.getloadavg()[0]
    lora = {"r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.0, "target_modules": TARGETS}
    lines, log = folder / "lines.jsonl", folder / "log"
    job = {"toolkit": toolkit, "settings": told, "lora": lora, "model": model, "records": file, "lines": lines}
    (folder / "job.json").write_text(json.dumps(job, default=str))
    home = str(folder / "home")  # what a toolkit keeps from one run to the next would not be paid for
    own = dict.fromkeys(("HOME", "XDG_CACHE_HOME", "HF_HOME", "MODELSCOPE_CACHE"), home)
    own["PYTHONPATH"] = str(ROOT) * (toolkit == "ours")
    # Bytecode is kept, as users have it: else each start would compile what it imports.
    same = {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
            "CUDA_VISIBLE_DEVICES": "", "MIN_PIXELS": "3136", "MAX_PIXELS": str(MAX_PIXELS)}  # fmt: skip
    try:
        command = [str(python_of(toolkit, envs)), str(PROBE), str(folder / "job.json")]
        began = time.time()
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, cwd=folder, env=os.environ | same | own, stdout=output, stderr=output, stdin=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip
        try:
            found["peak GiB"] = peak_of(process, 3600 if max_steps else 900)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if process.returncode:
            found["log"] = log.read_text(errors="replace")[-20000:]
            said = [line for line in found["log"].splitlines() if line.strip()] or ["nothing"]
            errors = [line for line in said if re.match(r"[\w.]*(Error|Exception)\b", line)]
            raise RuntimeError(f"exit code {process.returncode}; it said: {(errors or said)[-1]}")
        first, *steps = (json.loads(line) for line in lines.read_text().splitlines())
        if not steps or (len(steps) % EPOCHS and not max_steps):
            raise RuntimeError(f"{len(steps)} steps are not {EPOCHS} epochs")
    except (RuntimeError, OSError, ValueError, subprocess.SubprocessError) as error:
        return found | {"problem": str(error)}
    found |= {"start CPU s": first["cpu"], "start wall s": first["wall"] - began, "lines": steps, "epochs": []}
    found |= {key: steps[0][key] for key in ("trained", "torch", "transformers")}
    length = len(steps) // EPOCHS or 1
    for at in range(0, len(steps), length):
        before, mine = ([first, *steps][at], steps[at : at + length])
        epoch = {key: sum(step[key] for step in mine) for key in COUNTED}
        # A toolkit whose loss is not torch's cross entropy: what it optimizes is the mean over the step's taught tokens.
        epoch["summed"] = epoch["summed"] or sum(step["optimized"] * step["taught"] for step in mine)
        epoch |= {f"{part} runs": epoch[f"{part}_runs"] / max(1, epoch[f"{part}s"]) for part in ("layer", "block")}
        epoch |= {f"{key} s": mine[-1][key.lower()] - before[key.lower()] for key in ("CPU", "wall")}
        found["epochs"].append(epoch | {"loss": epoch["summed"] / max(1, epoch["taught"])})
    return found


def table(what: dict[str, Any], runs: list[dict[str, Any]]) -> str:
    """Markdown of one set: medians over the runs of each toolkit, and what is not as it should be."""
    titles = (
        "toolkit", "steps", "tokens run", "taught", "forward runs, language / tower", "CPU s, epoch 1",
        "CPU s, epoch 2", "wall s", "the records' tokens a CPU s", "of the fastest peer's in each epoch", "start, CPU / wall s", "peak GiB", "loss, epoch 1", "loss, epoch 2",
    )  # fmt: skip
    cells, notes, rates, peers = {}, list[str](), dict[str, list[float]](), list[str]()
    for toolkit in dict.fromkeys(one["toolkit"] for one in runs):
        mine = [one for one in runs if one["toolkit"] == toolkit]
        notes += [f"* {toolkit} failed: {one['problem']}" for one in mine if "problem" in one]
        good = [one for one in mine if "problem" not in one]
        if not good:
            cells[toolkit] = ["failed"]
            continue
        start = [statistics.median(one[name] for one in good) for name in ("start CPU s", "start wall s", "peak GiB")]
        first, second = (
            {name: statistics.median(one["epochs"][epoch][name] for one in good) for name in good[0]["epochs"][epoch]}
            for epoch in range(EPOCHS)
        )
        apart = [name for name in ("tokens", "patches") if first[name] != what[name]]
        short = toolkit != "ours" and any(first[name] < what[name] for name in apart)
        if apart:
            counted = " and ".join(f"{first[name]:,.0f} {name} where the records have {what[name]:,}" for name in apart)
            notes.append(f"* {toolkit} runs {counted}" + ": it is no peer here" * short)
        rates[toolkit] = [what["tokens"] / epoch["CPU s"] for epoch in (first, second)]
        peers += [] if short or toolkit == "ours" else [toolkit]
        cells[toolkit] = [
            len(good[0]["lines"]), f"{first['tokens']:,.0f}", f"{first['taught']:,.0f}",
            f"{first['layer runs']:.3g} / {first['block runs']:.3g}", f"{first['CPU s']:.2f}",
            f"{second['CPU s']:.2f}", f"{first['wall s']:.2f}, {second['wall s']:.2f}", ", ".join(f"{rate:,.0f}" for rate in rates[toolkit]), "",
            f"{start[0]:.1f} / {start[1]:.1f}", f"{start[2]:.2f}", f"{first['loss']:.5f}", f"{second['loss']:.5f}",
        ]  # fmt: skip
    fastest = [max(of) for of in zip(*(rates[peer] for peer in peers), strict=True)]
    for toolkit, each in rates.items():
        cells[toolkit][8] = ", ".join(f"{rate / most:.2f}" for rate, most in zip(each, fastest, strict=False)) or "-"
    rows = [titles, ["---"] * len(titles)]
    rows += [[toolkit, *(row + ["-"] * len(titles))[: len(titles) - 1]] for toolkit, row in cells.items()]
    about = f"{what['records']} records, {what['pictures']} pictures, {what['tokens']:,} tokens, {what['patches']:,} patches"
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join([f"### {what['what']}: {about}", "", *lines, "", *dict.fromkeys(notes)])


def start_table(count: int, runs: list[dict[str, Any]]) -> str:
    """Markdown of what passes before the first step."""
    lines = [f"### from the start to the first step: {count:,} records, a picture each", ""]
    lines += ["| toolkit | CPU s | wall s |", "|---|---|---|"]
    for one in runs:
        cells = f"failed: {one['problem']} | -" if "problem" in one else f"{one['start CPU s']:.1f} | {one['start wall s']:.1f}"
        lines.append(f"| {one['toolkit']} | {cells} |")
    return "\n".join(lines)


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def told(runs: list[dict[str, Any]]) -> str:
    """The settings of each toolkit, as it was given them, and how busy the machine was."""
    loads = [one["load"] for one in runs]
    lines = [
        "### settings", "", "One thread, float32, gradient checkpointing in all but where the language model ran forward once. Load of"
        f" the machine {min(loads):.1f} to {max(loads):.1f}, of which the measured process is about 1. All else is each toolkit's default.", "",
    ]  # fmt: skip
    for toolkit, one in {one["toolkit"]: one for one in runs}.items():
        versions = ", ".join(f"{name} {one[name]}" for name in ("torch", "transformers") if name in one)
        shown = (f"{key}={value}" for key, value in one["settings"].items() if key not in PLACES)
        lines.append(f"* {toolkit} {f'({versions})' if versions else ''}: {' '.join(shown)}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS), help="which records")
    parser.add_argument("--toolkits", nargs="+", choices=TOOLKITS, default=TOOLKITS, help="who trains")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each toolkit and set")
    parser.add_argument("--start", type=int, help="only the start, with so many records, of ours and LLaMA-Factory unless told")
    parser.add_argument("--envs", type=Path, default=ROOT / "runs/bench_train/envs", help="where the toolkits are installed")
    parser.add_argument("--json", type=Path, help="writes all that was measured")
    args = parser.parse_args()
    found: dict[str, Any] = {"sets": {}, "runs": {}, "threads": 1, "cores": os.cpu_count(), "load": os.getloadavg()}
    tables = []
    with tempfile.TemporaryDirectory() as name:
        folder, model = Path(name), Path(name) / "model"
        write_model(model)
        chosen = args.toolkits
        if args.start:
            chosen = [name for name in chosen if name in ("ours", "llamafactory")] if chosen == TOOLKITS else chosen
            args.sets, args.repeats = ["one"], 1
        for number, key in enumerate(args.sets):
            file = write_set(SETS[key], folder / key)
            if args.start:
                file = many_records(file, args.start)
            what = found["sets"][key] = {"what": SETS[key].what} | ({} if args.start else measure_set(file, model))
            runs, records_per_step = found["runs"].setdefault(key, []), RECORDS_PER_STEP
            for repeat in range(args.repeats):
                for toolkit in chosen:
                    one = run(toolkit, args.envs.absolute(), model, file, records_per_step, folder / "run", int(bool(args.start)))
                    runs.append(one)
                    if toolkit == "ours" and "problem" not in one and not args.start:
                        records_per_step = -(-what["records"] * EPOCHS // len(one["lines"]))
                    shown = one.get("problem") or "CPU s " + ", ".join(f"{epoch['CPU s']:.2f}" for epoch in one["epochs"])
                    say(f"set {number + 1} of {len(args.sets)}, {key}, repeat {repeat + 1} of {args.repeats}: {toolkit}: {shown}")
                    if args.json:
                        args.json.write_text(json.dumps(found, indent=1))
            tables.append(start_table(args.start, runs) if args.start else table(what, runs))
    print("\n\n".join([*tables, told([one for runs in found["runs"].values() for one in runs])]))


if __name__ == "__main__":
    main()
