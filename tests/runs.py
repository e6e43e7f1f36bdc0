"""Small training runs for the tests: eight records of the sample on the tiny base, in this process or launched as a user would."""

import json
import os
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file

from qwenvl_ft.config import Config

ROOT = Path(__file__).parent.parent
BASE = {
    "model": "data/tiny", "train_data_dir": "data/sample/images", "row_tokens": 700, "rows_per_step": 2, "max_steps": 3,
    "learning_rate": 1e-3, "lora_rank": 4, "lora_alpha": 8, "dtype": "float32", "dataloader_num_workers": 0,
    "gradient_checkpointing": False,
}  # fmt: skip


def few_records(folder: Path, count: int = 8) -> Path:
    """The first records of the sample as a meta-file of their own."""
    records = json.loads((ROOT / "data/sample/train.json").read_text())
    path = folder / "few.json"
    path.write_text(json.dumps(records[:count]))
    return path


def config(folder: Path, name: str = "run", **settings) -> Config:
    """The settings of a small run into folder/name."""
    return Config(**{**BASE, "train_meta_file": few_records(folder), "output_dir": folder / name, **settings})


def run(folder: Path, name: str = "run", **settings) -> dict:
    """Trains in this process; returns the adapter's tensors."""
    from qwenvl_ft.train.loop import train

    train(config(folder, name, **settings))
    return adapter(folder / name)


def adapter(folder: Path) -> dict:
    """The tensors of an adapter's folder."""
    return load_file(folder / "adapter_model.safetensors")


def metrics(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def same(one: dict, other: dict) -> bool:
    """Equal to the bit."""
    return one.keys() == other.keys() and all(one[key].equal(other[key]) for key in one)


def difference(one: dict, other: dict) -> float:
    """The largest difference of a value, over the largest value."""
    assert one.keys() == other.keys()
    return max(((one[key] - other[key]).abs().max() / one[key].abs().max().clamp(min=1e-9)).item() for key in one if one[key].any())


def distance(one: dict, other: dict) -> float:
    """The largest of a weight matrix: the norm of the difference over its norm. AdamW makes of a gradient of about 0 a step of up to
    the rate, whose sign is rounding: by this one value says little."""
    assert one.keys() == other.keys()
    return max(((one[key] - other[key]).norm() / one[key].norm()).item() for key in one if one[key].any())


def launch(
    folder: Path, name: str, *launcher: str, script: str = "train.py", env: dict | None = None, wait: bool = True, **settings
):
    """`accelerate launch ... train.py` in another process, on the CPU."""
    overrides = [
        f"{key}={value}"
        for key, value in {**BASE, "train_meta_file": few_records(folder), "output_dir": folder / name, **settings}.items()
    ]
    empty = folder / "config.yaml"
    empty.write_text("seed: 42\n")
    command = [str(Path(sys.executable).parent / "accelerate"), "launch", "--mixed_precision", "no", "--dynamo_backend", "no",
               "--num_machines", "1", *launcher, script, "--config", str(empty), *overrides]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", **(env or {})},
    )  # fmt: skip
    if not wait:
        return process
    output, _ = process.communicate(timeout=280)
    assert process.returncode == 0, output[-4000:]
    return output


def write_film(path: Path, width: int, height: int) -> Path:
    """Twenty frames at 10 a second, each of its own shade of grey."""
    import av
    import numpy as np

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(20):
            frame = av.VideoFrame.from_ndarray(np.full((height, width, 3), 12 * number, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
