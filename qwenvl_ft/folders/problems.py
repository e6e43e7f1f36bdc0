"""What is missing from a model's or an adapter's folder or broken in it, without torch: git-lfs pointers, shards, cut files."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from qwenvl_ft.errors import Problem, UserError

INDEX = "model.safetensors.index.json"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
AGAIN = "download the model again: `qwenvl-ft download` brings what is missing or damaged"


def is_pointer(path: Path) -> bool:
    """Whether the file is what git leaves of a large file where git-lfs is not installed: three lines that name it."""
    with path.open("rb") as file:
        head = file.read(64)
    return head.startswith(b"version ") and b"git-lfs" in head


def pointers(folder: Path) -> list[Problem]:
    """One problem that names every git-lfs pointer of the folder, or none."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and path.stat().st_size < 1024]
    names = [path.name for path in files if is_pointer(path)]
    if not names:
        return []
    clone = "is a git clone made without git-lfs" if (folder / ".git").exists() else "was copied from a git clone without git-lfs"
    return [Problem(str(folder), f"{clone}: only a pointer stands for {', '.join(names)}",
                    "run `git lfs install` and `git lfs pull` in it, or use `qwenvl-ft download`")]  # fmt: skip


def broken_weights(folder: Path) -> Iterator[Problem]:
    """Shards or tensors that the index names and the folder lacks; safetensors that are cut. Pointers are not told again."""
    index = folder / INDEX
    placed: dict[str, str] = {}
    if index.is_file() and not is_pointer(index):
        try:
            placed = read_model_json(index)["weight_map"]
            if not all(isinstance(name, str) for name in placed.values()):
                raise TypeError
        except (UserError, KeyError, AttributeError, TypeError):
            placed = {}
            yield Problem(str(index), "is no index of safetensors", AGAIN)
    for name in sorted(set(placed.values())):
        if not (folder / name).is_file():
            yield Problem(str(folder), f"{name} is missing: {INDEX} names it", AGAIN)
    for path in sorted(folder.glob("*.safetensors")):
        if is_pointer(path):
            continue
        if reason := unreadable(path):
            yield Problem(str(path), f"is not a whole safetensors file ({reason})", AGAIN)
            continue
        with safe_open(path, "np") as file:
            lost = sorted({key for key, name in placed.items() if name == path.name} - set(file.keys()))
        if lost:
            yield Problem(str(path), f"lacks {len(lost)} tensors that {INDEX} names, such as {lost[0]}", AGAIN)


def unreadable(path: Path) -> str | None:
    """Why a safetensors file cannot be opened; None if its header is right and as much follows as it says."""
    try:
        with safe_open(path, "np"):
            return None
    except (SafetensorError, OSError) as error:
        return str(error).rsplit(": ", 1)[-1]


def whole_problems(folder: Path) -> list[Problem]:
    """What a download must end without: what keeps the folder from being a whole model, or a whole adapter."""
    if (folder / CONFIG).is_file() and not (folder / "config.json").is_file():
        return adapter_problems(folder)
    return model_problems(folder)


def adapter_problems(folder: Path) -> list[Problem]:
    """Which of an adapter's two files is missing or broken."""
    found = pointers(folder)
    again = "download it again, or copy it from the run's output_dir"
    if not (folder / CONFIG).is_file():
        found.append(Problem(str(folder), f"{CONFIG} is missing", again))
    elif not is_pointer(folder / CONFIG):
        try:
            read_model_json(folder / CONFIG)
        except UserError:
            found.append(Problem(str(folder / CONFIG), "is no JSON object", again))
    if not (folder / WEIGHTS).is_file():
        pickle = (folder / "adapter_model.bin").is_file()
        what = "its weights are a pickle" if pickle else f"{WEIGHTS} is missing"
        found.append(Problem(str(folder), what, "save it again as safetensors" if pickle else again))
    elif not is_pointer(folder / WEIGHTS) and (reason := unreadable(folder / WEIGHTS)):
        found.append(Problem(str(folder / WEIGHTS), f"is not a whole safetensors file ({reason})", again))
    return found


def model_problems(folder: Path) -> list[Problem]:
    """Everything that keeps a folder from being a whole model: what a download must end with."""
    if not folder.is_dir():
        return [Problem(str(folder), "is not a folder", "give the folder of a downloaded model")]
    found = pointers(folder)
    config = folder / "config.json"
    if not config.is_file():
        found.append(Problem(str(folder), "config.json is missing", AGAIN))
    elif not is_pointer(config):
        try:
            read_model_json(config)
        except UserError as error:
            found += error.problems
    found += broken_weights(folder)
    if not any(folder.glob("*.safetensors")) and not (folder / INDEX).is_file():
        pickles = any(folder.glob("*.bin"))
        what = "its weights are pickles, no safetensors" if pickles else "holds no safetensors"
        found.append(Problem(str(folder), what, "download the model in its safetensors form"))
    return found


def lacks_to_talk(folder: Path) -> list[Problem]:
    """What `from_pretrained` of a processor, and a chat, need beside the weights."""
    found = []
    if not any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        found.append(Problem(str(folder), "holds no preprocessor_config.json or processor_config.json", AGAIN))
    if not (folder / "tokenizer.json").is_file() and not (folder / "vocab.json").is_file():
        found.append(Problem(str(folder), "holds no tokenizer.json", AGAIN))
    if not has_chat_template(folder):
        found.append(Problem(str(folder), "holds no chat template (chat_template.jinja, or in tokenizer_config.json)",
                             "copy it from the base model, or download the Instruct model"))  # fmt: skip
    return found


def has_chat_template(folder: Path) -> bool:
    """In a file of its own, or inside the files where transformers 4 wrote it."""
    if (folder / "chat_template.jinja").is_file():
        return True
    for name in ("tokenizer_config.json", "chat_template.json", "processor_config.json"):
        try:
            if json.loads((folder / name).read_text(encoding="utf-8")).get("chat_template"):
                return True
        except (OSError, ValueError, AttributeError):
            continue
    return False


def read_model_json(path: Path) -> dict[str, Any]:
    """A JSON object out of a model's folder. Raises UserError where it is none, as in a git clone without LFS."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict):
        raise UserError(Problem(str(path), "is no JSON object (a git-lfs pointer, perhaps)", "download the whole model"))
    return content
