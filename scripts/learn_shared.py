"""Measures what sharing a picture's tokens between its questions does to learning: the same records and epochs, with and without.

    python scripts/learn_shared.py [--sets sample single] [--seeds 1 2 3] [--epochs 4]

Two sets: data/sample, whose records have several turns, and every question about its training charts as a record of its own,
which makes seven or more records a picture. Trains configs/demo.yaml on each with share_prefix off and auto, and asks the sample's
held-out questions. Prints a Markdown table.
"""

import argparse
import json
import math
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage
from statistics import fmean

from draw_sample import STATISTICS, questions, record, shown
from ruamel.yaml import YAML

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent


def run(*command: str) -> str:
    """What a command of the environment printed; stops here if it fails."""
    done = subprocess.run([BIN / command[0], *command[1:]], cwd=ROOT, text=True, stdout=subprocess.PIPE)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}")
    return done.stdout


def write_single_questions(file: Path) -> None:
    """Every question about a training chart of the sample, each a record, those of a chart together."""
    charts = [chart for chart in YAML(typ="safe").load(STATISTICS.read_text(encoding="utf-8")) if chart["split"] == "train"]
    rng = random.Random("single questions")
    file.write_text(json.dumps([record(shown(chart, [turn])) for chart in charts for turn in questions(chart, rng)]))


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share of so many questions."""
    z = 1.96
    middle, half = share + z * z / (2 * count), z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, (middle - half) / (1 + z * z / count)), (middle + half) / (1 + z * z / count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=("sample", "single"), default=["sample", "single"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--epochs", type=int, default=4)
    options = parser.parse_args()
    print("| set | share_prefix | tokens an epoch | steps | CPU seconds | held-out loss | exact | mean (95 % of one run) |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        single = Path(folder, "single.json")
        write_single_questions(single)
        known = {"sample": ("the sample", "data/sample/train.json"), "single": ("a record a question", str(single))}
        for name, meta in (known[which] for which in options.sets):
            for share in ("off", "auto"):
                settings = [f"train_meta_file={meta}", f"share_prefix={share}", f"num_train_epochs={options.epochs}"]
                plan = planned(settings)
                learnt = [trained(Path(folder, f"{share}-{seed}"), [*settings, f"seed={seed}"]) for seed in options.seeds]
                losses, exact, seconds, counts = zip(*learnt, strict=True)
                low, high = wilson(fmean(exact), counts[0])
                print(f"| {name} | {share} | {plan['paid']['tokens']:,} | {plan['steps']} | {fmean(seconds):.0f} "
                      f"| {', '.join(f'{loss:.4f}' for loss in losses)} | {', '.join(f'{one:.1%}' for one in exact)} "
                      f"| {fmean(exact):.1%} ({low:.1%} to {high:.1%}) |", flush=True)  # fmt: skip


def planned(settings: list[str]) -> dict:
    """What `qwenvl-ft plan` says."""
    return json.loads(run("qwenvl-ft", "plan", "--config", "configs/demo.yaml", "--json", *settings))


def trained(
    out: Path, settings: list[str], config: Path = ROOT / "configs/demo.yaml", limit: int | None = None
) -> tuple[float, float, float, int]:
    """Held-out loss, exact accuracy, CPU seconds of training, and how many questions were asked."""
    before = getrusage(RUSAGE_CHILDREN)
    run("python", "train.py", "--config", str(config), f"output_dir={out}", *settings)
    after = getrusage(RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    losses = json.loads((out / "all_results.json").read_text())["eval_losses"]
    held_out = YAML(typ="safe").load((out / "config.yaml").read_text())
    asked = ["--data-dir", held_out["eval_data_dir"] or held_out["train_data_dir"], "--config", str(out / "config.yaml")]
    asked += ["--limit", str(limit)] if limit else []
    scores = json.loads(
        run("qwenvl-ft", "eval", held_out["model"], held_out["eval_meta_file"], *asked, "--json", "--adapter", str(out))
    )
    return list(losses.values())[-1], scores["exact_accuracy"], seconds, scores["questions"]


if __name__ == "__main__":
    main()
