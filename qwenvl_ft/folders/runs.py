"""What a run's folder holds, and which of its checkpoints is the newest whole one."""

import os
import re
import shutil
from pathlib import Path

from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.folders.whole import INCOMING, damage, discard

PROCESSORS = ("processor_config.json", "preprocessor_config.json")  # written by transformers 5 and by 4
FOR_RESUMING = re.compile(r"(?:state\.json|metrics\.jsonl|optimizer.*\.safetensors)$")  # in a checkpoint, beside its adapter
NAME = re.compile(r"checkpoint-(\d+)$")
# What train writes there, its trackers' folder among it, and eval, which may come first.
PICTURE_HASHES = "picture_hashes.json"  # in a run's folder: what was hashed already
OF_A_RUN = re.compile(
    r"(?:config\.yaml|plan\.json|metrics\.jsonl|picture_hashes\.json|checkpoint-\d+|qwenvl_ft|predictions.*\.jsonl?)$"
)


def newest(output_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, and why each newer one was passed over. Raises UserError if there are some and none is whole."""
    skipped: list[str] = []
    found = checkpoints(output_dir)
    for folder in reversed(found):
        if (reason := damage(folder)) is None:
            return folder, skipped
        skipped.append(f"{folder.name}: {reason}")
    if found:
        raise UserError(*(
            Problem(str(output_dir), f"cannot resume: {reason}", "restore it, or delete the folder to start again")
            for reason in skipped
        ))  # fmt: skip
    return None, skipped


def earlier(output_dir: Path) -> list[Path]:
    """The folders named earlier-N, the first first: what an earlier run left there before another began with its weights."""
    return sorted(output_dir.glob("earlier-*"), key=lambda path: (len(path.name), path.name))


def set_aside(output_dir: Path) -> Path:
    """Moves the checkpoints into a new earlier-N, the newest last, so that a kill amid them leaves the newest to be found."""
    folder = output_dir / f"earlier-{len(earlier(output_dir)) + 1}"
    folder.mkdir()
    for checkpoint in checkpoints(output_dir):
        checkpoint.rename(folder / checkpoint.name)
    return folder


def checkpoints(output_dir: Path) -> list[Path]:
    """The folders named checkpoint-N, oldest step first."""
    folders = [path for path in output_dir.glob("checkpoint-*") if NAME.search(path.name)]
    return sorted(folders, key=lambda path: int(NAME.search(path.name)[1]))  # type: ignore[index]


READING = "reading.json"  # in a merged folder: the settings of its run by which it is asked as it was taught


def run_folder_of(adapter: Path) -> Path:
    """Where an adapter's processor and settings are: in its folder, or for a checkpoint in that of its run."""
    of_run = NAME.search(adapter.name) and not holds_processor(adapter) and holds_processor(adapter.parent)
    return adapter.parent if of_run else adapter


def holds_processor(folder: Path) -> bool:
    """Whether a processor's settings are there."""
    return any((folder / name).is_file() for name in PROCESSORS)


def processor_folder(model_dir: Path, adapter: Path | None) -> Path:
    """Where the processor is that an adapter is asked with: its own, with training's limits, else the base's."""
    own = adapter and run_folder_of(adapter)
    return own if own and holds_processor(own) else model_dir


def rotate(output_dir: Path, keep: int, spared: str = "") -> None:
    """Deletes what is older than the `keep` newest whole checkpoints, but for the one that is `spared`, which does not count, as a
    damaged one does not.

    Every one that counts is read and hashed again: it was whole when it was written, and the others are deleted on its account.
    """
    found = [folder for folder in checkpoints(output_dir) if folder.name != spared]
    whole = 0
    while found and whole < keep < whole + len(found):  # else nothing is to go, and nothing need be read
        whole += damage(found.pop()) is None
    for folder in found if whole == keep else []:
        doomed = output_dir / INCOMING / folder.name
        shutil.rmtree(doomed, ignore_errors=True)
        doomed.parent.mkdir(exist_ok=True)
        folder.rename(doomed)  # first out of sight, so that a kill leaves no half-deleted checkpoint
        discard(doomed)


def check_output_dir(folder: Path) -> None:
    """Raises UserError where a run would mix its files with others: only a new, an empty or a run's folder is written to."""
    place = f"output_dir: {folder}"
    try:
        names = [name for name in os.listdir(folder) if not name.startswith(".")]
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(Problem(place, f"is no folder to write to ({error.strerror})", "give another folder")) from None
    if names and not any(OF_A_RUN.match(name) for name in names):
        raise UserError(Problem(place, "holds files and none of a run", "give a new folder, or an empty one"))
