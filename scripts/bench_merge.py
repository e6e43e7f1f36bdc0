"""Merges an adapter into a random checkpoint of a given size, side by side: a copy, `qwenvl-ft export`, peft.

Each in a process of its own, in turn, `--times` times. Prints the median of seconds, its ratio to ours, and the peak of resident
memory. `qwenvl-ft export` ends when its files are on the disk, hashed; so does the flushed copy. The others end sooner.

    python scripts/bench_merge.py --gb 2
"""

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from qwenvl_ft.folders.adapter import read_header

PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText
base = AutoModelForImageTextToText.from_pretrained(sys.argv[1], dtype="auto")
PeftModel.from_pretrained(base, sys.argv[2]).merge_and_unload().save_pretrained(sys.argv[3])
"""
COPY = "import shutil, sys; shutil.copytree(sys.argv[1], sys.argv[3])"
FLUSHED = (
    COPY
    + """
import os
for name in os.listdir(sys.argv[3]):
    os.fsync(os.open(os.path.join(sys.argv[3], name), os.O_RDONLY))
"""
)
OURS = """
import sys
from qwenvl_ft.cli.main import main
main(["export", "--model", sys.argv[1], "--adapter", sys.argv[2], "--out", sys.argv[3], "--verify", "0"])
"""
MAKE = """
import shutil, sys, torch
from pathlib import Path
from transformers import AutoConfig, AutoModelForImageTextToText
from qwenvl_ft.data.families import FAMILIES
from qwenvl_ft.model.load import add_lora
tiny, folder, gb = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
config = AutoConfig.from_pretrained(tiny)
text = config.text_config
text.hidden_size, text.intermediate_size, text.num_attention_heads, text.num_key_value_heads, text.vocab_size = 1536, 8960, 12, 2, 151936
text.num_hidden_layers = max(1, round((gb * 1e9 / 2 - 151936 * 1536) / (3 * 1536 * 8960 + 2.4 * 1536 * 1536)))
text.layer_types = ["full_attention"] * text.num_hidden_layers
text.rope_parameters = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
config.vision_config.hidden_size = 1536
torch.set_default_dtype(torch.bfloat16)
model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
model.save_pretrained(folder / "base", max_shard_size="1GB")
for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "processor_config.json"):
    shutil.copy(tiny / name, folder / "base")
torch.set_default_dtype(torch.float32)
adapted = add_lora(model, FAMILIES["qwen2_vl"], ["language"], 16, 32, 0.0, 0)
with torch.no_grad():
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.01)
adapted.save_pretrained(folder / "adapter")
"""
CONTENDERS = {"copy": COPY, "copy, flushed": FLUSHED, "qwenvl-ft export": OURS, "peft, merge and save": PEFT}


def measured(code: str, *arguments: Path) -> tuple[float, float]:
    """(seconds, peak resident GiB) of a process that runs `code`."""
    # At exit, since a command ends with SystemExit.
    watched = (
        "import atexit, resource\natexit.register(lambda: print('RSS', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))\n"
        + code
    )
    os.sync()  # nobody pays for what was written before
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", watched, *map(str, arguments)], check=True, text=True, capture_output=True)
    return time.monotonic() - start, int(done.stdout.rsplit("RSS", 1)[1]) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=2.0, help="size of the checkpoint, in 10^9 bytes")
    parser.add_argument("--times", type=int, default=3, help="how often each runs")
    parser.add_argument("--folder", type=Path, help="where to work; default a temporary folder")
    arguments = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        subprocess.run([sys.executable, "-c", MAKE, "data/tiny", name, str(arguments.gb)], check=True, capture_output=True)
        base, adapter = folder / "base", folder / "adapter"
        files = list(base.glob("*.safetensors"))
        largest = max(tensor.num_bytes for path in files for tensor in read_header(path)[1])
        print(f"{sum(path.stat().st_size for path in files) / 1e9:.2f} GB in {len(files)} files,"
              f" the largest tensor {largest / 2**30:.2f} GiB")  # fmt: skip
        runs: dict[str, list[tuple[float, float]]] = {}
        for number in range(arguments.times):
            for title, code in CONTENDERS.items():
                print(f"{number + 1} of {arguments.times}: {title}", file=sys.stderr)
                runs.setdefault(title, []).append(measured(code, base, adapter, folder / "out"))
                shutil.rmtree(folder / "out")
        results = {title: [statistics.median(column) for column in zip(*of, strict=True)] for title, of in runs.items()}
        ours = results["qwenvl-ft export"][0]
        for title, (seconds, gib) in results.items():
            print(f"{title:22}{seconds:7.1f} s {seconds / ours:6.2f} x ours {gib:7.2f} GiB")


if __name__ == "__main__":
    main()
