"""`eval --suite`: a stand-in of lmms-eval asks real servers and writes files as lmms-eval 0.7.3 does; scripts/check_lmms_eval.py asks
with the real one."""

import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from qwenvl_ft.cli.main import main
from qwenvl_ft.errors import UserError
from qwenvl_ft.evaluate.suite import _running, read_figures, suite_table
from qwenvl_ft.infer.engine import Engine
from tests.conftest import TINY
from tests.evaluate.standin import StandIn
from tests.serving import CHARTS, question, random_adapter

# As much of lmms-eval as is relied upon: its options, its client's variables, its habits of failing, its two files.
PROGRAM = """#!{python} -I
import json, os, pathlib, sys, urllib.error, urllib.request

sys.argv.remove("--log_samples")
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert options["--model"] == "openai"
model = dict(part.split("=", 1) for part in options["--model_args"].split(","))
how = os.environ.get("HOW", "")
print("\\x1b[32mINFO\\x1b[0m", json.dumps(options), "token:", os.environ.get("HF_TOKEN"), flush=True)
print("key:", os.environ["OPENAI_API_KEY"], "hub:", os.environ.get("HUGGING_FACE_HUB_TOKEN"), file=sys.stderr, flush=True)
if how == "breaks":
    print("ValueError: Tasks not found: chart")
    sys.exit(int(os.environ["STATUS"]))
asked = json.loads(pathlib.Path(options["--include_path"], "questions.json").read_text())[: int(options.get("--limit", 99))]
samples = []
for number, (messages, wanted) in enumerate(asked):
    body = {{"model": model["model"], "messages": messages, "max_tokens": 16, "temperature": 0}}
    headers = {{"Content-Type": "application/json", "Authorization": "Bearer " + os.environ["OPENAI_API_KEY"]}}
    request = urllib.request.Request(model["base_url"] + "/chat/completions", json.dumps(body).encode(), headers)
    try:
        text = json.load(urllib.request.urlopen(request))["choices"][0]["message"]["content"]
    except urllib.error.HTTPError as error:
        text = f"[LMMS_EVAL_REQUEST_FAILED after 5 retries] Error code: {{error.code}}"
    samples.append({{"doc_id": number, "target": wanted, "filtered_resps": text, "exact": float(text == wanted)}})
    print(f"\\rModel Responding: {{number + 1}}/{{len(asked)}}", end="", file=sys.stderr)
value = sum(sample["exact"] for sample in samples) / len(samples)
found = {{"alias": "chart", "exact,none": value, "exact_stderr,none": 0.25, "exact_stderr_clt,none": 0.3}}
folder = pathlib.Path(options["--output_path"], model["model"])
folder.mkdir(parents=True, exist_ok=True)
counts = {{"chart": {{"original": 99, "effective": len(asked)}}}}
(folder / "20261127_231401_results.json").write_text(json.dumps({{"results": {{"chart": found}}, "n-samples": counts}}))
if how != "keeps no samples":
    lines = [json.dumps(sample) for sample in samples]
    (folder / "20261127_231401_samples_chart.jsonl").write_text("\\n".join(lines) + "\\n")
"""


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """The folder of tasks, in a folder where the stand-in is lmms-eval."""
    monkeypatch.chdir(tmp_path)
    program = tmp_path / "bin" / "lmms-eval"
    program.parent.mkdir()
    program.write_text(PROGRAM.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    for name in ("OPENAI_API_KEY", "HF_TOKEN", "LMMS_EVAL"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "tasks").mkdir()
    return tmp_path / "tasks"


@pytest.fixture
def service(tasks):
    """A server whose answer is the last word of a question."""
    asked = [
        [[{"role": "user", "content": f"say {word}"}], wanted] for word, wanted in (("one", "one"), ("two", "two"), ("six", "five"))
    ]
    (tasks / "questions.json").write_text(json.dumps(asked))
    with StandIn().serving() as service:
        yield service


def suite(capsys, *arguments, code=0):
    """(what it printed, what it complained about)."""
    with pytest.raises(SystemExit) as done:
        main(["eval", *map(str, arguments), "--suite", "chart", "--include-path", "tasks"])
    said = capsys.readouterr()
    assert (done.value.code or 0) == code, said.err
    return said.out, said.err


def test_a_folder_is_served_asked_scored_and_the_server_stopped(tasks, capsys):
    messages = [question("read", picture) for picture in CHARTS[:2]]
    adapter = random_adapter(TINY, tasks.parent / "one", 0)  # which answers all in its own way
    engine = Engine.open(TINY, adapter, max_pixels=12544)
    wanted = [engine.ask(asked, 16) for asked in messages]
    assert len(set(wanted)) == 2
    (tasks / "questions.json").write_text(json.dumps([*zip(messages, wanted, strict=True), [messages[0], wanted[1]]]))
    out, _ = suite(capsys, TINY, "--adapter", adapter, "--max-pixels", "12544", "--out", "out", "--json")
    figures = json.loads(out)
    (row,) = figures["rows"]
    assert row == {"task": "chart", "metric": "exact", "questions": 3, "value": 2 / 3, "low": pytest.approx(2 / 3 - 0.49),
                   "high": pytest.approx(2 / 3 + 0.49)}  # fmt: skip
    assert figures["answers"] == 3 and figures["empty_answers"] == [*wanted, wanted[0]].count("")
    assert figures["results"] == "out/served/20261127_231401_results.json"
    (url,) = re.findall(r"http://[\w.:]+/v1", (tasks.parent / "out" / "serve.log").read_text())
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/models")


def test_an_address_is_asked_with_its_key_and_no_key_is_shown(service, capsys, monkeypatch):
    monkeypatch.setenv("OUR_KEY", "sk-of-the-server")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-another")
    monkeypatch.setenv("HF_TOKEN", "hf-of-the-hub")
    out, err = suite(capsys, service.url.replace("//", "//OUR_KEY@") + "/v1", "--limit", "2", "--batch-size", "3")
    assert re.search(r"chart +exact +2 +1\.000 \(0\.510 to 1\.490\)", out) and "Model Responding: 2/2" in err
    assert service.keys == {"Bearer sk-of-the-server"}
    (log,) = (path.read_text() for path in Path().glob("suite-chart-*/lmms-eval.log"))
    assert "num_concurrent=3" in log and "token: None" in log and "key: ... hub: ..." in log and "\x1b" not in log
    assert not re.search("sk-of|hf-of", out + err + log)


def test_a_key_of_another_service_does_not_go_to_an_address(service, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-another")
    suite(capsys, f"{service.url}/v1#alone")
    assert service.keys == {"Bearer none"}


def test_a_name_that_is_not_served_is_said_before_anything_is_asked(service, capsys):
    """lmms-eval scored such a model with 0.0 and ended with status 0."""
    service.statuses, service.code = [404], "model_not_found"
    _, err = suite(capsys, f"{service.url}/v1#nobody", code=1)
    assert f"{service.url}/v1#nobody: does not answer: will not answer: 404" in err and "behind #" in err
    assert not list(Path().glob("suite-*")) and len(service.bodies) == 1


def test_failed_requests_are_no_answers(service, capsys):
    service.statuses = [200, 200, 413]  # of the first question, and of the first two of the task
    out, err = suite(capsys, f"{service.url}/v1", code=1)
    assert out == "" and "1 of 3 requests failed" in err and "REQUEST_FAILED after 5 retries] Error code: 413" in err


def test_questions_whose_answer_is_not_kept_have_no_figure(service, capsys, monkeypatch):
    monkeypatch.setenv("HOW", "keeps no samples")
    _, err = suite(capsys, f"{service.url}/v1", code=1)
    assert "_samples_chart.jsonl: has 0 of 3 answers" in err


@pytest.mark.parametrize("status", [0, 3])
def test_its_failure_is_told_with_its_last_words(status, service, capsys, monkeypatch):
    """Even where it ends as if all were well, and an earlier run has left results."""
    suite(capsys, f"{service.url}/v1", "--out", "out")
    monkeypatch.setenv("HOW", "breaks")
    monkeypatch.setenv("STATUS", str(status))
    _, err = suite(capsys, f"{service.url}/v1", "--out", "out", code=1)
    assert re.search(rf"lmms-eval chart: failed \(exit status {status}, 0 files of results\):[^:]*INFO", err)
    assert "ValueError: Tasks not found: chart\n  fix: mend that; it is known to run by python -m venv" in err
    assert err.endswith("; all that it said is in out/lmms-eval.log\n1 problem\n")


def test_it_says_how_it_is_installed(service, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")
    _, err = suite(capsys, f"{service.url}/v1", code=1)
    assert "lmms-eval: is not installed here" in err and "ENV/bin/pip install lmms-eval==0.7.3 'filelock<4'" in err
    monkeypatch.setenv("LMMS_EVAL", "env/lmms-eval")
    assert "env/lmms-eval: is no command" in suite(capsys, f"{service.url}/v1", code=1)[1]


def test_a_folder_that_is_a_file_is_said(service, tasks, capsys):
    Path("taken").write_text("")
    assert "taken: File exists" in suite(capsys, f"{service.url}/v1", "--out", "taken", code=1)[1]


def test_a_server_that_does_not_start_is_told_with_its_last_words(tasks, capsys, monkeypatch):
    python = tasks.parent / "python"
    python.write_text("#!/bin/sh\necho no memory is left >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    _, err = suite(capsys, TINY, "--out", "out", code=1)
    assert f"serve {TINY}: did not start: \nno memory is left\n  fix: mend that; all that it said is in out/serve.log" in err


def test_what_runs_is_stopped_where_this_process_is_told_to_end():
    sleeping = subprocess.Popen(["sleep", "600"])
    with pytest.raises(SystemExit) as done, _running(sleeping):
        os.kill(os.getpid(), signal.SIGTERM)
    assert done.value.code == 128 + signal.SIGTERM and sleeping.returncode == -signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize(
    "arguments, wrong",
    [
        (["--suite", "chart", "--metric", "cer"], "--metric"),
        (["meta.json", "--suite", "chart"], "meta"),
        (["meta.json", "--lmms-eval", "lmms-eval"], "--lmms-eval"),
        ([], "META"),
    ],
)
def test_options_that_do_not_go_together_are_refused(arguments, wrong, capsys):
    with pytest.raises(SystemExit) as done:
        main(["eval", str(TINY), *arguments])
    assert done.value.code == 2 and f"Invalid value for {wrong}" in capsys.readouterr().err


def test_an_address_has_its_own_adapters(service, capsys):
    assert "has its own adapters" in suite(capsys, f"{service.url}/v1", "--adapter", "a", code=2)[1]


def test_a_name_that_lmms_eval_asks_otherwise_is_noted(service, capsys):
    assert "demo1 for one of OpenAI's by its name" in suite(capsys, f"{service.url}/v1#demo1")[1]


def test_figures_are_read_as_tasks_and_groups_have_them(tmp_path):
    """Two filters, a group, a sum without a standard error, a task that only hands in, one that is all right."""
    results = tmp_path / "20261127_231401_results.json"
    found = {
        "mme": {"alias": "mme", "score,none": 1523.4, "score_stderr,none": "N/A", "score_stderr_clt,none": 0.1},
        "math": {"match,strict": 0.5, "match_stderr,strict": 0.1, "match,loose": 1.0, "match_stderr,loose": 0.0},
        "test": {"submission,none": None, "submission_stderr,none": [], "mean,none": math.nan},
        "all": {" ": " ", "alias": "all", "match,strict": 0.5, "match_stderr,strict": 0.05},
    }
    counts = {task: {"original": 9, "effective": 2.0} for task in ("mme", "math", "test")}
    results.write_text(json.dumps({"results": found, "n-samples": counts}))
    for task in counts:
        filters = 1 + (task == "math")  # each has a line for every question
        lines = [{"doc_id": number, "filtered_resps": ["", " "][number:]} for number in (0, 1)] * filters
        results.with_name(f"20261127_231401_samples_{task}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    figures = read_figures(results)
    assert figures["answers"] == 8 == figures["empty_answers"]
    assert [row[2:] for row in suite_table(figures)[2]] == [
        ["2", "1523.400 (no interval)"], ["2", "0.500 (0.304 to 0.696)"], ["2", "1.000 (no interval)"], ["2", "-"], ["2", "-"],
        ["", "0.500 (0.402 to 0.598)"],
    ]  # fmt: skip
    assert [row["metric"] for row in figures["rows"]] == [
        "score",
        "match,strict",
        "match,loose",
        "submission",
        "mean",
        "match,strict",
    ]


def test_a_failure_that_a_filter_has_hidden_is_found(tmp_path):
    results = tmp_path / "1_results.json"
    results.write_text(json.dumps({"results": {}, "n-samples": {"math": {"original": 1, "effective": 1}}}))
    line = {"doc_id": 0, "resps": ["[LMMS_EVAL_REQUEST_FAILED after 5 retries] no"], "filtered_resps": "[invalid]"}
    results.with_name("1_samples_math.jsonl").write_text(json.dumps(line))
    with pytest.raises(UserError, match="1 of 1 requests failed"):
        read_figures(results)
