"""The arguments that several commands take, and the settings that plan and train read from theirs."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from qwenvl_ft.config import Config, load_config, read_yaml
from qwenvl_ft.console import print_note
from qwenvl_ft.data.reading import AS_FOUND, Reading
from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.folders.adapter import quantization_of
from qwenvl_ft.folders.objects import address_of
from qwenvl_ft.values import FOUR_TOKENS, BoxUnit, Form, MixedFile, Thinking

if TYPE_CHECKING:
    from qwenvl_ft.infer.engine import ChatSettings

META = typer.Argument(
    help="JSON, JSON lines, CSV, parquet, Arrow, a WebDataset tar; a folder or a 'pattern*'; s3://, oss://, https://, hf:."
)
Meta = Annotated[Path, META]
DataDir = Annotated[
    Path | None,
    typer.Option("--data-dir", help="Where file names are looked up: the meta-file's folder, unless it is given."),
]
FetchMedia = Annotated[bool, typer.Option("--fetch-media", help="Bring pictures that are named by URL or held as base64, once.")]
FormatOption = Annotated[
    Form | None, typer.Option("--format", help="The form of the records, where what they hold does not say so rightly.")
]
ModelArgument = Annotated[Path, typer.Argument(help="The model's folder.")]
ConfigFile = Annotated[Path, typer.Option("--config", help="The settings; `qwenvl-ft init` writes a lora.yaml.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document for a program.")]
Adapter = Annotated[Path | None, typer.Option("--adapter", help="The output_dir of a training run.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Settings in place of the file's: key=value ...")]

SettingsOf = Annotated[
    Path | None,
    typer.Option("--config", help="Take bounds of pixels, thinking and how videos are drawn from these settings: RUN/config.yaml."),
]
MinPixels = Annotated[int | None, typer.Option(min=FOUR_TOKENS, help="Enlarge smaller pictures to this area, in px.")]
MaxPixels = Annotated[int | None, typer.Option(min=FOUR_TOKENS, help="Shrink larger pictures to this area, in px.")]
BoxesOption = Annotated[
    BoxUnit | None,
    typer.Option("--boxes", help="What the numbers of the file's boxes are, else as --config says."),
]
ThinkingOption = Annotated[
    Thinking | None,
    typer.Option("--thinking", help="A thought before the answer: as training had it, or off, where this is not given."),
]

LORA_YAML = Path("lora.yaml")  # what --config is where it is not given


def note_quantized(adapters: Iterable[Path]) -> None:
    """Says of each adapter that trained beside quantized layers that it answers beside others."""
    for adapter in adapters:
        if (held := quantization_of(adapter)) != "none":
            print_note(f"{adapter} was trained on its base in {held} and answers here on the base as it is, which is not quite the "
                       "same: `qwenvl-ft export` writes the model that was trained")  # fmt: skip


def read_settings(config: Path | None, overrides: list[str] | None, say: Callable[[str], None], job: Sequence[str] = ()) -> Config:
    """The settings, with a folder for their model. Raises UserError with all that they name and that is not there."""
    from qwenvl_ft.hub.clients import read_source
    from qwenvl_ft.hub.data_sets import with_local_data
    from qwenvl_ft.hub.download import with_local_model

    settings = load_config(config, overrides or [], job)
    problems = []
    for key in ("train_meta_file", "train_data_dir", "eval_meta_file", "eval_data_dir"):
        value = getattr(settings, key)
        for path in paths_of(value) if key.endswith("file") else [value]:
            if path and not is_there(path):
                of = "file of conversations" if key.endswith("file") else "folder of pictures"
                problems.append(Problem(f"{key}: {path}", "is not there", f"put your {of} there, or set {key} to where it is"))
    if settings.init_adapter and not settings.init_adapter.is_dir():
        fix = "give the output_dir of a finished run, or another folder with an adapter"
        problems.append(Problem(f"init_adapter: {settings.init_adapter}", "is not there", fix))
    try:
        if not problems or read_source(str(settings.model)) is None:  # nothing is downloaded for a run that could not begin
            settings = with_local_model(settings, say)
            settings = settings if problems else with_local_data(settings, say)
    except UserError as error:
        problems = [*error.problems, *problems]
    if problems:
        raise UserError(*problems)
    return settings


def paths_of(meta: Path | list[MixedFile] | None) -> list[Path]:
    """The paths of a meta-file, or of several."""
    return [of.file for of in meta] if isinstance(meta, list) else [meta] if meta else []


def is_there(path: Path) -> bool:
    """Whether a path, or a pattern, means something; a place on a hub may."""
    from qwenvl_ft.hub.clients import read_source

    if address_of(path):  # whoever reads it says so
        return True
    return path.exists() or bool(glob(str(path), recursive=True)) or read_source(str(path).partition("#")[0]) is not None


def local_meta(meta: Path, say: Callable[[str], None]) -> Path:
    """The meta-file of a command: that of a data set on a hub is brought first."""
    if ":" not in str(meta):  # the hubs' clients take a second to import
        return meta
    from qwenvl_ft.hub.data_sets import local

    return local(meta, say)


def read_chat_settings(
    config: Path | None, min_pixels: int | None, max_pixels: int | None, thinking: Thinking | None
) -> "ChatSettings":
    """Those of a command's options, else of the settings that --config names. None: not given."""
    from qwenvl_ft.infer.engine import ChatSettings

    given = ChatSettings(min_pixels, max_pixels, thinking)
    if not config:
        return given
    of = load_config(config)
    own = ChatSettings(of.min_pixels, of.max_pixels, of.thinking, of.video_max_pixels, Reading.of(of))
    return ChatSettings._make(mine or theirs for mine, theirs in zip(given, own, strict=True))


