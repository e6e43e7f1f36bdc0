"""A training job of PAI: this package, a config and its data go to OSS, the job runs train.py on them, what it made comes back.

config.yaml, train.py, qwenvl_ft/   the job's code
train_data_dir, model ...           input channels, named like the keys; an oss:// URL is mounted from where it is
key=value of the command line       hyperparameters, texts as they were typed
model, checkpoints                  output channels
"""

import re
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import qwenvl_ft
from qwenvl_ft.cloud.account import FULL, Account, in_words, refusal, scrubbed
from qwenvl_ft.cloud.files import PREFIX, Upload, files_below, placed
from qwenvl_ft.cloud.job import CHANNELS, METRICS
from qwenvl_ft.config import Config, load_config
from qwenvl_ft.errors import Problem, UserError

COMMAND = "python train.py --config config.yaml"
OUTPUTS = ("model", "checkpoints")
ENDED = ("Succeed", "Failed", "InitializeFailed", "CreateFailed", "Terminated")  # the SDK's own list lacks CreateFailed
POLL_SECONDS = 5
PAGE = 100  # lines of a log that are asked for at a time
ON_A_HUB = re.compile(r"(?:hf|modelscope):")
ON_OSS = re.compile(r"oss:/+")  # which is what a path makes of oss://


@dataclass(frozen=True)
class Job:
    """What is sent for a job: files, and the arguments of the SDK's call."""

    uploads: Sequence[Upload]
    request: dict[str, Any]

    def body(self, account: Account) -> dict[str, Any]:
        """The JSON that the SDK makes of it, and sends; nothing is sent here."""
        from pai.api.training_job import TrainingJobAPI

        client = Recorder()
        TrainingJobAPI(workspace_id=account.workspace_id, acs_client=client).create(**self.request)
        return client.body


class Recorder:
    """Stands where the SDK has its client and keeps what it is given."""

    body: dict[str, Any]

    def create_training_job_with_options(self, request: Any, headers: Any, runtime: Any) -> Any:
        self.body = request.to_map()
        return SimpleNamespace(body=SimpleNamespace(training_job_id=""))


