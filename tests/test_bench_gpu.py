"""scripts/bench_gpu.py runs whole without a GPU, and what goes wrong in it is named."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

SCRIPT = ROOT / "scripts" / "bench_gpu.py"


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("bench_gpu", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_runs_whole_on_the_cpu_and_says_what_a_card_would_be_asked(tmp_path):
    file = tmp_path / "found.json"
    done = subprocess.run([sys.executable, str(SCRIPT), "--json", str(file)], text=True, capture_output=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "a card would be asked for" in done.stdout.splitlines()[0] and "nothing wrong" in done.stdout
    found = json.loads(file.read_text())
    assert "CPU" in found["device"] and set(found["stages"]) == {"smoke", "levers", "models", "generate"}
    lines = {line["name"]: line for stage in found["stages"].values() for line in stage}
    assert "in 24 GiB" in lines and "train, resumed" in lines and "ask" in lines
    assert all(line["tokens/s"] > 0 and line["MFU %"] > 0 for line in found["stages"]["models"])
    assert all(f"| {name} |" in done.stdout for name in lines)


def test_a_part_that_dies_and_a_line_that_fails_are_named_and_the_next_one_runs(bench, tmp_path, monkeypatch, capfd):
    def dies(report, folder):
        report.add("before", result="kept")
        os._exit(7)

    def fails(report, folder):
        report.measure("division", lambda: {"result": 1 / 0})
        report.measure("roomy", full, must_fit=False)
        report.measure("tight", full)

    def full():
        raise bench.torch.OutOfMemoryError("full")

    monkeypatch.setitem(bench.STAGES, "smoke", {"dies": dies, "fails": fails})
    monkeypatch.setattr(sys, "argv", ["bench_gpu.py", "--stage", "smoke"])
    with pytest.raises(SystemExit) as ended:
        bench.main()
    said = capfd.readouterr().out
    assert ended.value.code == 1 and "| before | kept |  |" in said and "3 wrong: not finished; division; tight" in said
    assert "exit code 7" in said and "ZeroDivisionError" in said and "| roomy | out of memory |  |" in said


def test_a_part_that_never_ends_is_ended(bench, tmp_path, monkeypatch):
    monkeypatch.setitem(bench.STAGES, "smoke", {"hangs": lambda report, folder: bench.time.sleep(600)})
    (line,) = bench.run_stage("smoke", 0.0, tmp_path)
    assert "were over" in line["problem"]


@pytest.mark.parametrize(
    ("name", "tera"), [("Qwen2-VL-2B", 56), ("Qwen2-VL-7B", 145), ("Qwen2.5-VL-7B", 134), ("Qwen3-VL-8B", 144)]
)
def test_the_flops_are_those_of_the_real_shapes(bench, name, tera):
    """A row of three pictures of 1,280 tokens, as an operator's counter found it for the real modules."""
    config = bench.config_of(name, toy=False)
    with bench.torch.device("meta"):
        model = bench.AutoModelForImageTextToText.from_config(config)
    row = bench.join([bench.record(config, 1365, 64, 80, 137, bench.random.Random(0)) for _ in range(3)])
    assert bench.floor_flops(config, model, [row]) / 1e12 == pytest.approx(tera, rel=0.02)


def test_attention_that_lets_records_see_each_other_is_found(bench, tmp_path, monkeypatch):
    def leaky(*states, cu_seq_lens_q=None, max_length_q=None, stock=bench.attention):
        return stock(*states)

    monkeypatch.setattr(bench, "attention", leaky)
    report = bench.Report(tmp_path / "lines", "attention")
    bench.kernels(report, tmp_path)
    lines = [json.loads(line) for line in report.path.read_text().splitlines()]
    assert len(lines) == 4 and all("packed differs from float64" in line["problem"] for line in lines)
