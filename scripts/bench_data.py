"""Measures what data cost before a GPU is touched: seconds, CPU seconds and the peak memory of each process, as records grow.

    python scripts/bench_data.py [--work /tmp/bench_data] [--records 1000 10000 100000 1000000] [--svg docs/data_growth.svg]
    python scripts/bench_data.py --records 1000000 10000000 --short    # plan and second start, a few tokens each, pictures shared
    python scripts/bench_data.py --pictures    # one core: headers against decoding, containers, our pixels against transformers'

Writes JPEG pictures of 640 x 480 px to 12 MP and PNGs, and records over them, to the work folder, then runs the commands as a user
does: validate-meta without a model and with one, plan, and a second start, which reads the table. Prints a Markdown table and draws
the growth. The peak of a process is what the kernel says of it: VmHWM, asked for every 50 ms.
"""

import argparse
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parent.parent
WORDS = "how many titles had the team won in which year what does sign say about price of red car left right total name".split()
SIZES = [(640, 480, "jpg"), (800, 600, "jpg"), (1024, 768, "png"), (1920, 1080, "jpg"), (4000, 3000, "jpg")]
PICTURES = 1000
BEFORE = {  # of the version that kept every record as an object, on a machine of two cores
    ("validate-meta --model", 100_000): "45 s CPU, 0.54 GiB", ("validate-meta", 1_000_000): "25 s CPU, 1.92 GiB",
}  # fmt: skip
PREPARE = """
import resource, sys, time
began = time.monotonic()
from qwenvl_ft.config import load_config
from qwenvl_ft.data.prepare import prepare
prepared = prepare(load_config(sys.argv[1], sys.argv[2:]))
sum(script.length for script in map(prepared.scripts.__getitem__, prepared.plan.rows[0]))
"""


@dataclass(frozen=True)
class Cost:
    """Of one command: wall and CPU seconds, and the peak of each of its processes in MiB, the first one its own."""

    what: str
    num_records: int
    wall_s: float
    cpu_s: float
    peaks_mib: list[int]