def training_chat_settings(
    config: Path | None, min_pixels: int | None, max_pixels: int | None, thinking: Thinking | None
) -> "ChatSettings":
    """What `plan` and `train` would use: that of `read_chat_settings`, else a config's defaults."""
    found = read_chat_settings(config, min_pixels, max_pixels, thinking)
    keys = ("max_pixels", "thinking", "video_max_pixels")
    return found._replace(**{key: getattr(found, key) or Config.model_fields[key].default for key in keys})


def own_reading(folders: Sequence[tuple[Path, Path | None]], boxes: BoxUnit | None = None) -> Reading:
    """How models with their adapters are asked where nothing says otherwise: films are drawn as the first one's processor does, the
    numbers of boxes are what they were to the runs unless `boxes` says it, and media stand where the first run has them; of a
    merged model the run is that of its adapter.

    Raises UserError for runs that disagree on boxes, or whose settings cannot be read.
    """
    from qwenvl_ft.data.geometry import reading_of
    from qwenvl_ft.folders.runs import READING, processor_folder, run_folder_of

    if not folders:
        return Reading(boxes=boxes)
    paths = [run_folder_of(adapter) / "config.yaml" if adapter else folder / READING for folder, adapter in folders]
    runs = {path: read_yaml(path)[0] for path in paths if path.is_file()}
    said: dict[BoxUnit | None, Path] = {}
    for path, settings in runs.items():
        if (numbers := settings.get("boxes")) not in (None, *get_args(BoxUnit)):
            raise UserError(Problem(f"{path}: boxes", f"is {numbers!r}", f"write one of {', '.join(get_args(BoxUnit))}"))
        said.setdefault(numbers, path)
    known = {numbers: path for numbers, path in said.items() if numbers}
    if boxes is None and len(known) > 1:
        what = " and ".join(f"{numbers} in {path}" for numbers, path in known.items())
        raise UserError(Problem("boxes", f"are {what}", "say what the numbers of the file are with --boxes"))
    behind = next(iter(runs.values()), {}).get("media_position") == "last"
    return replace(
        reading_of(processor_folder(*folders[0])),
        boxes=boxes or next(iter(known), None),
        media_position="last" if behind else "as_written",
    )


def read_reading(
    config: Path | None, fetch_media: bool, format: Form | None = None, own: Reading = AS_FOUND, boxes: BoxUnit | None = None
) -> Reading:
    """How records are read: as the settings that --config names have it, else as `own` does, and as the command's options do."""
    reading = Reading.of(load_config(config)) if config else own
    return replace(
        reading, fetch_media=fetch_media or reading.fetch_media, format=format or reading.format,
        boxes=boxes or reading.boxes or own.boxes,
    )  # fmt: skip
