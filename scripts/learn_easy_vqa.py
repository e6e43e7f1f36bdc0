"""Tunes data/tiny on easy-vqa, a public set of 4,000 + 1,000 pictures of one shape each and 48,248 questions about them, by the
ordinary commands, and prints what its test part then scores, beside the prior and blank pictures.

    python scripts/learn_easy_vqa.py --out runs/easy-vqa [key=value ...]

The set comes with the package easy-vqa, which is laid into OUT. What is told with key=value changes the settings of the run.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
UV = ROOT / ".tools/bin/uv"
SETTINGS = """\
model: {root}/data/tiny
train_meta_file: {out}/train.json
train_data_dir: {pictures}/train/images
output_dir: {out}/run

min_pixels: 28224              # 64 x 64 px would be 4 tokens: too few to tell a circle from a square
row_tokens: 2048
rows_per_step: 4
lora_on: [language, vision, merger]   # the base has never seen anything but letters
lora_rank: 64
lora_alpha: 128
learning_rate: 1e-3
num_train_epochs: 4
gradient_checkpointing: false
dataloader_num_workers: 1
"""


def records(questions: Path) -> list[dict]:
    """The questions of a part of the set, each a record of its own."""
    return [
        {
            "conversations": [
                {"from": "user", "value": f"<img>{picture}.png</img>{question}"},
                {"from": "assistant", "value": answer},
            ]
        }
        for question, answer, picture in json.loads(questions.read_text())
    ]


def run(*command: str) -> str:
    """What a command printed, which is shown as it is called; stops here if it fails."""
    print(f"$ {shlex.join(command)}", flush=True)
    done = subprocess.run([BIN / command[0], *command[1:]], cwd=ROOT, text=True, stdout=subprocess.PIPE)
    if done.returncode:
        sys.exit(f"exit code {done.returncode}\n{done.stdout}")
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/easy-vqa"))
    parser.add_argument("--limit", type=int, help="ask so many of the test part's questions")
    parser.add_argument("settings", nargs="*", help="key=value of the run")
    given = parser.parse_args()
    out = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    pictures = out / "package/easy_vqa/data"
    if not pictures.is_dir():
        subprocess.run([UV, "pip", "install", "--quiet", "--no-deps", "--target", out / "package", "easy-vqa==1.0"], check=True)
    for part in ("train", "test"):
        (out / f"{part}.json").write_text(json.dumps(records(pictures / part / "questions.json")))
    (out / "settings.yaml").write_text(SETTINGS.format(root=ROOT, out=out, pictures=pictures))
    began = time.monotonic()
    run("python", "train.py", "--config", f"{out}/settings.yaml", *given.settings)
    minutes = (time.monotonic() - began) / 60
    asked = [
        "--data-dir",
        f"{pictures}/test/images",
        "--config",
        f"{out}/run/config.yaml",
        "--metric",
        "exact",
        "--metric",
        "class",
    ]
    asked += ["--limit", str(given.limit)] if given.limit else []
    print(
        run(
            "qwenvl-ft", "eval", "data/tiny", f"{out}/test.json", "--adapter", f"{out}/run", *asked, "--blank", "--batch-size", "64"
        )
    )
    print(f"trained in {minutes:.0f} minutes")


if __name__ == "__main__":
    main()
