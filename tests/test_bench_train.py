"""scripts/bench_train.py: the sets are the same each time, what is counted is what the records hold, and the table says what is amiss."""

import importlib.util
import json
import sys

import pytest

from tests.conftest import ROOT


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(ROOT / "scripts"))
    spec = importlib.util.spec_from_file_location("bench_train", ROOT / "scripts" / "bench_train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_set_is_the_same_each_time_and_holds_what_it_says(bench, tmp_path):
    for key, talks in bench.SETS.items():
        files = [bench.write_set(talks, tmp_path / name / key) for name in ("a", "b")]
        ours, again = (file.read_text().replace(str(file.parent), "") for file in files)
        records = json.loads(files[0].read_text())
        assert ours == again and len(records) == talks.pictures * talks.questions + talks.texts
        shown = [path for record in records for path in record["images"]]
        assert len(shown) == talks.pictures * talks.questions and len(set(shown)) == talks.pictures
        assert all(record["messages"][0]["content"].count("<image>") == len(record["images"]) for record in records)
    many = json.loads(bench.many_records(bench.write_set(bench.SETS["one"], tmp_path / "many"), 50).read_text())
    assert len({path for record in many for path in record["images"]}) == 50


def test_ours_is_measured_and_trains_on_what_the_records_hold(bench, tmp_path):
    """The set has no two records that begin alike: each token is run, whatever is shared."""
    model = tmp_path / "model"
    bench.write_model(model)
    file = bench.write_set(bench.Talks("few", 2, 1, 2, (56, 112), (2, 4), (2, 4)), tmp_path / "few")
    what = {"what": "few"} | bench.measure_set(file, model)
    one = bench.run("ours", tmp_path, model, file, bench.RECORDS_PER_STEP, tmp_path / "run")
    assert "problem" not in one, one
    first, second = one["epochs"]
    assert (first["tokens"], first["patches"]) == (what["tokens"], what["patches"])
    assert (second["tokens"], second["patches"]) == (what["tokens"], 0), "what the tower makes is kept"
    assert second["loss"] < first["loss"] == pytest.approx(8.3, abs=0.3)  # ln 4096: it knows nothing
    assert first["taught"] == sum(line["taught_tokens"] for line in metrics(tmp_path)[: len(one["lines"]) // 2])
    assert [step["optimized"] for step in one["lines"]] == pytest.approx([line["loss"] for line in metrics(tmp_path)])
    assert (first["layer runs"], first["block runs"], second["block runs"]) == (
        1,
        1,
        0,
    )  # nothing is recomputed where memory is free for all of it; of a frozen tower there is nothing to go back to
    assert one["start CPU s"] > 0 and one["peak GiB"] > 0.1
    assert f"| ours | 2 | {what['tokens']}" in bench.table(what, [one])


def metrics(folder):
    return [json.loads(line) for line in (folder / "run" / "out" / "metrics.jsonl").read_text().splitlines()]


def stored(toolkit, cpu, tokens=1000, patches=400):
    epoch = {"tokens": tokens, "patches": patches, "taught": 50, "layer runs": 2.0, "block runs": 1.0, "loss": 8.0}
    epoch |= {"CPU s": cpu, "wall s": cpu}
    run = {"toolkit": toolkit, "settings": {"lora_rank": 8, "model": "/tmp/m"}, "load": 1.0, "lines": [{}] * 4}
    return run | {"epochs": [epoch] * 2, "start CPU s": 9.0, "start wall s": 12.0, "peak GiB": 1.25}


def test_the_table_compares_with_the_fastest_that_trains_on_everything(bench):
    what = {"what": "few", "records": 10, "pictures": 2, "tokens": 1000, "patches": 400}
    runs = [stored("ours", cpu, tokens=600) for cpu in (2.0, 90.0, 1.0)]
    runs += [stored("ms-swift", 1.0, tokens=700), stored("trl", 4.0), stored("recipe", 8.0, patches=416)]
    runs += [{"toolkit": "llamafactory", "settings": {}, "load": 3.0, "problem": "exit code 1; it said: ImportError: x"}]
    rows = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ") for line in bench.table(what, runs).splitlines()}
    assert rows["ours"][5:10] == ["2.00", "2.00", "2.00, 2.00", "500, 500", "2.00, 2.00"]
    assert rows["trl"][9] == "1.00, 1.00" and rows["recipe"][9] == "0.50, 0.50" and rows["llamafactory"][1] == "failed"
    said = bench.table(what, runs)
    assert "ms-swift runs 700 tokens where the records have 1,000: it is no peer here" in said
    assert "recipe runs 416 patches where the records have 400\n" in said and "ImportError: x" in said
    assert len({line.count("|") for line in said.splitlines() if line.startswith("|")}) == 1
    settings = bench.told(runs)
    assert "1.0 to 3.0" in settings and "lora_rank=8" in settings and "/tmp/m" not in settings
    assert "| trl | 9.0 | 12.0 |" in bench.start_table(10, runs) and "| llamafactory | failed: exit" in bench.start_table(10, runs)


def test_a_toolkit_that_fails_says_why(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "python_of", lambda toolkit, envs: sys.executable)
    one = bench.run("ms-swift", tmp_path, tmp_path, tmp_path / "no.json", 1, tmp_path / "run")
    assert "No module named 'swift'" in one["problem"]
