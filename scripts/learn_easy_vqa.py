"""Tunes a tiny model on easy-vqa, a public set of 5,000 pictures of one shape each and 48,248 questions about them, by the ordinary
commands, and prints what its test part then scores, beside the prior and blank pictures.

    python scripts/learn_easy_vqa.py --out runs/easy-vqa [key=value ...]

data/tiny has only ever seen charts, and shapes stay at chance with it. So its vision tower first learns to see them, on pictures
that are drawn here: none of the set's (scripts/shapes.py); --seen 0 leaves that out. The set comes with the package easy-vqa, which
is laid into OUT. What is told with key=value changes the settings of the run.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from safetensors.torch import load_file, save_file
from shapes import teach_shapes
from transformers import AutoProcessor

from qwenvl_ft.model.load import load_base

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
TINY, UV = ROOT / "data/tiny", ROOT / ".tools/bin/uv"
SIDE = 168  # px that the pictures of 64 are enlarged to: 36 tokens in place of 4, which hardly tell a circle from a square
SETTINGS = """\
model: {base}
train_meta_file: {out}/train.json
train_data_dir: {pictures}/train/images
output_dir: {out}/run

min_pixels: {area}
row_tokens: 2048
rows_per_step: 4
lora_on: [language, vision, merger]
lora_rank: 64
lora_alpha: 128
learning_rate: 1e-3
num_train_epochs: 3
gradient_checkpointing: false
dataloader_num_workers: 1
"""


def make_base(out: Path, steps: int) -> None:
    """data/tiny, its vision tower replaced by one that has seen shapes."""
    model, processor = load_base(TINY, "float32"), AutoProcessor.from_pretrained(TINY)
    if steps:
        share = teach_shapes(model, processor, SIDE, steps, lambda text: print(text, flush=True))
        print(f"the vision tower sees the kind of {share:.1%} of new shapes", flush=True)
    taught, making = model.state_dict(), out.with_suffix(".making")
    shutil.copytree(TINY, making, dirs_exist_ok=True)
    stored = load_file(TINY / "model.safetensors")
    seen = {
        key: taught[f"model.{key.removeprefix('model.')}"].to(of.dtype).contiguous()
        for key, of in stored.items()
        if "visual." in key
    }
    save_file(stored | seen, making / "model.safetensors", {"format": "pt"})
    making.rename(out)  # so that one that was killed is not taken for whole


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


def run(*command: str) -> None:
    """Runs a command of the environment, which is shown; stops here if it fails."""
    print(f"$ {shlex.join(command)}", flush=True)
    if code := subprocess.run([BIN / command[0], *command[1:]], cwd=ROOT).returncode:
        sys.exit(code)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/easy-vqa"))
    parser.add_argument(
        "--seen", type=int, default=1000, help="steps of 64 pictures in which the vision tower learns to see shapes"
    )
    parser.add_argument("--limit", type=int, help="ask so many of the test part's questions")
    parser.add_argument("settings", nargs="*", help="key=value of the run")
    given = parser.parse_args()
    out = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    pictures, base = out / "package/easy_vqa/data", out / f"base-{given.seen}"
    if not pictures.is_dir():
        subprocess.run([UV, "pip", "install", "--quiet", "--no-deps", "--target", out / "package", "easy-vqa==1.0"], check=True)
    for part in ("train", "test"):
        (out / f"{part}.json").write_text(json.dumps(records(pictures / part / "questions.json")))
    (out / "settings.yaml").write_text(SETTINGS.format(out=out, base=base, pictures=pictures, area=SIDE**2))
    began = time.monotonic()
    if not base.is_dir():
        make_base(base, given.seen)
    seen = time.monotonic()
    run("python", "train.py", "--config", f"{out}/settings.yaml", *given.settings)
    trained = time.monotonic()
    asked = ["--data-dir", f"{pictures}/test/images", "--config", f"{out}/run/config.yaml", "--batch-size", "64", "--blank"]
    asked += ["--metric", "exact", "--metric", "class", *(["--limit", str(given.limit)] if given.limit else [])]
    run("qwenvl-ft", "eval", str(base), f"{out}/test.json", "--adapter", f"{out}/run", *asked)
    print(
        f"minutes: {(seen - began) / 60:.0f} to see, {(trained - seen) / 60:.0f} to train, {(time.monotonic() - trained) / 60:.0f} to ask"
    )


if __name__ == "__main__":
    main()