def plan_job(
    account: Account, config: Path, overrides: Sequence[str], train_script: Path, image: str, instance_type: str, count: int
) -> Job:
    """The job for a config. Raises UserError with everything that keeps its settings or its data from running there."""
    settings = load_config(config, overrides)
    places, problems = _channels(settings)
    if problems:
        raise UserError(*problems)
    uploads = {key: Upload.of(account, key, place) for key, place in places.items() if isinstance(place, Path)}
    channels = {key: place if isinstance(place, str) else uploads[key].uri for key, place in places.items()}
    package = Path(qwenvl_ft.__file__).parent
    code: dict[str, Path] = {"config.yaml": config, "train.py": train_script}
    code |= {f"qwenvl_ft/{name}": path for name, path in files_below(package).items() if not name.startswith("shipped/")}
    program = Upload("code", placed(account, "code", code), code)
    name = (
        f"{re.sub('[^a-zA-Z0-9_-]+', '-', settings.run_name or config.stem)}-{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    )
    given = [override.removeprefix("--").partition("=") for override in overrides]
    bucket, _, key = program.uri.removeprefix("oss://").partition("/")
    location = {"Bucket": bucket, "Key": key, "Endpoint": re.sub("^https?://", "", account.oss_endpoint)}
    algorithm = {
        "Command": ["sh", "-c", COMMAND],
        "Image": image,
        "JobType": "PyTorchJob",
        "CodeDir": {"LocationType": "oss", "LocationValue": location},
        "InputChannels": [{"Name": key, "Required": True} for key in channels],
        "OutputChannels": [{"Name": name} for name in OUTPUTS],
        "MetricDefinitions": [{"Name": name, "Regex": regex} for name, regex in METRICS],
    }
    request = {
        "job_name": name,
        "instance_type": instance_type,
        "instance_count": count,
        "algorithm_spec": algorithm,
        "hyperparameters": {key: value for key, _, value in given if key not in (*channels, "output_dir")},
        "input_channels": [{"Name": key, "InputUri": uri} for key, uri in channels.items()],
        "output_channels": [{"Name": of, "OutputUri": account.uri(f"{PREFIX}/jobs/{name}/{of}/")} for of in OUTPUTS],
    }
    return Job([program, *uploads.values()], request)


def _channels(settings: Config) -> tuple[dict[str, Path | str], list[Problem]]:
    """What each input channel is of: a path here or a URL of OSS. What lies on a hub is none: the job brings it."""
    found: dict[str, Path | str] = {}
    problems = []
    for key in CHANNELS:
        value = getattr(settings, key)
        if value is None or ON_A_HUB.match(str(value)):
            continue
        where = f"{key}: {value}"
        if isinstance(value, list):
            fix = "make one of them, as `qwenvl-ft convert` does, or one job for each"
            problems.append(Problem(key, "is a list of files, and a channel mounts one place", fix))
        elif scheme := ON_OSS.match(str(value)):
            folder = key.endswith("_dir") or key == "model" or not value.suffix
            found[key] = "oss://" + str(value)[scheme.end() :] + "/" * folder
        elif value.exists():
            found[key] = value
        else:
            fix = f"put it there, or set {key} to where it is; a pattern is no place, the folder above it is one"
            problems.append(Problem(where, "is not there", fix))
    for meta, key, pictures in (
        ("train_meta_file", "train_data_dir", settings.train_data_dir), ("eval_meta_file", "eval_data_dir", settings.held_out_dir),
    ):  # fmt: skip
        if meta in found and Path(str(found[meta])).suffix in (".json", ".jsonl", ".csv") and not pictures:
            fix = f"set {key} to their folder: only what a channel names is there"
            problems.append(Problem(f"{meta}: {getattr(settings, meta)}", "is sent without the pictures that it names", fix))
    return found, problems


def submit(session: Any, job: Job) -> str:
    """Sends the job, whose files are there; its id. Raises UserError for what PAI refuses."""
    with in_words(f"job {job.request['job_name']}"):
        return str(session.training_job_api.create(**job.request))


def look(session: Any, job: str) -> dict[str, Any]:
    """What PAI knows of a job. Raises UserError."""
    with in_words(f"job {job}"):
        found: dict[str, Any] = session.training_job_api.get(job)
    return found


def check_ended_well(job: str, facts: dict[str, Any]) -> None:
    """Raises UserError if the job has ended without success; one that was stopped did as it was told."""
    if facts.get("Status") not in ENDED or facts["Status"] in ("Succeed", "Terminated"):
        return
    code, said = facts.get("ReasonCode") or "", scrubbed(facts.get("ReasonMessage") or "it gives no reason")
    if FULL.search(f"{code} {said}"):
        raise UserError(refusal(f"job {job}", code, said))
    fix = f"`qwenvl-ft pai logs {job}` shows its last words"
    raise UserError(Problem(f"job {job}", f"has failed ({facts['Status']}, {code or 'no code'}: {said})", fix))


def lines(session: Any, job: str, follow: bool, sleep: Callable[[float], None] = time.sleep) -> Iterator[str]:
    """The job's log; with `follow` until it has ended, and then the end raises UserError if it went wrong."""
    page = seen = 0
    while True:
        facts = look(session, job)
        while True:
            try:
                with in_words(f"job {job}"):
                    found = session.training_job_api.list_logs(job, page_number=page + 1, page_size=PAGE).items
            except UserError as error:  # a job that waits has no log yet
                if "INSTANCE_NOT_FOUND" not in str(error):
                    raise
                found = []
            yield from found[seen:]
            page, seen = (page + 1, 0) if len(found) == PAGE else (page, len(found))
            if seen or not found:
                break
        if not follow:
            return
        if facts.get("Status") in ENDED:
            check_ended_well(job, facts)
            return
        sleep(POLL_SECONDS)


def stop(session: Any, job: str) -> None:
    """Ends a job; what it has kept stays. Raises UserError."""
    with in_words(f"job {job}"):
        session.training_job_api.acs_client.stop_training_job(job)


def outputs(facts: dict[str, Any]) -> dict[str, str]:
    """The SDK's get_outputs_data: where each output channel of a job lies."""
    return {channel["Name"]: channel["OutputUri"] for channel in facts.get("OutputChannels") or []}
