"""The arguments that several commands take, and the settings that plan and train read from theirs."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from qwenvl_ft.config import FOUR_TOKENS, Config, load_config
from qwenvl_ft.data.reading import AS_FOUND, Numbers, Reading
from qwenvl_ft.data.template import Thinking
from qwenvl_ft.errors import Problem, UserError

Meta = Annotated[Path, typer.Argument(help="The meta-file: a JSON array or JSON lines of conversations.")]
DataDir = Annotated[Path, typer.Option("--data-dir", help="The folder that the <img> tags' file names are resolved against.")]
ModelArgument = Annotated[Path, typer.Argument(help="The model's folder.")]
ConfigFile = Annotated[Path, typer.Option("--config", help="The settings; `qwenvl-ft init` writes a lora.yaml.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document for a program.")]
Adapter = Annotated[Path | None, typer.Option("--adapter", help="The output_dir of a training run.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Settings in place of the file's: key=value ...")]

SettingsOf = Annotated[
    Path | None,
    typer.Option("--config", help="Take min_pixels, max_pixels and thinking of these settings: RUN/config.yaml."),
]
MinPixels = Annotated[int | None, typer.Option(min=FOUR_TOKENS, help="Enlarge smaller pictures to this area, in px.")]
MaxPixels = Annotated[int | None, typer.Option(min=FOUR_TOKENS, help="Shrink larger pictures to this area, in px.")]
BoxesOption = Annotated[
    Numbers | None,
    typer.Option("--boxes", help="What the numbers of the file's boxes are, else as --config says."),
]
ThinkingOption = Annotated[
    Thinking | None,
    typer.Option("--thinking", help="A thought before the answer: as training had it, or off, where this is not given."),
]

LORA_YAML = Path("lora.yaml")  # what --config is where it is not given


def read_settings(config: Path, overrides: list[str] | None, say: Callable[[str], None]) -> Config:
    """The settings, with a folder for their model. Raises UserError with all that they name and that is not there."""
    from qwenvl_ft.hub.clients import read_source
    from qwenvl_ft.hub.download import with_local_model

    settings = load_config(config, overrides or [])
    problems = []
    for key in ("train_meta_file", "train_data_dir", "eval_meta_file", "eval_data_dir"):
        path = getattr(settings, key)
        if path and not path.exists():
            of = "file of conversations" if key.endswith("file") else "folder of pictures"
            problems.append(Problem(f"{key}: {path}", "is not there", f"put your {of} there, or set {key} to where it is"))
    try:
        if not problems or read_source(str(settings.model)) is None:  # nothing is downloaded for a run that could not begin
            settings = with_local_model(settings, say)
    except UserError as error:
        problems = [*error.problems, *problems]
    if problems:
        raise UserError(*problems)
    return settings


ChatSettings = tuple[int | None, int | None, Thinking | None]


def read_chat_settings(
    config: Path | None, min_pixels: int | None, max_pixels: int | None, thinking: Thinking | None
) -> ChatSettings:
    """What `open_chat` and `Engine.open` take of a command's options, else of the settings that --config names. None: not given."""
    if config:
        settings = load_config(config)
        return min_pixels or settings.min_pixels, max_pixels or settings.max_pixels, thinking or settings.thinking
    return min_pixels, max_pixels, thinking


def read_reading(config: Path | None, boxes: Numbers | None) -> Reading:
    """How a meta-file is read by a command's options, else by the settings that --config names."""
    reading = Reading.of(load_config(config)) if config else AS_FOUND
    return replace(reading, boxes=boxes or reading.boxes)


def training_chat_settings(
    config: Path | None, min_pixels: int | None, max_pixels: int | None, thinking: Thinking | None
) -> ChatSettings:
    """What `plan` and `train` would use: that of `read_chat_settings`, else a config's defaults."""
    least, most, thinks = read_chat_settings(config, min_pixels, max_pixels, thinking)
    return least, most or Config.model_fields["max_pixels"].default, thinks or Config.model_fields["thinking"].default
