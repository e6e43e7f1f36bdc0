"""The commands of `qwenvl-ft pai`: a training job of Alibaba's PAI, what it made, a service that answers with it."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from qwenvl_ft.cli.options import LORA_YAML, ConfigFile, Overrides
from qwenvl_ft.cloud import account as accounts
from qwenvl_ft.cloud import files, jobs, services
from qwenvl_ft.console import counting, print_json, print_line, print_note
from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.folders.shipped import SHIPPED

app = typer.Typer(
    name="pai", no_args_is_help=True, help="Alibaba's PAI: submit, status, logs, stop, fetch; deploy, ask, delete. docs/pai.md"
)
JobId = Annotated[str, typer.Argument(metavar="JOB", help="What `submit` printed.")]
ServiceName = Annotated[str, typer.Argument(metavar="NAME", help="The service's name.")]
Image = Annotated[
    str | None,
    typer.Option(envvar="QWENVL_IMAGE", help="The container image, in a registry that PAI reaches; the Dockerfile builds it."),
]
InstanceType = Annotated[str, typer.Option("--instance-type", help="The machine; PAI's page of prices lists them.")]
Count = Annotated[int, typer.Option("--count", min=1, help="How many of these machines.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the JSON that would be sent, and send nothing.")]
ONE_A10 = "ecs.gn7i-c8g1.2xlarge"


@app.command()
def submit(
    overrides: Overrides = None,
    config: ConfigFile = LORA_YAML,
    image: Image = None,
    instance_type: InstanceType = ONE_A10,
    count: Count = 1,
    dry_run: DryRun = False,
) -> None:
    """Run a config as a training job; prints its id. Paths of the config are sent, once, or mounted where they are oss:// URLs.

    Example: qwenvl-ft pai submit --config configs/lora.yaml --instance-type ecs.gn7i-c8g1.2xlarge --count 1
    """
    account = accounts.read_account()
    script = SHIPPED / "train.py"
    job = jobs.plan_job(account, config, overrides or [], script, _image(image), instance_type, count)
    session = _to_send(account, job.body(account), dry_run, job.uploads)
    with counting("sending files") as on_file:
        files.send(session, job.uploads, on_file)
    name = jobs.submit(session, job)
    print_line(name)
    print_note(f"submitted; it costs money until it ends. Next: qwenvl-ft pai logs {name} --follow")


@app.command()
def status(job: JobId) -> None:
    """Say how a job stands and where its outputs lie; exit code 1 if it has failed.

    Example: qwenvl-ft pai status train1a2b3c
    """
    facts = jobs.look(_session(), job)
    for name, value in {"status": facts.get("Status"), "console": facts.get("TrainingJobUrl"), **jobs.outputs(facts)}.items():
        print_line(f"{name}: {value}")
    jobs.check_ended_well(job, facts)


@app.command()
def logs(
    job: JobId, follow: Annotated[bool, typer.Option("--follow", help="Until it has ended; exit code 1 if it has failed.")] = False
) -> None:
    """Print what a job has said.

    Example: qwenvl-ft pai logs train1a2b3c --follow
    """
    for line in jobs.lines(_session(), job, follow):
        print_line(line)


@app.command()
def stop(job: JobId, dry_run: DryRun = False) -> None:
    """End a job; the checkpoints that it has kept stay.

    Example: qwenvl-ft pai stop train1a2b3c
    """
    jobs.stop(_to_send(accounts.read_account(), {"StopTrainingJob": job}, dry_run), job)
    print_line(f"job {job} is stopped")


@app.command()
def fetch(
    job: JobId,
    out: Annotated[Path, typer.Option("--out", help="The folder to bring it to; must not exist.")],
    output: Annotated[str, typer.Option("--output", help="Which output: model, or checkpoints.")] = jobs.OUTPUTS[0],
) -> None:
    """Bring what a job has made: its adapter, checked against the manifest that came with it.

    Example: qwenvl-ft pai fetch train1a2b3c --out runs/from-pai
    """
    session = _session()
    facts = jobs.look(session, job)
    jobs.check_ended_well(job, facts)
    places = jobs.outputs(facts)
    if output not in places:
        raise UserError(Problem(f"--output {output}", f"is no output of job {job}", f"take one of {', '.join(places)}"))
    if output == jobs.OUTPUTS[0] and facts.get("Status") != "Succeed":
        fix = f"wait: `qwenvl-ft pai logs {job} --follow`; --output checkpoints brings what it has kept so far"
        raise UserError(Problem(f"job {job}", f"has no model yet ({facts.get('Status')})", fix))
    with counting("bringing files") as on_file:
        number = files.bring(session, places[output], out, on_file)
    print_line(f"{number} files of {places[output]} in {out}")


@app.command()
def deploy(
    folder: Annotated[Path, typer.Argument(help="A merged model's folder, as `qwenvl-ft export` writes it.")],
    name: Annotated[str, typer.Option("--name", help="The service's name, and its model's.")],
    image: Image = None,
    instance_type: InstanceType = ONE_A10,
    count: Count = 1,
    dry_run: DryRun = False,
) -> None:
    """Serve a merged model as an EAS service, with the value of QWENVL_KEY as its token; returns once it answers.

    Example: qwenvl-ft pai deploy runs/first-merged --name charts
    """
    account = accounts.read_account()
    token = f"${accounts.TOKEN}" if dry_run else _token()
    model, config = services.plan_service(account, folder, name, _image(image), instance_type, count, token)
    session = _to_send(account, config, dry_run, [model])
    with counting("sending files") as on_file:
        files.send(session, [model], on_file)
    services.create(session, config)
    print_note(f"created; it costs money until `qwenvl-ft pai delete {name}`")
    address = services.wait_until_it_answers(session, name, print_note)
    print_line(f"{name} at {address}; OpenAI's clients: base_url {address}/v1, api_key ${accounts.TOKEN}")


@app.command()
def ask(
    name: ServiceName,
    question: Annotated[str, typer.Argument(help="What to ask.")],
    image: Annotated[list[Path] | None, typer.Option("--image", help="A picture's file; may be given several times.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The answer is cut here.")] = 512,
    dry_run: DryRun = False,
) -> None:
    """Ask a service, as the SDK's Predictor does.

    Example: qwenvl-ft pai ask charts --image data/sample/images/two_col_103562.png "What is shown?"
    """
    account = accounts.read_account()
    body = services.write_question(question, image or [], max_new_tokens)
    print_line(services.ask(_to_send(account, body, dry_run), name, body))


@app.command()
def delete(name: ServiceName, dry_run: DryRun = False) -> None:
    """Delete a service, so that it costs nothing more.

    Example: qwenvl-ft pai delete charts
    """
    services.delete(_to_send(accounts.read_account(), {"DeleteService": name}, dry_run), name)
    print_line(f"service {name} is deleted; its model stays in the bucket")


def _session() -> Any:
    return accounts.open_session(accounts.read_account())


def _to_send(account: accounts.Account, body: dict[str, Any], dry_run: bool, uploads: Sequence[files.Upload] = ()) -> Any:
    """A session to send it with. A dry run shows it and ends here; nobody here knows Alibaba's prices, so there is none."""
    if dry_run:
        print_json({"request": body, "uploads": [upload.facts for upload in uploads], "estimated_price": None})
        raise typer.Exit
    return accounts.open_session(account)


def _image(image: str | None) -> str:
    if not image:
        fix = "build the Dockerfile, push it to a registry that PAI reaches, and name it, or export QWENVL_IMAGE"
        raise UserError(Problem("--image", "is not given: in which container should it run?", fix))
    return image


def _token() -> str:
    token = os.environ.get(accounts.TOKEN, "").strip()
    if not (token and token.isascii() and token.isprintable()):
        what = "is not set: it is what callers of the service must send" if not token else "has letters that no header can carry"
        raise UserError(Problem(accounts.TOKEN, what, f"export {accounts.TOKEN}=$(openssl rand -hex 32)"))
    return token