def write_pictures(folder: Path) -> list[str]:
    """Their names. Few have 12 MP; the content is noise, enlarged, so that a file has the size of a photo."""
    folder.mkdir(parents=True, exist_ok=True)
    draw, names = random.Random(0), []
    for number in range(PICTURES):
        width, height, ending = draw.choices(SIZES, weights=[60, 20, 10, 8, 2])[0]
        names.append(f"{number:05}.{ending}")
        if not (folder / names[-1]).exists():
            noise = Image.frombytes("RGB", (width // 16, height // 16), draw.randbytes(width // 16 * (height // 16) * 3))
            noise.resize((width, height)).save(folder / names[-1])
    return names


def write_records(path: Path, num_records: int, pictures: list[str], short: bool) -> None:
    """JSON lines: a question about a picture, and its answer."""
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(num_records):
            question = " ".join(draw.choices(WORDS, k=1 if short else draw.randint(5, 20)))
            answer = str(number) if short else " ".join(draw.choices(WORDS, k=draw.randint(1, 30)))
            turns = [
                {"from": "user", "value": f"<img>{draw.choice(pictures)}</img>\n{question}?"},
                {"from": "assistant", "value": answer},
            ]
            file.write(json.dumps({"conversations": turns}) + "\n")


def measure(what: str, num_records: int, command: list[str], cache: Path) -> Cost:
    """Runs a command to its end. Raises CalledProcessError where it fails."""
    env = os.environ | {"XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    began, before = time.monotonic(), os.times()
    process = subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.DEVNULL)
    peaks: dict[int, int] = {}
    while process.poll() is None:
        for pid in family_of(process.pid):
            peaks[pid] = max(peaks.get(pid, 0), peak_mib(pid))
        time.sleep(0.05)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    own = peaks.pop(process.pid, 0)
    return Cost(
        what,
        num_records,
        time.monotonic() - began,
        cpu,
        [own, *sorted((peak for peak in peaks.values() if peak > 30), reverse=True)],
    )


def family_of(pid: int) -> list[int]:
    """A process and those that it has started."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(of for child in children for of in family_of(int(child)))]


def peak_mib(pid: int) -> int:
    """The most memory that it had; 0 where it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM")), 0)


def run(work: Path, num_records: int, pictures: list[str], short: bool) -> list[Cost]:
    """What the commands cost on that many records; the sizes of the pictures are known to the cache."""
    meta, cache, folder = work / f"{num_records}.jsonl", work / "cache", work / "pictures"
    if not meta.exists():
        write_records(meta, num_records, pictures, short)
    shutil.rmtree(cache / "qwenvl_ft" / "prepared", ignore_errors=True)
    settings = ["--config", str(ROOT / "configs/demo.yaml")]
    keys = [f"train_meta_file={meta}", f"train_data_dir={folder}", f"model={ROOT}/data/tiny", "eval_meta_file=null", "eval_data_dir=null",
            f"output_dir={work}/run", "row_tokens=4096", "max_pixels=602112"]  # fmt: skip
    tool, check = [sys.executable, "-m", "qwenvl_ft"], ["validate-meta", str(meta), "--data-dir", str(folder)]
    start = [sys.executable, "-c", PREPARE, settings[1], *keys]
    commands = {
        "validate-meta": [*tool, *check],
        "validate-meta --model": [*tool, *check, "--model", str(ROOT / "data/tiny")],
        "plan": [*tool, "plan", *settings, *keys],
        "second start": start,
    }
    wanted = ["plan", "second start"] if short else [*commands]
    return [measure(what, num_records, commands[what], cache) for what in wanted]


def read_pictures(work: Path, names: list[str]) -> str:
    """What a picture costs one core, in a Markdown table: its size from the header and from decoding it, its RGB from a file, a tar
    and a parquet, its patches by our path and by transformers' processor alone on what Pillow opens, which have to be the same."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch
    from transformers import AutoProcessor

    from qwenvl_ft.data.chat import open_chat
    from qwenvl_ft.data.pictures import load, size_of
    from qwenvl_ft.data.records import InTable, InTar, Picture
    from qwenvl_ft.data.rows import as_floats, pixels
    from qwenvl_ft.model.load import limited

    torch.set_num_threads(1)
    folder, tar, table = work / "pictures", work / "pictures.tar", work / "pictures.parquet"
    paths = [folder / name for name in names]
    with tarfile.open(tar, "w") as file:
        for path in paths:
            file.add(path, path.name)
    with tarfile.open(tar) as file:
        in_tar = [InTar(tar, one.name, one.offset_data, one.size) for one in file.getmembers()]
    pq.write_table(pa.table({"image": [path.read_bytes() for path in paths]}), table, row_group_size=100)
    in_table = [InTable(table, name, "image", row) for row, name in enumerate(names)]
    chat = open_chat(ROOT / "data/tiny", max_pixels=602_112)
    processor = limited(AutoProcessor.from_pretrained(ROOT / "data/tiny"), chat)
    pictures = [Picture(path, *size_of(path, "")) for path in paths]

    def ours(picture: Picture) -> np.ndarray:
        return as_floats(pixels([picture], chat, processor))["pixel_values"].numpy()

    def theirs(picture: Picture) -> np.ndarray:
        with Image.open(picture.source) as image:
            return processor.image_processor(images=[image.convert("RGB")], return_tensors="pt")["pixel_values"].numpy()

    same = all(np.array_equal(ours(picture), theirs(picture)) for picture in pictures[:100])
    ways = {
        "size from the header": (lambda path: size_of(path, ""), paths),
        "size by decoding": (lambda path: Image.open(path).convert("RGB").size, paths),
        "RGB of a loose file": (lambda path: load(path, ""), paths),
        "RGB from a tar": (lambda source: load(source, ""), in_tar),
        "RGB from a parquet": (lambda source: load(source, ""), in_table),
        "patches, ours": (ours, pictures),
        "patches, Pillow and transformers": (theirs, pictures),
    }
    spent = dict.fromkeys(ways, 0.0)
    for start in range(0, len(names), 50):  # in turn, so that what else the machine does falls on all
        for name, (do, of) in ways.items():
            began = time.process_time()
            for one in of[start : start + 50]:
                do(one)
            spent[name] += time.process_time() - began
    lines = [f"| {name} | {seconds / len(names) * 1000:.2f} |" for name, seconds in spent.items()]
    return "\n".join(["| a picture | CPU ms |", "|---|---|", *lines, "", f"patches bit-identical: {same}"])


def markdown(costs: list[Cost]) -> str:
    """The figures as a table; `before` are those of the version that held records as objects."""
    lines = ["| command | records | seconds | CPU seconds | peak MiB of each process | before |", "|---|---|---|---|---|---|"]
    for cost in costs:
        peaks = ", ".join(map(str, cost.peaks_mib))
        before = BEFORE.get((cost.what, cost.num_records), "")
        lines.append(f"| {cost.what} | {cost.num_records:,} | {cost.wall_s:.1f} | {cost.cpu_s:.1f} | {peaks} | {before} |")
    return "\n".join(lines)


def rounded_up(value: float) -> float:
    """The next number of one digit that four parts of an axis share well."""
    digit = 10 ** math.floor(math.log10(value))
    return next(of * digit for of in (1, 2, 4, 6, 8, 10) if of * digit >= value)


def draw(costs: list[Cost]) -> str:
    """Two charts as SVG: CPU seconds and the highest peak of a process, by records."""
    counts = sorted({cost.num_records for cost in costs})
    colors = dict(zip(dict.fromkeys(cost.what for cost in costs), ("#2f6db3", "#c8662a", "#3f8f4f", "#8a5aa8"), strict=False))
    charts = [
        ("CPU seconds", lambda cost: cost.cpu_s, "{:.0f}"),
        ("highest peak of a process, MiB", lambda cost: max(cost.peaks_mib), "{:.0f}"),
    ]
    width, height, left, gap = 380, 240, 60, 90
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * (width + gap) + 10}" height="{height + 110}" font-family="sans-serif" font-size="12">',
           '<rect width="100%" height="100%" fill="white"/>']  # fmt: skip
    for number, (title, value, form) in enumerate(charts):
        x0, y0 = left + number * (width + gap), 40
        most = rounded_up(max(map(value, costs)))
        out.append(f'<text x="{x0}" y="24" font-weight="bold">{title}</text>')
        for tick in range(5):
            y = y0 + height - tick * height / 4
            out.append(f'<line x1="{x0}" y1="{y}" x2="{x0 + width}" y2="{y}" stroke="#ddd"/>')
            out.append(f'<text x="{x0 - 6}" y="{y + 4}" text-anchor="end">{form.format(most * tick / 4)}</text>')
        place = {count: x0 + 20 + at * (width - 60) / max(1, len(counts) - 1) for at, count in enumerate(counts)}
        for count in counts:
            out.append(f'<text x="{place[count]}" y="{y0 + height + 18}" text-anchor="middle">{count:,}</text>')
        for what, color in colors.items():
            own = sorted((cost for cost in costs if cost.what == what), key=lambda cost: cost.num_records)
            points = [(place[cost.num_records], y0 + height - value(cost) / most * height) for cost in own]
            out.append(
                f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}" fill="none" stroke="{color}" stroke-width="2"/>'
            )
            out += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in points]
    for number, (what, color) in enumerate(colors.items()):
        x, y = left + number * 180, height + 90
        out.append(f'<rect x="{x}" y="{y - 10}" width="12" height="12" fill="{color}"/><text x="{x + 18}" y="{y}">{what}</text>')
    out.append(f'<text x="{left + width / 2}" y="{height + 74}" fill="#555" text-anchor="middle">records</text></svg>')
    return "\n".join(out) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("/tmp/bench_data"))
    parser.add_argument("--records", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--short", action="store_true", help="texts of a word or two")
    parser.add_argument("--svg", type=Path, help="where the growth is drawn")
    parser.add_argument("--pictures", action="store_true", help="what a picture costs one core")
    args = parser.parse_args()
    work = args.work / ("short" if args.short else "talk")
    pictures = write_pictures(work / "pictures")
    if args.pictures:
        print(read_pictures(work, pictures[:300]))
        return
    costs: list[Cost] = []
    for count in args.records:
        costs += run(work, count, pictures, args.short)
        print(markdown(costs[-4:]), flush=True)
    print(markdown(costs))
    if args.svg:
        args.svg.write_text(draw(costs), encoding="utf-8")


if __name__ == "__main__":
    main()
