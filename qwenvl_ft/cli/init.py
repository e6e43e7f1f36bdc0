"""The command `init`: settings to begin with, on the sample that comes with the package until they name your own data."""

import json
import re
from pathlib import Path
from typing import Annotated

import typer

from qwenvl_ft.console import print_line
from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.folders.shipped import SHIPPED

SAMPLE = {"model": "data/tiny", "train_meta_file": "data/sample/train.json", "train_data_dir": "data/sample/images"}


def init(
    path: Annotated[
        Path,
        typer.Argument(help="Where to; a name of the checkout's configs, such as zero2.yaml or qwen3-vl-8b.yaml, gets that one."),
    ] = Path("lora.yaml"),
) -> None:
    """Write a config that says what every key does. What is there already is never overwritten.

    Example: qwenvl-ft init && qwenvl-ft plan
    """
    config = SHIPPED / "configs" / path.name
    named = config.is_file() and path.name != "lora.yaml"
    text = (config if named else SHIPPED / "configs/lora.yaml").read_text(encoding="utf-8")
    if not named:
        for key, of_the_sample in SAMPLE.items():
            there = json.dumps(str(SHIPPED / of_the_sample), ensure_ascii=False)  # which is YAML, too
            old = re.search(rf"^{key}: \S+ *", text, re.MULTILINE)
            text = text.replace(old[0], f"{key}: {there}   ") if old else text
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        fix = "give the name of a new file: `qwenvl-ft init FILE.yaml`"
        raise UserError(Problem(str(error.filename or path), "exists already", fix)) from error
    except OSError as error:
        what = f"cannot be written ({error.strerror})"
        raise UserError(Problem(str(error.filename or path), what, "choose a folder that takes files")) from error
    print_line(f"wrote {path}")
    if not named:
        option = "" if path == Path("lora.yaml") else f" --config {path}"
        print_line(f"next: `qwenvl-ft plan{option}` shows what a run on the package's small sample would do;")
        print_line("      then set model, train_meta_file, train_data_dir and output_dir to your own")
