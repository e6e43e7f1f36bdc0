"""docs/pai.md and the documented snippets, with Alibaba's own SDK against PAI and OSS on loopback: jobs and services run for real."""

import contextlib
import json
import os
import re
import secrets
import shlex
import time
from types import SimpleNamespace

import pytest

from tests.cloud.conftest import run
from tests.cloud.plane import BUCKET
from tests.conftest import ROOT, SAMPLE, TINY
from tests.runs import BASE, few_records
from tests.serving import question
from tests.test_readme import blocks, commands, text_of

PAGE = "docs/pai.md"
SMALL = [f"{key}={json.dumps(value)}" for key, value in BASE.items() if key not in ("model", "train_data_dir", "max_steps")]
CHART = SAMPLE / "images" / "two_col_103562.png"
# As PAI documents them, unchanged.
TUNE = """
import pprint
from pai.model import RegisteredModel

# Get the latest version of qwen-vl-chat.
m = RegisteredModel(
    model_name="qwen-vl-chat",
    model_provider="pai",
)

est = m.get_estimator()
print("Instance type:")
print(est.instance_type)

inputs = m.get_estimator_inputs()
print("Input information:")
pprint.pprint(inputs)

print("Hyperparameters:")
pprint.pprint(est.hyperparameters)

est.fit(
    inputs=inputs
)

# Check the output model address after training.
pprint.pprint(est.model_data())

# Check all output information (if there are multiple output channels)
pprint.pprint(est.get_outputs_data())
"""
DEPLOY = """
import pprint
from pai.model import RegisteredModel

# Get the latest version of qwen-vl-chat.
m = RegisteredModel(
    model_name="qwen-vl-chat",
    model_provider="pai",
)

# Check the inference configuration.
pprint.pprint(m.inference_spec)

p = m.deploy(
    # service_name='xxx',
    # instance_type='xxx',
    # ... extra configurations
)
"""


class Trip(SimpleNamespace):
    """What the page's commands left: `said`, by command (exit code, standard output, standard error); `folder`; `token`; `job`."""


@pytest.fixture(scope="module")
def trip(plane, patches, tmp_path_factory):
    """Every command of the page as it stands, but for the settings that make the run small; the job's machine is taken away once."""
    folder = tmp_path_factory.mktemp("checkout")
    for name, at in {"configs": ROOT / "configs", "models/Qwen2-VL-7B-Instruct": TINY, "data/images": SAMPLE / "images"}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(at)
    few_records(folder).rename(folder / "data/train.json")
    for module in ("jobs", "services"):
        patches.setattr(f"qwenvl_ft.cloud.{module}.POLL_SECONDS", 0.2)
    patches.setenv("COLUMNS", "300")
    plane.preempt_when = lambda kept: any(kept.glob("checkpoint-*/MANIFEST.json"))
    said, names = {}, {"JOB": ""}
    with contextlib.chdir(folder):
        for line in commands(PAGE):
            if made := re.fullmatch(r"export (\w+)=(.*)", line):
                patches.setenv(made[1], secrets.token_hex(32) if made[2] == "$(openssl rand -hex 32)" else made[2])
                continue
            named, inner = re.fullmatch(r"(?:(\w+)=\$\((.*)\)|.*)", line).groups()
            words = [names.get(word.removeprefix("$"), word) for word in shlex.split(inner or line)]
            if "submit" in words:
                words += [*SMALL, "max_steps=3", "save_steps=1", "run_name=two words"]
            assert words[0] == "qwenvl-ft"
            key = " ".join(words[1:3] if words[1] == "pai" else words[1:2]) + " --dry-run" * ("--dry-run" in words)
            said[key] = run(*words[1:])
            if named:
                names[named] = said[key][1].strip()
        said["pai stop"] = run("pai", "stop", names["JOB"])
    return Trip(said=said, folder=folder, job=names["JOB"])


def test_the_pages_commands_lead_from_a_config_to_an_answer_and_back_to_nothing(trip, plane):
    assert {name: said[0] for name, said in trip.said.items()} == dict.fromkeys(trip.said, 0), trip.said
    assert list(trip.said) == [
        "pai submit --dry-run", "pai submit", "pai logs", "pai status", "pai fetch", "export", "pai deploy", "pai ask", "pai delete",
        "pai stop",
    ]  # fmt: skip
    assert "status: Succeed" in trip.said["pai status"][1] and f"oss://{BUCKET}/qwenvl-ft/jobs/" in trip.said["pai status"][1]
    from qwenvl_ft import Engine

    asked = [{"role": "user", "content": [{"image": str(CHART)}, "What is shown?"]}]
    assert trip.said["pai ask"][1].strip() == Engine.open(trip.folder / "runs/from-pai-merged").ask(asked, 512).strip() != ""
    assert plane.services == {}


