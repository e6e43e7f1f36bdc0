"""What a GPU makes of this project: is it right there, how fast, in how much memory. Random weights of the real shapes, no network.

smoke      the kernels and rows that training takes, packed against one by one; the command line on data/tiny, out of memory too
levers     Qwen2-VL-7B trained with one setting after another, 24 GiB emulated
models     the other sizes trained
generate   answers to a picture, in batches

Each part runs in a process of its own: what fails in it is named, and the next one runs; the exit code is 1 then. Without a GPU
all of it runs on the CPU in toy sizes, which shows that it works and nothing else. MFU: the FLOPs that a row cannot do without
(recomputing and attention between records are not among them) a second, of those of a large matmul measured in the same process.

    python scripts/bench_gpu.py --json smoke.json --stage smoke
"""

import argparse
import gc
import json
import os
import random
import resource
import signal
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from inspect import signature
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from real_shapes import LEVERS, PICTURE, SHAPES, config_of, floor_flops, looked_at, lora_runs, record, records
from torch.nn.attention import varlen
from transformers import AutoModelForImageTextToText, GenerationConfig
from transformers.utils.import_utils import is_flash_attn_2_available

from qwenvl_ft.cli.main import main as command_line
from qwenvl_ft.data.families import FAMILIES
from qwenvl_ft.data.features import Features
from qwenvl_ft.data.rows import SCALES, Row, as_floats, join
from qwenvl_ft.model import head
from qwenvl_ft.model.attention import VARLEN, attention, attention_of
from qwenvl_ft.model.load import add_lora, load_base, refit, trainable
from qwenvl_ft.model.lora import fuse_lora
from qwenvl_ft.train import loop
from qwenvl_ft.train.state import Run

ROOT = Path(__file__).parent.parent
CUDA = torch.cuda.is_available()
TOY = not CUDA
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA and torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
GIB = 2**30
ASKED = (
    "a card would be asked for: attention and rows packed against one by one in bfloat16 at head sizes 128, 80 and 72; train, an "
    "out-of-memory error, resume, export and ask on data/tiny; Qwen2-VL-7B lever by lever at 4,096 and 8,192 tokens and in 24 GiB; "
    "Qwen2-VL-2B, Qwen2.5-VL-7B and Qwen3-VL-8B; answers in batches of 1, 8 and 32"
)


def random_model(config: Any, attends: str = "varlen") -> Any:
    """Made on the device, as `load_base` leaves one that was read from a folder."""
    torch.manual_seed(0)
    with DEVICE:
        model = AutoModelForImageTextToText.from_config(config, dtype=DTYPE, attn_implementation="sdpa")
    return refit(model, attends)


def trained(config: Any) -> Any:
    """What a training step needs of a `Run`: a random model with LoRA on its language model."""
    model = add_lora(random_model(config), FAMILIES[config.model_type], ["language"], 16, 32, 0.0, 0)
    fuse_lora(model)
    for name, parameter in trainable(model).items():
        if "lora_B" in name:  # 0 in a fresh one, which would leave half of the gradients at 0
            torch.nn.init.normal_(parameter, std=0.01)
    return SimpleNamespace(accelerator=SimpleNamespace(device=DEVICE), model=model, bare=model, tower_trains=False)


def wait() -> None:
    if CUDA:
        torch.cuda.synchronize()


def seconds(work: Callable[[], Any]) -> float:
    wait()
    began = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - began


def clear() -> None:
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib() -> float:
    """Of the allocator since `clear`; without a GPU, of the process."""
    return torch.cuda.max_memory_reserved() / GIB if CUDA else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def matmul_flops() -> float:
    """FLOPs a second of a large matmul in the dtype of the model."""
    size = 8192 if CUDA else 512
    left, right = (torch.randn(size, size, device=DEVICE, dtype=DTYPE) for _ in range(2))
    return 2 * size**3 / statistics.median([seconds(lambda: left @ right) for _ in range(13)][3:])


