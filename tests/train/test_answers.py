"""Evaluations by answers: their score is that of `eval`, they leave the training as it is, and the best checkpoint goes by them."""

import json
import shutil
from types import SimpleNamespace
from typing import get_args

import pytest
from transformers import AutoProcessor

from qwenvl_ft.data.prepare import prepare
from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.evaluate.metrics import METRICS
from qwenvl_ft.infer.engine import Answer, Engine
from qwenvl_ft.train import answers, loop
from qwenvl_ft.train.answers import Answers, Scored
from qwenvl_ft.train.best import Best
from qwenvl_ft.train.launch import start
from qwenvl_ft.values import Metric
from tests.conftest import SAMPLE, TINY
from tests.runs import config, few_records, metrics, run, same

SETTINGS = {"max_steps": 2, "rows_per_step": 1, "lora_dropout": 0.1, "learning_rate": 1e-2, "warmup_ratio": 0.0, "eval_steps": 1,
            "eval_data_dir": SAMPLE / "images", "eval_max_new_tokens": 24}  # fmt: skip


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """Five records that are not trained on."""
    path = tmp_path_factory.mktemp("held_out") / "held_out.json"
    path.write_text(json.dumps(json.loads((SAMPLE / "train.json").read_text())[3:8]))
    return path


def test_the_score_is_that_of_eval_and_the_training_stays_as_it_is(held_out, tmp_path, capsys):
    from qwenvl_ft.cli.main import main

    settings = {**SETTINGS, "train_meta_file": few_records(tmp_path, 3), "eval_meta_file": held_out}
    asked = run(tmp_path, **settings, eval_metric="cer", eval_samples=6)
    plain = run(tmp_path, "plain", **settings)
    lines, before = metrics(tmp_path / "run"), metrics(tmp_path / "plain")
    kept = ("loss", "grad_norm", "eval_loss")
    assert same(asked, plain) and [[line[key] for key in kept] for line in lines] == [
        [line[key] for key in kept] for line in before
    ]
    out = capsys.readouterr().out
    assert f"step 2  eval_loss={lines[1]['eval_loss']:.4f}  eval_cer={lines[1]['eval_cer']:.4f} (6 questions" in out
    results = json.loads((tmp_path / "run" / "all_results.json").read_text())
    assert results["eval_cer"] == {"1": lines[0]["eval_cer"], "2": lines[1]["eval_cer"]} and results["eval_cer"]["2"] > 0

    arguments = f"eval {TINY} {held_out} --data-dir {SAMPLE / 'images'} --adapter {tmp_path / 'run'} --max-new-tokens 24"
    with pytest.raises(SystemExit):
        main(f"{arguments} --limit 6 --seed 42 --metric cer --json".split())
    table = json.loads(capsys.readouterr().out)["table"]
    assert table["questions"] == 6 and table["rows"][0]["value"] == pytest.approx(lines[1]["eval_cer"])


@pytest.fixture
def judged(held_out, tmp_path):
    """What asks the questions of a meta-file, by a metric."""

    def of(metric: str, meta=held_out) -> Answers:
        known = config(tmp_path, eval_meta_file=meta, eval_data_dir=SAMPLE / "images", eval_metric=metric)
        return Answers(known, AutoProcessor.from_pretrained(TINY), prepare(known, evaluation=True))

    return of


@pytest.mark.parametrize(("metric", "said"), [
    ("mean_iou", "the wanted answers themselves are worth nothing by it"), ("json", "are worth nothing by it"),
    ("choice", "are worth nothing by it"), ("class", r"101 different answers are wanted: those are no classes"),
])  # fmt: skip
def test_a_metric_that_says_nothing_of_the_questions_is_refused(metric, said, judged, talk, monkeypatch):
    meta = talk(*(["Which?", f"no {number}"] for number in range(101))) if metric == "class" else None
    with pytest.raises(UserError, match=rf"eval_metric: {metric}: .*{said}(.|\n)*take another metric"):
        judged(metric, *[meta] * bool(meta))


def test_processes_share_the_questions_and_ask_as_often_for_signals(judged, talk, monkeypatch):
    by_cer, said, gathered = judged("cer", talk(*(["How many?", str(number)] for number in range(5)))), [], []
    monkeypatch.setattr(answers, "BATCH_SIZE", 2)
    monkeypatch.setattr(answers, "gather_object", lambda found: gathered.extend(found) or list(gathered))
    monkeypatch.setattr(Engine, "answer_many", lambda self, asked, most: [Answer("16", True) for _ in asked])
    bare = SimpleNamespace(get_base_model=SimpleNamespace, modules=list)

    def score(rank, world, broken=(), stop=0):
        accelerator = SimpleNamespace(process_index=rank, num_processes=world)
        signals = SimpleNamespace(stop=lambda *of, midway: said.append(rank) or stop)
        of = SimpleNamespace(accelerator=accelerator, bare=bare, model=SimpleNamespace(eval=lambda: None))
        return by_cer.score(of, broken, signals)

    first, both = score(0, 2), score(1, 2)  # three questions and two
    assert (first.questions, both.questions, both.cut) == (3, 5, 5) and said == [0, 0, 1, 1]
    assert len({of["where"] for of in gathered}) == 5
    gathered.clear()
    assert score(0, 1) == pytest.approx(both)
    gathered.clear()
    assert score(0, 1, [Problem("train.json[1]", "breaks", "")]).questions == 4
    assert score(0, 1, stop=15) is None
    gathered.clear()
    with pytest.raises(UserError, match="none of the 5 questions is left to score"):
        score(0, 1, [Problem(f"train.json[{number}]", "breaks", "") for number in range(5)])