def test_a_job_whose_machine_is_taken_away_goes_on_at_its_checkpoint(trip, plane):
    lines = trip.said["pai logs"][1]
    assert plane.jobs[trip.job]["starts"] == 2 and lines.count("step 3/3") == 1
    assert lines.count("step 1/3") == 1


def test_a_hyperparameter_arrives_as_it_was_typed(trip, plane):
    """The shell breaks `$PAI_USER_ARGS` at the spaces of a value."""
    sent = {of["Name"]: of["Value"] for of in plane.jobs[trip.job]["body"]["HyperParameters"]}
    assert sent["run_name"] == "two words" and sent["rows_per_step"] == "2"
    assert "run_name: two words" in (trip.folder / "runs/from-pai/config.yaml").read_text()


def test_dry_run_prints_what_is_sent_then_and_no_price(trip, plane):
    shown = json.loads(trip.said["pai submit --dry-run"][1])
    sent = plane.jobs[trip.job]["body"]
    when = re.compile(r"-\d{8}-\d{6}-[0-9a-f]{4}")
    assert shown["request"].pop("Labels") == []  # which the SDK leaves out where there are none
    assert when.sub("", json.dumps(shown["request"], sort_keys=True)) == when.sub("", json.dumps(sent, sort_keys=True))
    assert shown["estimated_price"] is None
    assert {upload["what"]: upload["files"] for upload in shown["uploads"]} == {
        "code": shown["uploads"][0]["files"], "model": len(list(TINY.iterdir())), "train_meta_file": 1,
        "train_data_dir": len(list((SAMPLE / "images").iterdir())),
    }  # fmt: skip
    metric = {of["Name"]: of["Regex"] for of in sent["AlgorithmSpec"]["MetricDefinitions"]}["loss"]
    losses = [float(found[1]) for line in trip.said["pai logs"][1].splitlines() if (found := re.match(metric, line))]
    assert len(losses) >= 2 and all(0 < loss < 10 for loss in losses)


def test_nothing_is_asked_of_pai_by_a_dry_run(trip, plane, monkeypatch):
    monkeypatch.chdir(trip.folder)
    for name in ("ALIBABA_CLOUD_ACCESS_KEY_ID", "ALIBABA_CLOUD_ACCESS_KEY_SECRET", "QWENVL_KEY"):
        monkeypatch.delenv(name)
    before = len(plane.asked)
    for words in (
        ["submit", "--config", "configs/lora.yaml"], ["deploy", "runs/from-pai-merged", "--name", "charts"], ["stop", "train1"],
        ["delete", "charts"], ["ask", "charts", "hi", "--image", str(CHART)],
    ):  # fmt: skip
        code, out, err = run("pai", *words, "--dry-run")
        assert (code, err, json.loads(out)["estimated_price"]) == (0, "", None), words
    assert len(plane.asked) == before


def test_what_has_not_changed_is_sent_once(trip, plane, monkeypatch):
    import oss2

    monkeypatch.chdir(trip.folder)
    sent = []
    upload = oss2.resumable_upload
    monkeypatch.setattr(oss2, "resumable_upload", lambda bucket, key, file: (sent.append(key), upload(bucket, key, file)))
    monkeypatch.setattr(plane, "quota", 0)
    (trip.folder / "data/train.json").touch()
    assert run("pai", "submit", "--config", "configs/lora.yaml")[0] == 1
    assert [key.rpartition("/")[2] for key in sent] == ["train.json"]


def test_no_secret_stands_in_a_file_a_log_a_job_or_what_is_printed(trip, plane):
    token = os.environ["QWENVL_KEY"]
    keys = [plane.key_secret, plane.key_id, token]
    written = {str(path): path.read_bytes() for top in (trip.folder, plane.folder) for path in top.rglob("*") if path.is_file()}
    assert len(written) > 100
    written |= {name: json.dumps(said).encode() for name, said in trip.said.items()}
    written |= {"job": json.dumps(plane.jobs[trip.job]["body"]).encode()}
    assert [name for name, text in written.items() if any(key.encode() in text for key in keys)] == []
    ((_, _, service),) = [of for of in plane.asked if of[:2] == ("POST", "/api/v2/services")]
    assert service["token"] == token and service["containers"][0]["env"] == [{"name": "QWENVL_KEY", "value": token}]
    assert json.dumps(service).count(token) == 2


