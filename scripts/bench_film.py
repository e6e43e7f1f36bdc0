"""What a film costs in memory: two steps of training on the tiny base, on a film of moving noise that is made here.

python scripts/bench_film.py --seconds 600 --width 320 --height 240
"""

import json
import resource
import tempfile
import time
from fractions import Fraction
from pathlib import Path
from typing import Annotated

import typer

from qwenvl_ft.config import Config
from qwenvl_ft.console import print_json
from qwenvl_ft.data.prepare import make_ready

RATE = 30  # frames a second


def make_film(path: Path, seconds: int, width: int, height: int) -> None:
    """Coarse noise that moves to the right."""
    import av
    import numpy as np

    noise = np.random.default_rng(0).integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"preset": "ultrafast", "crf": "35"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(seconds * RATE):
            frame = av.VideoFrame.from_ndarray(np.roll(noise, 4 * number, 1), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def main(
    seconds: Annotated[int, typer.Option()] = 600, width: Annotated[int, typer.Option()] = 320,
    height: Annotated[int, typer.Option()] = 240, video_max_pixels: Annotated[int, typer.Option()] = 12_544,
) -> None:  # fmt: skip
    """One film, its tokens, and the peak of this process."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_film(folder / "film.mp4", seconds, width, height)
        talk = [{"from": "user", "value": "<video>film.mp4</video>\nWhat?"}, {"from": "assistant", "value": "Noise."}]
        (folder / "train.json").write_text(json.dumps([{"conversations": talk}]))
        config = Config(
            model=Path("data/tiny"), train_meta_file=folder / "train.json", train_data_dir=folder, output_dir=folder / "run",
            max_steps=2, rows_per_step=1, row_tokens=50_000, video_max_pixels=video_max_pixels, dataloader_num_workers=0,
        )  # fmt: skip
        ready = make_ready(config)
        from qwenvl_ft.train.loop import train

        started = time.monotonic()
        train(config, ready)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    script = ready[0].scripts[0]
    print_json({"tokens": script.length, "grid": script.grids[0], "train_s": time.monotonic() - started, "peak_MiB": round(peak)})


if __name__ == "__main__":
    typer.run(main)