def test_the_best_goes_by_the_metric_in_its_own_direction_also_when_resumed(held_out, tmp_path, monkeypatch, capsys):
    assert {"loss", *METRICS} == set(get_args(Metric))
    values = {2: 0.5, 4: 0.25, 6: 0.75}
    for metric, step in {"cer": 4, "wer": 4, "exact": 6, "ap_50": 6, "loss": 4}.items():
        assert Best([{"step": at, f"eval_{metric}": value} for at, value in values.items()], metric=metric).step == step

    losses, scores = iter([3.0, 2.0, 1.0, 0.5]), iter([0.5, 0.75, 0.5, 0.75])  # the loss falls on
    monkeypatch.setattr(loop, "evaluate", lambda *of: loop.Taught(next(losses), 1, []))
    monkeypatch.setattr(Answers, "score", lambda *of: Scored(next(scores), 4, 1))
    settings = {**SETTINGS, "eval_meta_file": held_out, "save_steps": 100, "save_total_limit": 1, "keep_best": True}
    settings |= {"train_meta_file": few_records(tmp_path, 3), "eval_metric": "exact", "early_stopping_patience": 2}
    run(tmp_path, **settings | {"max_steps": 3})
    with pytest.raises(UserError, match="eval_samples or eval_max_new_tokens changed"):
        run(tmp_path, **settings | {"max_steps": 3, "resume": True, "eval_samples": 3})
    run(tmp_path, **settings | {"max_steps": 5, "resume": True})
    results = json.loads((tmp_path / "run" / "all_results.json").read_text())
    assert results["best"] == {"step": 2, "eval_exact": 0.75, "checkpoint": "checkpoint-2"}
    assert results["stopped_early"] == {"step": 4, "of": 5}
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    out = " ".join(capsys.readouterr().out.split())
    assert "stopped early: no eval_exact above 0.7500 since step 2" in out and "(4 questions, 1 answers cut at 24 tokens)" in out
    assert "The highest eval_exact, 0.7500, is that of step 2" in out


def test_zero_3_and_a_metric_are_refused_in_words(held_out, tmp_path, monkeypatch):
    plugin = SimpleNamespace(zero_stage=3, deepspeed_config={})
    accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))
    monkeypatch.setattr("qwenvl_ft.train.launch.Accelerator", lambda **settings: accelerator)
    monkeypatch.setattr("qwenvl_ft.train.launch.launch_problem", lambda *of: None)
    with pytest.raises(UserError, match=r"eval_metric: f1: ZeRO-3 shares out weights(.|\n)*configs/zero2.yaml"):
        start(config(tmp_path, eval_meta_file=held_out, eval_metric="f1"))


MLFLOW = """
from types import SimpleNamespace
utils = SimpleNamespace(validation=SimpleNamespace(MAX_PARAM_VAL_LENGTH=500, MAX_PARAMS_TAGS_PER_BATCH=100))
runs, logged = {}, []
def search_experiments(filter_string): return []
def create_experiment(name, artifact_location, tags): return name
def start_run(run_id, experiment_id, run_name, nested, tags, description):
    run_id = run_id or f"mlflow-{len(runs)}"
    runs.setdefault(run_id, (experiment_id, run_name, {}))
    return SimpleNamespace(info=SimpleNamespace(run_id=run_id))
def log_params(params):
    known = [*runs.values()][-1][2]
    assert all(known.get(key, value) == value for key, value in params.items()), "mlflow changes no parameter"
    known.update(params)
def log_metrics(metrics, step): logged.append((step, metrics["loss"]))
def end_run(): pass
"""
SWANLAB = """
started, logged = [], []
class config(dict):
    update = lambda self, *of, **more: None
config = config()
def init(project, name, id, resume):
    if name == "nobody": raise RuntimeError("no key")
    started.append((project, name, id, resume))
    return __import__("types").SimpleNamespace(log=lambda values, step: logged.append((step, values["loss"])), finish=lambda: None)
"""


def test_swanlab_and_mlflow_are_told_by_accelerate_and_a_resumed_run_goes_on_there(tmp_path, monkeypatch):
    """By accelerate's own trackers, on stand-ins of the two packages: what of these it calls, with what, is its own."""
    from accelerate import tracking

    for name, text in {"mlflow": MLFLOW, "swanlab": SWANLAB}.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(tracking, "_available_trackers", [tracking.LoggerType.MLFLOW, tracking.LoggerType.SWANLAB])
    monkeypatch.setenv("SWANLAB_PROJ_NAME", "a project")
    import mlflow
    import swanlab

    few = {"train_meta_file": few_records(tmp_path, 3), "rows_per_step": 1, "max_steps": 2, "save_steps": 1}
    few |= {"report_to": ["mlflow", "swanlab"], "run_name": "a name"}
    run(tmp_path, **few)
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    run(tmp_path, **few, resume=True)
    steps = [(line["step"], line["loss"]) for line in metrics(tmp_path / "run")]
    assert mlflow.logged == swanlab.logged == [*steps, steps[1]]
    assert [(*of[:2], of[2]["resume"]) for of in mlflow.runs.values()] == [("a project", "a name", False)]
    first, second = swanlab.started
    assert first == second and first[:2] == ("a project", "a name") and first[3] == "allow"
    with pytest.raises(UserError, match=r"report_to: swanlab: no key\n  fix: run `swanlab login`, or set SWANLAB_MODE=offline"):
        run(tmp_path, "other", **few | {"run_name": "nobody"})
