"""The command `init`: settings to begin with and, on request, something to try them on. The files are the checkout's own."""

import shutil
from pathlib import Path
from typing import Annotated

import typer

import qwenvl_ft
from qwenvl_ft.console import print_line
from qwenvl_ft.errors import Problem, UserError

PACKAGE = Path(qwenvl_ft.__file__).parent
SHIPPED = PACKAGE / "shipped"  # where pyproject.toml puts configs/ and data/ in a wheel; in a checkout they lie beside the package
SAMPLE = ("data/tiny", "data/sample")


def init(
    path: Annotated[
        Path,
        typer.Argument(help="Where to; a name of the checkout's configs, such as zero2.yaml or qwen3-vl-8b.yaml, gets that one."),
    ] = Path("lora.yaml"),
    sample: Annotated[
        bool, typer.Option("--sample", help="The demo's settings, with its charts and its tiny base, 10 MB, in ./data.")
    ] = False,
) -> None:
    """Write a config that says what every key does. What is there already is never overwritten.

    Example: qwenvl-ft init --sample && qwenvl-ft plan
    """
    source = SHIPPED if SHIPPED.is_dir() else PACKAGE.parent
    config = source / "configs" / ("demo.yaml" if sample else path.name)
    if not config.is_file():
        config = source / "configs/lora.yaml"
    folders = SAMPLE if sample else ()
    problems = [Problem(name, "exists already", "run it in another folder") for name in folders if Path(name).exists()]
    if path.exists() or path.is_symlink():
        problems.append(Problem(str(path), "exists already", "give the name of a new file: `qwenvl-ft init FILE.yaml`"))
    if problems:
        raise UserError(*problems)
    try:
        for name in folders:
            shutil.copytree(source / name, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(config, path)
    except OSError as error:
        what = f"cannot be written ({error.strerror})"
        raise UserError(
            Problem(str(error.filename2 or error.filename or path), what, "choose a folder that takes files")
        ) from error
    print_line(f"wrote {', '.join([*folders, str(path)])}")
    named = "" if path == Path("lora.yaml") else f" --config {path}"
    if sample:
        print_line(f"next: `qwenvl-ft plan{named}`, then `qwenvl-ft train{named}`: minutes on two CPU cores")
    elif "train_meta_file" in config.read_text(encoding="utf-8"):  # else it is one for accelerate, whose first line says how
        print_line(f"next: set its model, train_meta_file, train_data_dir and output_dir, then `qwenvl-ft plan{named}`;")
        print_line("      without data of your own, `qwenvl-ft init --sample` in an empty folder brings a small base and charts")