class Report:
    """Writes a line as soon as it is measured, so that what a process had stays when it dies."""

    def __init__(self, path: Path, part: str):
        self.path, self.part = path, part

    def add(self, name: str, problem: str = "", **values: Any) -> None:
        shown = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in values.items()}
        print(f"{self.part}: {name}: {problem or shown}", file=sys.stderr, flush=True)
        with self.path.open("a") as file:
            file.write(json.dumps({"part": self.part, "name": name, "problem": problem, **values}) + "\n")

    def measure(self, name: str, work: Callable[[], dict[str, Any]], must_fit: bool = True) -> None:
        """Adds what `work` finds, or its error. Where it need not fit, out of memory is a finding."""
        clear()
        try:
            self.add(name, **work())
        except torch.OutOfMemoryError:
            self.add(name, "out of memory" if must_fit else "", result="out of memory")
        except Exception as error:
            traceback.print_exc()
            self.add(name, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")


# The stages.


def backends(report: Report, folder: Path) -> None:
    """What is there, and what `auto` makes of it."""
    card = torch.cuda.get_device_properties(0) if CUDA else None
    report.add("device", result=f"{card.name}, {card.total_memory / GIB:.1f} GiB, sm_{card.major}{card.minor}" if card else "CPU")
    report.add("torch", result=f"{torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")
    model = load_base(ROOT / "data/tiny", "auto", packed=True)
    report.add("dtype: auto", result=str(model.dtype).removeprefix("torch."))
    report.add("attn_implementation: auto", result=attention_of(model))
    report.add("flash-attn", result="installed" if is_flash_attn_2_available() else "not installed")
    report.add("varlen_attn takes", result=", ".join(list(signature(varlen.varlen_attn).parameters)[7:]))
    on = [name for name in ("cudnn", "flash", "mem_efficient", "math") if getattr(torch.backends.cuda, f"{name}_sdp_enabled")()]
    report.add("kernels of sdpa that are on", "cudnn is on" if "cudnn" in on else "", result=", ".join(on))
    report.measure("matmul", lambda: {"result": f"{matmul_flops() / 1e12:.4g} TFLOP/s in {DTYPE}".replace("torch.", "")})


def kernels(report: Report, folder: Path) -> None:
    """Attention by segments, as rows and towers call it, against sdpa for each segment, both compared with float64."""
    lengths = [1, 17, 128, 300, 66, 5] if CUDA else [1, 17, 40, 5]
    bounds = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
    for heads, kv_heads, size, causal in ((28, 4, 128, True), (32, 8, 128, True), (16, 16, 80, False), (16, 16, 72, False)):
        module = torch.nn.Identity()
        module.is_causal, module.num_key_value_groups = causal, heads // kv_heads
        torch.manual_seed(0)
        states = [torch.randn(1, of, sum(lengths), size, device=DEVICE) for of in (heads, kv_heads, kv_heads)]
        upstream = torch.randn(1, sum(lengths), heads, size, device=DEVICE)

        def run(dtype: torch.dtype, packed: bool, module: Any = module, states: Any = states, upstream: Any = upstream) -> Any:
            leaves = [of.to(dtype, copy=True).requires_grad_() for of in states]
            if packed:
                out = attention(module, *leaves, None, cu_seq_lens_q=bounds, max_length_q=max(lengths))[0]
            else:
                parts = zip(*(of.split(lengths, 2) for of in leaves), strict=True)
                out = torch.cat([attention(module, *part, None)[0] for part in parts], 1)
            out.backward(upstream.to(dtype))
            return [out.detach().double(), *(of.grad.double() for of in leaves)]

        def compare(name: str, run: Callable[..., Any] = run) -> dict[str, Any]:
            wanted = run(torch.float64, packed=False)
            ours, plain = (
                max(((one - of).abs().max() / of.abs().max()).item() for one, of in zip(found, wanted, strict=True))
                for found in (run(DTYPE, packed=True), run(DTYPE, packed=False))
            )
            if not max(ours, plain) <= max(8 * torch.finfo(DTYPE).eps, 1e-5):
                raise ArithmeticError(f"packed differs from float64 by {ours:.3g}, one by one by {plain:.3g}")
            return {"packed": ours, "one by one": plain}

        what = f"{heads} heads of {size}, {kv_heads} of keys{', causal' * causal}"
        report.measure(f"attention forward and back, {what}", partial(compare, what))


def rows(report: Report, folder: Path) -> None:
    """A packed row of each family against its records in rows of their own: the loss and the gradients of LoRA."""
    for name in ("Qwen2-VL-7B", "Qwen2.5-VL-7B", "Qwen3-VL-8B"):

        def compare(name: str = name) -> dict[str, Any]:
            config = config_of(name, toy=True)
            run = trained(config)
            examples = records(config, 400, 3, 60, seed=0)

            def gradients(of: Sequence[Row]) -> tuple[float, torch.Tensor]:
                run.model.zero_grad()
                losses = [Run.loss(run, row) for row in of]
                sum(losses).backward()  # type: ignore[union-attr]
                return sum(loss.item() for loss in losses), torch.cat([p.grad.flatten() for p in trainable(run.model).values()])

            (packed, ours), (single, wanted) = gradients([join(examples)]), gradients([join([one]) for one in examples])
            loss, gradient = abs(packed / single - 1), ((ours - wanted).abs().max() / wanted.abs().max()).item()
            rounding = torch.finfo(DTYPE).eps
            if not (loss <= max(rounding, 1e-5) and gradient <= max(8 * rounding, 1e-4)):
                raise ArithmeticError(f"the loss differs by {loss:.3g}, a gradient by {gradient:.3g}")
            width = config.text_config.hidden_size * (1 + len(getattr(config.vision_config, "deepstack_visual_indexes", [])))
            keep = partial(Features(folder / name, 1, width, DTYPE).write, 0)
            if waits := waited(lambda: Run.loss(run, join(examples), keep).backward()):
                raise ArithmeticError(f"the GPU was waited for in a row: {waits[0]}")
            return {"loss differs by": loss, "gradients by": gradient}

        report.measure(f"{name.rsplit('-', 1)[0]}, packed and one by one", compare)


def waited(run: Callable[[], object]) -> list[str]:
    """Where the GPU is waited for, by torch's own count; without one nothing is."""
    if not CUDA:
        run()
        return []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [f"{Path(of.filename).name}:{of.lineno}" for of in said if "called a synchronizing" in str(of.message)]


def command(arguments: Sequence[str], log: Path, fills: bool = False) -> None:
    """`qwenvl-ft`, in this process, into a log. With `fills`, memory is out in the fourth step."""
    for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
        stream.flush()
        with log.open("ab") as file:
            os.dup2(file.fileno(), number)
    calls = iter(range(1, 99))

    def filled(*given: Any, stock: Any = loop.train_step) -> Any:
        if next(calls) == 4:
            if not CUDA:
                raise torch.OutOfMemoryError("forced, without a GPU")
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(1e-6)
        return stock(*given)

    if fills:
        loop.train_step = filled
    command_line(list(arguments))


def commands(report: Report, folder: Path) -> None:
    """train, out of memory, resume, export and ask, each in a process of its own, on data/tiny."""
    few, empty = folder / "few.json", folder / "empty.yaml"
    few.write_text(json.dumps(json.loads((ROOT / "data/sample/train.json").read_text())[:12]))
    empty.write_text("seed: 42\n")
    tiny = str(ROOT / "data/tiny")
    settings = [
        "train", "--config", str(empty), f"model={tiny}", f"train_meta_file={few}", f"train_data_dir={ROOT / 'data/sample/images'}",
        "max_pixels=50176", "row_tokens=1024", "rows_per_step=2", "max_steps=6", "save_steps=3", "learning_rate=1e-3",
    ]  # fmt: skip

    def run(name: str, *arguments: str, code: int = 0, says: str = "", fills: bool = False) -> str:
        log = folder / f"{name}.log"
        began = time.perf_counter()
        process = CONTEXT.Process(target=command, args=(arguments, log, fills))
        process.start()
        process.join()
        said = log.read_text(errors="replace")
        wrong = process.exitcode != code or says not in said or "Traceback" in said
        last = (said.strip().splitlines() or ["nothing"])[-1]
        problem = f"exit code {process.exitcode}, {code} expected; it said: {last}" if wrong else ""
        report.add(name, problem, result=f"{time.perf_counter() - began:.1f} s")
        return said

    whole, broken = folder / "whole", folder / "broken"
    run("train, 6 steps", *settings, f"output_dir={whole}")
    run("train, out of memory in step 4", *settings, f"output_dir={broken}", code=1, says="goes on from checkpoint-3", fills=True)
    run("train, resumed", *settings, f"output_dir={broken}", "resume=true", says="going on from")

    def apart() -> dict[str, float]:
        losses = [[json.loads(line)["loss"] for line in (of / "metrics.jsonl").read_text().splitlines()] for of in (whole, broken)]
        found = max(abs(one / other - 1) for one, other in zip(*losses, strict=True))
        if not found <= (0.05 if CUDA else 0.0):  # kernels on a GPU add up in any order
            raise ArithmeticError(f"they differ by {found:.3g}")
        return {"loss differs by": found}

    report.measure("losses, whole and resumed", apart)
    run("export", "export", "--adapter", str(whole), "--out", str(folder / "merged"), says="merged into")
    picture = str(next((ROOT / "data/sample/images").glob("*.png")))
    run("ask", "ask", str(folder / "merged"), "--image", picture, "--max-new-tokens", "8", "What is it?")


@contextmanager
def allowed(gib: float | None) -> Iterator[None]:
    """Within so much of the GPU's memory, the rest of its allocator's 1.3 GiB being CUDA's own."""
    if not (CUDA and gib):
        yield
        return
    torch.cuda.set_per_process_memory_fraction(min(1.0, (gib - 1.3) * GIB / torch.cuda.get_device_properties(0).total_memory))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def training(
    run: Any, config: Any, matmul: float, attends: str = "varlen", recompute: bool = True, tokens: int = 4096, taught: int = 410,
    chunk: int = head.CHUNK, cudnn: bool = False, gib: float | None = None, lora: str = "fused", kept: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Steps of one row, no two of one size; the first two are not counted."""
    if not CUDA:
        tokens, taught = tokens // 16, taught // 16
    made = [join(records(config, tokens, 3 * tokens // (4096 if CUDA else 256), taught, seed)) for seed in range(10 if CUDA else 4)]
    made = [looked_at(run, row) for row in made] if kept else made
    if CUDA:
        made = [{key: of.pin_memory() if isinstance(of, torch.Tensor) else of for key, of in row.items()} for row in made]
    for module in run.model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = VARLEN if attends == "varlen" else attends
    run.model.train()
    if recompute:
        run.model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        run.model.gradient_checkpointing_disable()
    optimizer = torch.optim.AdamW(trainable(run.model).values(), lr=1e-5, fused=CUDA or None)

    def step(row: Row) -> None:
        Run.loss(run, row).div(taught).backward()
        optimizer.step()
        optimizer.zero_grad()

    torch.backends.cuda.enable_cudnn_sdp(cudnn)
    head.CHUNK = chunk
    try:
        with allowed(gib), lora_runs(run.model, lora):
            times = [seconds(partial(step, row)) for row in made][2:]
    finally:
        optimizer.zero_grad()
        head.CHUNK = CHUNK
        torch.backends.cuda.enable_cudnn_sdp(False)
    counted = made[2:]
    done = sum(row["input_ids"].numel() for row in counted)
    return {
        "tokens/s": done / sum(times), "ms a row": 1000 * sum(times) / len(times), "slowest ms": 1000 * max(times),
        "MFU %": 100 * floor_flops(config, run.model, counted) / sum(times) / matmul, "peak GiB": peak_gib(),
    }  # fmt: skip


CHUNK = head.CHUNK
LINES: dict[str, dict[str, Any]] = {
    "varlen, recomputing, head by chunks": {},
    "sdpa with a mask": {"attends": "sdpa"},
    "sdpa with a mask, cuDNN on": {"attends": "sdpa", "cudnn": True},
    "varlen, cuDNN on": {"cudnn": True},
    "nothing recomputed": {"recompute": False},
    "nothing recomputed, gate kept": {"recompute": False, "lora": "gate kept"},
    "LoRA as PEFT runs it": {"lora": "PEFT"},
    "features kept": {"kept": True},
    "features kept, nothing recomputed": {"kept": True, "recompute": False},
    "2,048 tokens taught, head by chunks": {"taught": 2048},
    "2,048 tokens taught, head at once": {"taught": 2048, "chunk": 2**30},
    "rows of 8,192": {"tokens": 8192, "taught": 820},
    "rows of 8,192, sdpa with a mask": {"tokens": 8192, "taught": 820, "attends": "sdpa"},
    "in 24 GiB": {"gib": 24.0},
}


def levers(report: Report, folder: Path) -> None:
    config, matmul = config_of(LEVERS, TOY), matmul_flops()
    run = trained(config)
    report.add(f"{LEVERS}, LoRA r16 on language", result=f"matmul {matmul / 1e12:.4g} TFLOP/s")
    for name, settings in LINES.items():
        report.measure(name, partial(training, run, config, matmul, **settings), must_fit="gib" in settings)


def models(report: Report, folder: Path, name: str) -> None:
    config, matmul = config_of(name, TOY), matmul_flops()
    run = trained(config)
    for title, recompute in (("recomputing", True), ("nothing recomputed", False)):
        work = partial(training, run, config, matmul, recompute=recompute)
        report.measure(f"{name}, {title}", work, must_fit=recompute)


def generate(report: Report, folder: Path, name: str) -> None:
    """Greedy answers of one length to a picture of 1,280 tokens and a question of 64."""
    config = config_of(name, TOY)
    model = random_model(config, "sdpa").eval()
    height, width, asks, answer = (64, 80, 64, 64) if CUDA else (8, 8, 8, 8)
    seen = height * width // 4

    def answering(batch: int) -> dict[str, Any]:
        row = join([record(config, seen + 2 + asks, height, width, 1, random.Random(seed)) for seed in range(batch)])
        ids = row["input_ids"].view(batch, -1)
        shown = as_floats({key: row[key] for key in ("pixel_values", "image_grid_thw", SCALES)})
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": (ids == PICTURE).int(), **shown}
        inputs = {key: value.to(DEVICE) for key, value in inputs.items()}

        def say(tokens: int) -> float:
            model.generation_config = GenerationConfig(max_new_tokens=tokens, do_sample=False, pad_token_id=0)  # and no end
            with torch.inference_mode():
                return seconds(lambda: model.generate(**inputs))

        say(2)
        first, whole = say(1), say(1 + answer)
        return {"read tokens/s": ids.numel() / first, "written tokens/s": batch * answer / max(whole - first, 1e-9),
                "ms a token": 1000 * (whole - first) / answer, "peak GiB": peak_gib()}  # fmt: skip

    for batch in (1, 8, 32) if CUDA else (1, 3):
        report.measure(f"{name}, batch {batch}", partial(answering, batch), must_fit=batch == 1)


STAGES: dict[str, dict[str, Callable[[Report, Path], None]]] = {
    "smoke": {"backends": backends, "attention": kernels, "rows": rows, "commands": commands},
    "levers": {"levers": levers},
    "models": {name: partial(models, name=name) for name in SHAPES if name != LEVERS},
    "generate": {name: partial(generate, name=name) for name in ("Qwen2-VL-2B", "Qwen2-VL-7B", "Qwen3-VL-8B")},
}
CONTEXT: Any = get_context("spawn" if CUDA else "fork")  # a fork cannot use CUDA once its parent has looked at it; it is quicker


def work(stage: str, part: str, results: Path, folder: Path) -> None:
    """One part, in a process and a process group of its own."""
    os.setsid()
    folder.mkdir()
    os.environ |= {"XDG_CACHE_HOME": str(folder), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    STAGES[stage][part](Report(results, part), folder)


def run_stage(stage: str, minutes: float, folder: Path) -> list[dict[str, Any]]:
    """The lines of a stage; a part that dies, or that is not done when the stage's time is up, has one that says so."""
    end, results = time.monotonic() + 60 * minutes, folder / f"{stage}.jsonl"
    results.touch()
    for part in STAGES[stage]:
        process = CONTEXT.Process(target=work, args=(stage, part, results, folder / f"{stage} {part}"))
        process.start()
        try:
            process.join(max(1.0, end - time.monotonic()))
            late = process.is_alive()
        finally:  # nothing is left on the device, whoever ended this
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
        process.join()
        if late:
            Report(results, part).add("not finished", f"the {minutes:g} minutes of the stage were over")
        elif process.exitcode:
            Report(results, part).add("not finished", f"the process ended with exit code {process.exitcode}; see above")
    return [json.loads(line) for line in results.read_text().splitlines()]


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Markdown; a column for each value that any line has."""
    columns = list(dict.fromkeys(key for line in lines for key in line if key not in ("part", "name", "problem")))
    shown = [
        [
            line["name"],
            *(f"{value:,.4g}" if isinstance(value := line.get(key, ""), float) else str(value) for key in columns),
            f"**{line['problem']}**" if line["problem"] else "",
        ]
        for line in lines
    ]
    heads = ["", *columns, "wrong"]
    rows = [heads, ["---"] * len(heads), *shown]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=["all", *STAGES], default="all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the figures go for a program, too")
    parser.add_argument("--minutes", type=float, default=9, help="the limit of a stage (default %(default)s)")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if not CUDA:
        print(f"CPU, toy sizes; {ASKED}.")
    device = torch.cuda.get_device_name() if CUDA else "CPU, toy sizes: no figure means anything"
    found = {"device": device, "torch": torch.__version__, "stages": {}}
    with tempfile.TemporaryDirectory() as name:
        for stage in STAGES if arguments.stage == "all" else [arguments.stage]:
            lines = run_stage(stage, arguments.minutes, Path(name))
            found["stages"][stage] = lines
            print(f"\n### {stage}: {device}, torch {torch.__version__}\n\n{table(lines)}", flush=True)
            if arguments.json:  # after each stage: the next one may be cut off from outside
                arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    wrong = [line["name"] for lines in found["stages"].values() for line in lines if line["problem"]]
    print(f"\n{len(wrong)} wrong: {'; '.join(wrong)}" if wrong else "\nnothing wrong")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