def test_the_documented_snippets_run_with_our_job_and_our_server(trip, plane, monkeypatch, capsys):
    """Unchanged; only the code behind PAI's model is ours, and `predict` is given the data that the snippet leaves out."""
    import pai.job._training_job
    import pai.model._model
    import pai.predictor
    from pai.session import setup_default_session

    hurried = SimpleNamespace(sleep=lambda seconds: time.sleep(0.2), time=time.time)
    for module in (pai.job._training_job, pai.model._model, pai.predictor):
        monkeypatch.setattr(module, "time", hurried)
    monkeypatch.setattr(pai.session, "_default_session", None)
    setup_default_session(plane.key_id, plane.key_secret, network="PUBLIC", **plane.account)
    ours = plane.jobs[trip.job]["body"]
    service = next(body for method, path, body in plane.asked if (method, path) == ("POST", "/api/v2/services"))
    channels = [of for of in ours["InputChannels"] if of["Name"] != "model"]
    wanted = {of["Name"]: of["Value"] for of in ours["HyperParameters"]} | {"max_steps": "2", "model": str(TINY)}
    card = {
        "ModelId": "model-1", "ModelName": "qwen-vl-chat", "Provider": "pai", "Task": "vqa", "Domain": "multimodal", "Labels": [],
        "LatestVersion": {
            "VersionName": "0.1.0", "Uri": service["storage"][0]["oss"]["path"], "FrameworkType": "Pytorch", "Labels": [],
            "TrainingSpec": {
                "AlgorithmName": "tune", "AlgorithmVersion": "v1", "AlgorithmProvider": "pai", "InputChannels": channels,
                "ComputeResource": {"EcsCount": 1, "EcsSpec": "ecs.gn7i-c8g1.2xlarge"},
                "HyperParameters": [{"Name": name, "Value": value} for name, value in wanted.items()],
            },
            "InferenceSpec": {key: service[key] for key in ("token", "metadata", "cloud", "containers", "storage")},
        },
    }  # fmt: skip
    command = ["sh", "-c", "python train.py --config config.yaml $PAI_USER_ARGS"]
    algorithm = {**ours["AlgorithmSpec"], "Command": command, "InputChannels": channels}
    monkeypatch.setattr(plane, "registered", {"model": card, "algorithm": algorithm})
    names: dict = {}
    with pytest.warns(FutureWarning, match="deprecated"):
        exec(TUNE, names)
    est = names["est"]
    assert est.hyperparameters["run_name"] == "two words" and set(names["inputs"]) == {"train_data_dir", "train_meta_file"}
    assert plane.at(est.model_data()).joinpath("adapter_model.safetensors").is_file()
    assert set(est.get_outputs_data()) == {"model", "checkpoints"} and "step 2/2" in capsys.readouterr().out
    exec(DEPLOY, names)
    p = names["p"]
    with pytest.raises(TypeError, match="data"):
        p.predict()
    answer = p.predict({"messages": question("What is shown?", CHART), "max_tokens": 512})
    assert answer["choices"][0]["message"]["content"].strip() == trip.said["pai ask"][1].strip()
    p.delete_service()
    assert plane.services == {}


def test_what_the_page_says_of_the_usual_snippets_is_so(plane):
    from pai.job._training_job import TrainingJobStatus

    assert "CreateFailed" not in TrainingJobStatus.completed_status()  # so that est.fit() waits for ever
    text = text_of(PAGE)
    assert len(text.splitlines()) <= 60 and blocks(PAGE, "bash")
    rows = dict(re.findall(r"^\| `([^`]+)` \|.*\| (.+) \|$", text, re.MULTILINE))
    named = {"RegisteredModel", "predict", "delete_service", *re.findall(r"\b(?:m|est)\.(\w+)", TUNE + DEPLOY)} - {"instance_type"}
    assert len(named) == 11 and [name for name in named if not any(name in row for row in rows)] == []
    assert set(re.findall(r"qwenvl-ft pai (\w+)", "".join(rows.values()))) == {
        "submit",
        "status",
        "fetch",
        "deploy",
        "ask",
        "delete",
    }
