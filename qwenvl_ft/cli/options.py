"""The arguments that several commands take."""

from pathlib import Path
from typing import Annotated

import typer

Meta = Annotated[Path, typer.Argument(help="The meta-file: a JSON array or JSON lines of conversations.")]
DataDir = Annotated[Path, typer.Option("--data-dir", help="The folder that the <img> tags' file names are resolved against.")]
ModelArgument = Annotated[Path, typer.Argument(help="The model's folder.")]
ConfigFile = Annotated[Path, typer.Option("--config", help="The settings, such as configs/lora.yaml.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document for a program.")]
Adapter = Annotated[Path | None, typer.Option("--adapter", help="The output_dir of a training run.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Settings in place of the file's: key=value ...")]
