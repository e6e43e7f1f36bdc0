"""`make demo`: the whole path on the sample with the tiny model, each step the command that a user types, and what it learnt.

validate-meta -> plan -> eval (base) -> accelerate launch train.py -> eval (tuned, and shown blank pictures) -> export -> ask
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

BIN = Path(sys.executable).parent
RUN, MERGED = Path("runs/demo"), Path("runs/demo-merged")
TUNED = ("--adapter", str(RUN))
CONTROLS = {"blank": "tuned, shown blank pictures", "prior": "the commonest answer, without a model"}
EVAL = ["data/sample/eval.json", "--data-dir", "data/sample/images", "--json"]
LAUNCH = [
    "--num_processes",
    "1",
    "--num_cpu_threads_per_process",
    str(os.cpu_count()),
    "--num_machines",
    "1",
    "--mixed_precision",
    "no",
    "--dynamo_backend",
    "no",
]


def run(title: str, *command: str, capture: bool = False) -> str:
    """Runs a command of the environment, shown as a user would type it; stops the demo if it fails."""
    print(f"\n\033[1m{title}\033[0m\n$ {' '.join(command)}", flush=True)
    start = time.monotonic()
    done = subprocess.run([BIN / command[0], *command[1:]], text=True, stdout=subprocess.PIPE if capture else None)
    print(f"({time.monotonic() - start:.0f} s)", flush=True)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout or ""


def accuracy(title: str, *arguments: str) -> dict:
    """The scores that `qwenvl-ft eval --json` prints."""
    return json.loads(run(title, "qwenvl-ft", "eval", "data/tiny", *EVAL, *arguments, capture=True))


def interval(cell: dict) -> str:
    """A share with its 95 % interval."""
    return f"{cell['value']:.1%} ({cell['low']:.1%} to {cell['high']:.1%})"


def main() -> None:
    start = time.monotonic()
    for folder in (RUN, MERGED):
        shutil.rmtree(folder, ignore_errors=True)
    RUN.mkdir(parents=True)
    images = ("--data-dir", "data/sample/images")
    run("1. Is the data good?", "validate-meta", "data/sample/train.json", *images, "--model", "data/tiny")
    run("2. What would a run do?", "qwenvl-ft", "plan", "--config", "configs/demo.yaml")
    shown = ("--config", "configs/demo.yaml")  # pictures as training will see them
    base = accuracy("3. What does the base know?", "--out", str(RUN / "predictions-base.jsonl"), *shown)
    run("4. Train.", "accelerate", "launch", *LAUNCH, "train.py", "--config", "configs/demo.yaml")
    tuned = accuracy("5. What has it learnt, and does it look? The same questions over white pictures, too.", *TUNED, "--blank")
    run("6. Merge, and prove the merge.", "qwenvl-ft", "export", "--adapter", str(RUN), "--out", str(MERGED))
    first = json.loads(Path("data/sample/eval.json").read_text())[0]["conversations"][0]["value"]
    name, _, question = first.removeprefix("<img>").partition("</img>\n")
    run("7. Ask the merged model.", "qwenvl-ft", "ask", str(MERGED), "--image", f"data/sample/images/{name}", question)

    if len({(scores["min_pixels"], scores["max_pixels"]) for scores in (base, tuned)}) > 1:
        sys.exit("the two were shown pictures of other sizes, and cannot be compared")
    about = f"{base['questions']} questions about charts and subjects that it was not trained on"
    print(f"\n\033[1mHeld-out records: {about}; pictures of up to {base['max_pixels']:,} px\033[0m")
    print(f"{'':40}{'relaxed accuracy':>24}{'exact':>24}")
    before, rows = ({row["metric"]: row for row in scores["table"]["rows"]} for scores in (base, tuned))
    controls = {title: {metric: row[name] for metric, row in rows.items()} for name, title in CONTROLS.items()}
    for title, row in {"base": before, "tuned": rows, **controls}.items():
        print(f"{title:40}" + "".join(f"{interval(row[metric]):>24}" for metric in ("relaxed", "exact")))
    print("\n".join(tuned["table"]["words"]))
    print(f"\n{time.monotonic() - start:.0f} s in all; every answer is in {RUN}/predictions*.jsonl")


if __name__ == "__main__":
    main()
