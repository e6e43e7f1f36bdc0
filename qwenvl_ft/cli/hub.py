"""Commands around a model's folder: bring it from a hub, look what is wrong with it. Neither imports torch where no GPU is."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from qwenvl_ft.cli.options import Json
from qwenvl_ft.console import draw_counts, print_drawing, print_json, print_line, print_problems
from qwenvl_ft.errors import Problem, UserError


def download(
    model: Annotated[str, typer.Argument(help="ORG/NAME on the hub, or the address of its page.")],
    hub: Annotated[Literal["modelscope", "hf"], typer.Option("--hub", help="Where from.")],
    local_dir: Annotated[Path, typer.Option("--local-dir", help="The folder to bring it to.")],
    file: Annotated[list[str] | None, typer.Option("--file", help="Only this file or pattern; may be given several times.")] = None,
    revision: Annotated[
        str | None, typer.Option("--revision", help="Branch, tag or commit; default: the commit that is here, or the newest.")
    ] = None,
) -> None:
    """Bring a model or an adapter from a hub, every file checked by size and hash; a second run brings what is missing or damaged.

    The commit is pinned and recorded in .download/manifest.json. HF_ENDPOINT, MODELSCOPE_ENDPOINT and HF_HUB_OFFLINE count.

    Example: qwenvl-ft download Qwen/Qwen2-VL-7B-Instruct --hub modelscope --local-dir models/Qwen2-VL-7B-Instruct
    """
    from qwenvl_ft.hub.clients import read_source
    from qwenvl_ft.hub.download import alone
    from qwenvl_ft.hub.download import download as run

    source = read_source(model) or read_source(f"{hub}:{model}")
    assert source
    if source.hub != hub:
        raise UserError(Problem(model, f"is not on the hub that --hub {hub} names", f"write --hub {source.hub}, or {hub}:..."))
    with alone(local_dir, print_line):
        manifest = run(source._replace(revision=revision or source.revision), local_dir, file or (), print_line)
    whole = "complete" if manifest["complete"] else "these files are right; leave --file out for the whole model"
    if by_size := sum(of.get("checked") == "size" for of in manifest["files"].values()):
        whole += f", {by_size} of {len(manifest['files'])} files by size only: the hub lists no hash of them"
    print_line(f"{local_dir}: {whole}, at {manifest['commit'] or 'a revision that is not recorded'}")


def doctor(
    path: Annotated[Path | None, typer.Argument(help="A model's or an adapter's folder; without it, only the machine.")] = None,
    as_json: Json = False,
) -> None:
    """Say what is wrong with a model's or an adapter's folder, how vLLM can serve it, and what this machine has.

    Exit code 1 if there is a problem.

    Example: qwenvl-ft doctor runs/demo
    """
    from qwenvl_ft.hub.doctor import examine
    from qwenvl_ft.hub.environment import environment

    problems, facts = [], {}
    if path:
        found = examine(path)
        problems += found.problems
        facts = {"folder": found.facts}
    here = environment(path or Path())
    problems += here.problems
    facts["machine"] = here.facts
    if as_json:
        print_json({**facts, "problems": [problem.facts for problem in problems]})
    else:
        for title, rows in facts.items():
            lacking = "not told" if title == "folder" else "not installed"
            drawn = [(name, _text(value, lacking)) for name, value in rows.items() if name != "vLLM"]
            print_drawing(draw_counts(str(path) if title == "folder" else "This machine", drawn))
            if "vLLM" in rows:
                print_line(f"  vLLM: {rows['vLLM']}")  # a command to copy: no table's line breaks
        if problems:
            print_problems(problems)
    if problems:
        raise typer.Exit(1)


def _text(value: Any, lacking: str) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list) else lacking if value is None else str(value)
