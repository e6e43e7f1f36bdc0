"""What keeps `qwenvl-ft pai` from its work is said in words, with exit code 1: no SDK, no key, a wrong key, no room, a failed job."""

import json
import sys
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.cloud.conftest import run
from tests.conftest import SAMPLE, TINY

CONFIG = {
    "model": str(TINY), "train_meta_file": str(SAMPLE / "train.json"), "train_data_dir": str(SAMPLE / "images"), "output_dir": "runs/x",
}  # fmt: skip
EVERY = {
    "submit": ["--config", "lora.yaml"], "status": ["train1"], "logs": ["train1", "--follow"], "stop": ["train1"],
    "fetch": ["train1", "--out", "got"], "deploy": [str(TINY), "--name", "charts"], "ask": ["charts", "hi"], "delete": ["charts"],
}  # fmt: skip


@pytest.fixture
def here(plane, tmp_path, monkeypatch):
    """A folder with a config, where nothing waits long."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("QWENVL_KEY", "a-token-that-nobody-should-see")
    for module in ("jobs", "services"):
        monkeypatch.setattr(f"qwenvl_ft.cloud.{module}.POLL_SECONDS", 0.1)
    write_config()
    return tmp_path


def write_config(**settings) -> None:
    Path("lora.yaml").write_text(json.dumps({**CONFIG, **settings}))


def refused(*words: str) -> str:
    """What is said on standard error of a command that ends with exit code 1, in words."""
    code, out, err = run("pai", *words)
    assert code == 1 and "\n  fix: " in err and "Traceback" not in out + err, (words, code, out, err)
    return err


@pytest.mark.parametrize("command", EVERY)
def test_every_command_helps_with_an_example_of_itself(command):
    code, out, _ = run("pai", command, "--help")
    assert code == 0 and f"qwenvl-ft pai {command} " in out.split("Example:")[1]


@pytest.mark.parametrize("command", EVERY)
def test_without_the_extra_every_command_says_what_to_install(command, here, monkeypatch):
    monkeypatch.setitem(sys.modules, "pai", None)
    assert "pip install '.[pai]'" in refused(command, *EVERY[command])


@pytest.mark.parametrize("command", EVERY)
def test_without_a_key_every_command_says_which_variable_is_missing(command, here, monkeypatch):
    monkeypatch.delenv("ALIBABA_CLOUD_ACCESS_KEY_SECRET")
    said = refused(command, *EVERY[command])
    assert "ALIBABA_CLOUD_ACCESS_KEY_SECRET: is not set" in said and "KEY_ID: is not set" not in said
    monkeypatch.delenv("ALIBABA_CLOUD_ACCESS_KEY_ID")
    assert refused(command, *EVERY[command]).endswith("2 problems\n")


@pytest.mark.parametrize("command", EVERY)
def test_a_wrong_key_is_said_and_shown_nowhere(command, here, plane, monkeypatch):
    for variable, right in (("ID", plane.key_id), ("SECRET", plane.key_secret)):
        wrong = right[:-4] + "0000"
        with monkeypatch.context() as patch:
            patch.setenv(f"ALIBABA_CLOUD_ACCESS_KEY_{variable}", wrong)
            said = refused(command, *EVERY[command])
        assert "the AccessKey is refused" in said and "ALIBABA_CLOUD_ACCESS_KEY_SECRET: both" in said
        assert not any(key in said for key in (wrong, plane.key_id, plane.key_secret))


def test_the_files_of_alibabas_tools_have_the_key_too(here, plane, monkeypatch):
    for variable in ("ID", "SECRET"):
        monkeypatch.delenv(f"ALIBABA_CLOUD_ACCESS_KEY_{variable}")
    monkeypatch.setattr("qwenvl_ft.cloud.account.FILES", [str(here / "credentials.ini")])
    assert "is not set" in refused("status", "train1")
    (here / "credentials.ini").touch()
    assert "is not set" not in refused("status", "train1")


@pytest.mark.parametrize(("text", "said"), [
    (None, "is not there"), ("{", "cannot be read as JSON"), ("[]", "has no region_id"), ('{"region_id": "cn-beijing"}', "has no workspace_id"),
])  # fmt: skip
def test_what_the_sdks_configuration_lacks_is_said_with_the_command_that_writes_it(text, said, here, monkeypatch):
    monkeypatch.setenv("PAI_CONFIG_PATH", str(here / "config.json"))
    if text is not None:
        (here / "config.json").write_text(text)
    found = refused("status", "train1")
    assert said in found and "python -m pai.toolkit.config" in found


def test_a_plane_that_cannot_be_reached_is_said(here, plane, monkeypatch):
    monkeypatch.setattr(type(plane), "address", "127.0.0.1:9")
    assert "cannot be reached" in refused("status", "train1")


def test_what_is_not_there_is_said(here):
    for words in (["status", "train1"], ["logs", "train1"], ["stop", "train1"], ["fetch", "train1", "--out", "got"],
                  ["ask", "charts", "hi"], ["delete", "charts"]):  # fmt: skip
        assert "is not there" in refused(*words)
    assert not Path("got").exists()


def test_a_full_quota_is_said_before_and_after_a_job_began(here, plane, monkeypatch):
    monkeypatch.setattr(plane, "quota", 0)
    assert "there is no room for it (QuotaExceeded" in refused("submit", "--config", "lora.yaml", "--count", "2")
    assert "there is no room for it (QuotaExceeded" in refused("deploy", str(TINY), "--name", "charts")
    late = {
        "Status": "CreateFailed",
        "ReasonCode": "InsufficientResource",
        "ReasonMessage": "No stock of ecs.gn7i.",
        "taken": 0,
        "body": {},
    }
    monkeypatch.setitem(plane.jobs, "train1", late)
    for words in (["status", "train1"], ["logs", "train1", "--follow"], ["fetch", "train1", "--out", "got"]):
        said = refused(*words)
        assert "there is no room for it (InsufficientResource: No stock of ecs.gn7i.)" in said and "--instance-type" in said


def test_a_machine_that_pai_does_not_have_is_refused_by_pai(here):
    assert "PAI refuses it (InvalidParameter" in refused("submit", "--config", "lora.yaml", "--instance-type", "ecs.none")
    assert "instance_type" in refused("deploy", str(TINY), "--name", "charts", "--instance-type", "ecs.none")


def test_a_channel_that_leads_nowhere_fails_the_job_and_both_say_why(here):
    """The job reads `oss://` URLs of the config as channels; this one was mistyped."""
    write_config(train_data_dir="oss://charts/no/pictures")
    code, job, said = run("pai", "submit", "--config", "lora.yaml")
    assert code == 0, said
    code, out, err = run("pai", "logs", job.strip(), "--follow")
    assert code == 1 and "input channel train_data_dir" in out and "is not there" in out
    assert "has failed (Failed, WorkerFailed: The exit code of the worker is 1.)" in err and "pai logs" in err
    assert "has failed" in refused("status", job.strip()) and "has failed" in refused("fetch", job.strip(), "--out", "got")


def test_a_job_that_runs_has_no_model_yet_and_is_stopped(here, plane, monkeypatch):
    monkeypatch.setattr("qwenvl_ft.cloud.jobs.COMMAND", "sleep 60")
    job = run("pai", "submit", "--config", "lora.yaml")[1].strip()
    assert "has no model yet" in refused("fetch", job, "--out", "got")
    assert "is no output" in refused("fetch", job, "--out", "got", "--output", "weights")
    assert "holds nothing" in refused("fetch", job, "--out", "got", "--output", "checkpoints")
    assert run("pai", "stop", job)[0] == 0
    assert run("pai", "logs", job, "--follow")[0] == 0 and "status: Terminated" in run("pai", "status", job)[1]


def test_a_damaged_output_is_not_brought(here, plane, monkeypatch):
    monkeypatch.setattr("qwenvl_ft.cloud.jobs.COMMAND", """
        cd $PAI_OUTPUT_MODEL && echo 1234 > weights && echo '{"weights": {"bytes": 4, "sha256": ""}}' > MANIFEST.json""")  # fmt: skip
    job = run("pai", "submit", "--config", "lora.yaml")[1].strip()
    assert run("pai", "logs", job, "--follow")[0] == 0
    assert "weights is damaged" in refused("fetch", job, "--out", "got") and not Path("got").exists()


def test_jobs_that_are_sent_in_one_second_have_folders_of_their_own(here, plane, monkeypatch):
    """The second one wrote into the model of the first."""
    monkeypatch.setattr("qwenvl_ft.cloud.jobs.COMMAND", "true")
    monkeypatch.setattr("qwenvl_ft.cloud.jobs.datetime", SimpleNamespace(now=lambda: datetime(2026, 1, 2)))
    jobs = [run("pai", "submit", "--config", "lora.yaml")[1].strip() for _ in range(2)]
    outputs = [next(line for line in run("pai", "status", job)[1].splitlines() if "/model/" in line) for job in jobs]
    assert len(set(jobs)) == len(set(outputs)) == 2


def test_long_logs_are_read_page_by_page(here, monkeypatch):
    monkeypatch.setattr("qwenvl_ft.cloud.jobs.COMMAND", "seq 1 250; echo 1 > $PAI_OUTPUT_MODEL/weights")
    job = run("pai", "submit", "--config", "lora.yaml")[1].strip()
    said = run("pai", "logs", job, "--follow")
    assert said == (0, "".join(f"{number}\n" for number in range(1, 251)), "") and run("pai", "logs", job) == said
    assert run("pai", "fetch", job, "--out", "got")[0] == 0
    assert "exists already" in refused("fetch", job, "--out", "got")


def test_settings_that_no_job_could_have_are_refused_before_anything_is_sent(here, plane):
    before = len(plane.asked)
    write_config(learning_rte=1)
    assert "did you mean learning_rate" in refused("submit", "--config", "lora.yaml")
    write_config()
    assert "unknown key lora_rnk" in refused("submit", "--config", "lora.yaml", "lora_rnk=4")
    write_config(train_meta_file=[str(SAMPLE / "train.json")], model="nowhere")
    said = refused("submit", "--config", "lora.yaml")
    assert "is a list of files" in said and "model: nowhere: is not there" in said
    write_config(train_data_dir=None)
    assert "is sent without the pictures" in refused("submit", "--config", "lora.yaml")
    assert len(plane.asked) == before


def test_what_lies_on_a_hub_or_on_oss_is_not_sent(here):
    write_config(
        model="modelscope:Qwen/Qwen2-VL-7B-Instruct", train_data_dir="oss://charts/pictures", train_meta_file="oss://charts/t.json"
    )
    shown = json.loads(run("pai", "submit", "--config", "lora.yaml", "--dry-run")[1])
    assert [upload["what"] for upload in shown["uploads"]] == ["code"]
    assert {of["Name"]: of["InputUri"] for of in shown["request"]["InputChannels"]} == {
        "train_data_dir": "oss://charts/pictures/", "train_meta_file": "oss://charts/t.json",
    }  # fmt: skip


def test_a_folder_that_cannot_answer_is_not_deployed(here, monkeypatch, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    assert "qwenvl-ft export --adapter" in refused("deploy", str(adapter), "--name", "charts")
    assert "is not a folder" in refused("deploy", "nowhere", "--name", "charts")
    assert "is no name of a service" in refused("deploy", str(TINY), "--name", "My Charts")
    monkeypatch.delenv("QWENVL_KEY")
    assert "openssl rand" in refused("deploy", str(TINY), "--name", "charts")
    monkeypatch.delenv("QWENVL_IMAGE")
    assert "--image: is not given" in refused("submit", "--config", "lora.yaml")


def test_a_service_that_ends_says_its_last_words(here, plane, monkeypatch):
    monkeypatch.setattr("qwenvl_ft.cloud.services.MOUNT", "/eas/workspace/none")
    plan = json.loads(run("pai", "deploy", str(TINY), "--name", "charts", "--dry-run")[1])["request"]
    assert plan["storage"][0]["mount_path"] == "/eas/workspace/none/"
    monkeypatch.setattr("qwenvl_ft.cloud.services.TOKEN", "QWENVL-KEY")  # no shell hands that on
    said = refused("deploy", str(TINY), "--name", "charts")
    assert "has ended (Failed: " in said and "qwenvl-ft pai delete charts" in said
    assert "InvalidService.AlreadyExists" in refused("deploy", str(TINY), "--name", "charts")
    assert run("pai", "delete", "charts")[0] == 0


def test_what_the_gateway_answers_in_place_of_a_service_is_said(here, plane, monkeypatch):
    service = {"process": SimpleNamespace(poll=lambda: None), "port": 9, "token": "t", "log": here / "log", "body": {}, "taken": 0}
    monkeypatch.setitem(plane.services, "charts", service)
    assert "does not answer now (no healthy upstream)" in refused("ask", "charts", "hi")
    facts = type(plane).service_facts
    monkeypatch.setattr(type(plane), "service_facts", lambda self, name: facts(self, name) | {"AccessToken": "another"})
    said = refused("ask", "charts", "hi")
    assert "this account may not do that (Unauthorized: token is invalid)" in said and "another" not in said


def test_a_bucket_writes_nowhere_but_into_the_folder(here, plane, monkeypatch):
    facts = {"Status": "Succeed", "taken": 0, "body": {"OutputChannels": [{"Name": "model", "OutputUri": "oss://charts/m/"}]}}
    monkeypatch.setitem(plane.jobs, "train1", facts)
    monkeypatch.setattr("oss2.ObjectIteratorV2", lambda bucket, prefix: [SimpleNamespace(key=f"{prefix}../../outside")])
    assert "names a place outside" in refused("fetch", "train1", "--out", "got") and not Path("got").exists()


def test_a_question_of_more_than_the_gateway_takes_is_refused_here(here):
    Path("large.png").write_bytes(bytes(1 << 20))
    assert "PAI's gateway takes 1,048,576" in refused("ask", "charts", "hi", "--image", "large.png")
    assert "none.png: cannot be read" in refused("ask", "charts", "hi", "--image", "none.png")


def test_the_secrets_of_a_refusal_are_covered(monkeypatch):
    from qwenvl_ft.cloud.account import refusal

    monkeypatch.setenv("QWENVL_KEY", "own-secret")
    said = str(refusal("job", "X", "LTAI5tAbCdEfGh12 signed own-secret with STS.NUabcdefgh12", 400))
    assert said.count("***") == 3 and "own-secret" not in said and "LTAI" not in said
