"""The command `launch`: the file that starts a run on several machines. It imports nobody's SDK and submits nothing."""

import os
import shlex
from pathlib import Path
from typing import Annotated

import typer

from qwenvl_ft.cli.pai import Image
from qwenvl_ft.cloud.launch import WRITERS, Place, plan_launch
from qwenvl_ft.console import print_line, print_note
from qwenvl_ft.errors import Problem, UserError


def launch(
    config: Annotated[Path, typer.Argument(help="The settings, by the path that they have where the run starts.")],
    to: Annotated[Place, typer.Option("--to", help="What starts programs there.")],
    nodes: Annotated[int, typer.Option("--nodes", min=1, help="How many machines.")] = 1,
    gpus: Annotated[str, typer.Option("--gpus", help="GPUs of each; slurm and sky also take their kind, as in A100:8.")] = "8",
    zero: Annotated[int | None, typer.Option("--zero", min=2, max=3, help="Train with DeepSpeed, ZeRO of this stage.")] = None,
    image: Image = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The file; launch.sh, launch.yaml ... unless it is given.")
    ] = None,
) -> None:
    """Write the file that trains from a config on several machines, and say how to submit it; docs/clusters.md.

    Example: qwenvl-ft launch --to slurm --nodes 2 --gpus 8 lora.yaml && sbatch launch.sbatch
    """
    usual, write = WRITERS[to]
    path = out or Path(usual)
    text, submit = write(plan_launch(config, to, nodes, gpus, image, zero))
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UserError(Problem(str(path), "exists already", "give the name of a new one: -o FILE")) from None
    except OSError as error:
        raise UserError(Problem(str(path), f"cannot be written ({error.strerror})", "give another with -o FILE")) from error
    print_note(f"wrote {path}; next:")
    print_line(submit.replace("{}", shlex.quote(os.fspath(path))))
