"""Asks the sample's questions twice, by the installed lmms-eval through `qwenvl-ft eval --suite` and by our own `eval`: every answer
must be scored alike, under ChartQA's rule as each of them has it.

    python scripts/check_lmms_eval.py --lmms-eval ENV/bin/lmms-eval [--adapter runs/demo]

lmms-eval lives in an environment of its own; docs/ask.md says how it is made.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow
import pyarrow.parquet

from qwenvl_ft.data.meta_file import read_records
from qwenvl_ft.evaluate.scoring import questions

BASE, SAMPLE = Path("data/tiny"), Path("data/sample")
TASK = "qwenvl_ft_sample"
TASK_YAML = """\
task: {task}
dataset_path: parquet
dataset_kwargs:
  data_files: {{test: {parquet}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.pictures
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{wanted}}}}"
generation_kwargs: {{max_new_tokens: {max_new_tokens}, temperature: 0}}
process_results: !function utils.score
metric_list:
  - {{metric: relaxed, aggregation: mean, higher_is_better: true}}
"""
TASK_PY = """\
import io

from lmms_eval.tasks.chartqa.utils import relaxed_correctness
from PIL import Image


def pictures(doc):
    return [Image.open(io.BytesIO(doc["picture"])).convert("RGB")]


def score(doc, results):
    return {"relaxed": float(relaxed_correctness(results[0], doc["wanted"]))}
"""
MAX_NEW_TOKENS = 128


def make_task(folder: Path) -> list[str]:
    """Writes the sample as a task of lmms-eval; returns the wanted answers."""
    records, _, _ = read_records(SAMPLE / "eval.json", SAMPLE / "images")
    rows = []
    for record, wanted in questions(records):
        picture, question = record.turns[-1].parts  # so is every record of the sample
        rows.append({"question": question, "wanted": wanted, "picture": picture.source.read_bytes()})
    parquet = folder / "sample.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), parquet)
    yaml = TASK_YAML.format(task=TASK, parquet=parquet.resolve(), max_new_tokens=MAX_NEW_TOKENS)
    (folder / f"{TASK}.yaml").write_text(yaml)
    (folder / "utils.py").write_text(TASK_PY)
    return [row["wanted"] for row in rows]


def ours(*arguments: str | Path) -> str:
    """What `qwenvl-ft eval` printed as JSON."""
    command = [sys.executable, "-m", "qwenvl_ft", "eval", *map(str, arguments), "--json"]
    print(f"$ {' '.join(command[1:])}", flush=True)
    # The task is here: nothing is looked for on a hub.
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | offline).stdout


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lmms-eval", default="lmms-eval", help="its command")
    parser.add_argument("--adapter", type=Path, help="beside data/tiny")
    arguments = parser.parse_args()
    model = [BASE, *(["--adapter", arguments.adapter] if arguments.adapter else [])]
    with TemporaryDirectory() as name:
        folder = Path(name)
        wanted = make_task(folder)
        out = ["--out", folder / "suite", "--lmms-eval", arguments.lmms_eval]
        figures = json.loads(ours(*model, "--suite", TASK, "--include-path", folder, *out))
        predictions = folder / "predictions.jsonl"
        table = json.loads(
            ours(*model, SAMPLE / "eval.json", "--data-dir", SAMPLE / "images", "--out", predictions,
                 "--max-new-tokens", MAX_NEW_TOKENS, "--metric", "relaxed")
        )["table"]  # fmt: skip
        samples = Path(figures["results"].replace("_results.json", f"_samples_{TASK}.jsonl"))
        theirs = {line["doc_id"]: line for line in lines_of(samples)}
        own = lines_of(predictions)
    for title, (row,) in (("lmms-eval", figures["rows"]), ("eval", table["rows"])):
        print(f"{title}: relaxed {row['value']:.4f} ({row['low']:.4f} to {row['high']:.4f}) of {row['questions']} questions")
    differ = [number for number, line in enumerate(own)
              if (line["wanted"], line["answer"], line["relaxed"])
              != (wanted[number], theirs[number]["filtered_resps"], bool(theirs[number]["relaxed"]))]  # fmt: skip
    for number in differ:
        print(f"DIFFER  {own[number]['question']!r}: {own[number]['answer']!r}, there {theirs[number]['filtered_resps']!r}")
    print(f"{len(own) - len(differ)} of {len(wanted)} questions are answered and scored alike")
    sys.exit(bool(differ) or len(own) != len(wanted) or len(theirs) != len(wanted))


if __name__ == "__main__":
    main()
