"""What is wrong with a model's or an adapter's folder, said once for every command. Never imports torch."""

from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.folders.model import ADAPTER_CONFIG, ADAPTER_WEIGHTS, INDEX, model_below, read_config, read_model_json, read_template
from qwenvl_ft.folders.runs import FOR_RESUMING, PROCESSORS, checkpoints, holds_processor
from qwenvl_ft.folders.whole import MANIFEST, damage

MOST_ALPHA = 1e30  # far above any that trains, and below what the scale's arithmetic can hold
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
    if (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file():
        return adapter_file_problems(folder)
    return model_problems(folder)


def model_problems(folder: Path) -> list[Problem]:
    """Everything that keeps a folder from being a whole model, but for what it needs to talk."""
    if not folder.is_dir():
        return [Problem(str(folder), "is not a folder", "give the folder of a downloaded model")]
    found = pointers(folder)
    config = folder / "config.json"
    try:
        if not config.is_file() or not is_pointer(config):
            read_config(folder)
    except UserError as error:
        found += error.problems
    if model_below(folder):  # which is what is meant
        return found
    found += broken_weights(folder)
    if not any(folder.glob("*.safetensors")) and not (folder / INDEX).is_file():
        pickles = any(folder.glob("*.bin"))
        what = "its weights are pickles, no safetensors" if pickles else "holds no safetensors"
        found.append(Problem(str(folder), what, "download the model in its safetensors form"))
    return found


def talk_problems(folder: Path) -> list[Problem]:
    """What a processor and a chat need beside the weights, and the folder lacks."""
    found: list[Problem] = []
    if model_below(folder):
        return found
    if not holds_processor(folder):
        found.append(Problem(str(folder), f"holds no {' or '.join(sorted(PROCESSORS))}", AGAIN))
    if not (folder / "tokenizer.json").is_file():
        found.append(Problem(str(folder), "holds no tokenizer.json", AGAIN))
    try:
        template = read_template(folder)
    except UserError as error:
        return found + [problem for problem in error.problems if not is_pointer(Path(problem.where))]  # which are told already
    if template is None:
        found.append(Problem(str(folder), "holds no chat template (chat_template.jinja, or in tokenizer_config.json)",
                             "copy it from the base model, or download the Instruct model"))  # fmt: skip
    return found


def check_model(folder: Path) -> None:
    """Raises UserError with everything that keeps a model's folder from answering."""
    if problems := model_problems(folder) + (talk_problems(folder) if folder.is_dir() else []):
        raise UserError(*problems)


def adapter_file_problems(folder: Path) -> list[Problem]:
    """Which of an adapter's two files is missing or broken."""
    found = pointers(folder) if folder.is_dir() else []
    again = "download it again, or copy it from the run's output_dir"
    settings, weights = folder / ADAPTER_CONFIG, folder / ADAPTER_WEIGHTS
    pickle = (folder / "adapter_model.bin").is_file()
    if not settings.is_file() and not weights.is_file() and not pickle:
        unfinished = checkpoints(folder)
        fix = f"give its newest checkpoint, {unfinished[-1]}" if unfinished else "give the output_dir of a finished run"
        what = f"holds no {ADAPTER_CONFIG} with {ADAPTER_WEIGHTS}"
        if (folder / "config.json").is_file():
            what, fix = "is a whole model, not an adapter", "give it as the model, without --adapter"
        return [Problem(str(folder), what, fix)]
    if not settings.is_file():
        found.append(Problem(str(folder), f"{ADAPTER_CONFIG} is missing", again))
    elif not is_pointer(settings):
        try:
            read_model_json(settings)
        except UserError:
            found.append(Problem(str(settings), "is no JSON object", again))
    if not weights.is_file():
        what = "its weights are a pickle" if pickle else f"{ADAPTER_WEIGHTS} is missing"
        found.append(Problem(str(folder), what, "save it again as safetensors" if pickle else again))
    elif not is_pointer(weights) and (reason := unreadable(weights)):
        found.append(Problem(str(weights), f"is not a whole safetensors file ({reason})", again))
    return found


def adapter_problems(folder: Path) -> list[Problem]:
    """Everything that keeps a folder from being a PEFT adapter as it was written, whose settings and tensors can be used."""
    if found := adapter_file_problems(folder):
        return found
    if (folder / MANIFEST).is_file() and (reason := damage(folder, but=FOR_RESUMING)):
        fix = f"copy it again from the run's output_dir; if it was changed on purpose, delete its {MANIFEST}"
        return [Problem(str(folder), reason, fix)]
    where, again = str(folder / ADAPTER_CONFIG), "copy or train the adapter again"
    said = read_model_json(folder / ADAPTER_CONFIG)
    if said.get("peft_type") != "LORA" or any(type(said.get(key)) not in (int, float) for key in ("r", "lora_alpha")):
        return [Problem(where, "names no LoRA with r and lora_alpha", again)]
    rank, alpha = said["r"], said["lora_alpha"]
    if type(rank) is not int or rank <= 0:
        found.append(Problem(where, f"r is {rank}, no rank", again))
    if not 0 < alpha < MOST_ALPHA:  # NaN is not, either
        found.append(Problem(where, f"lora_alpha is {alpha}, no scale", again))
    if not isinstance(said.get("base_model_name_or_path") or "", str):
        found.append(Problem(where, f"base_model_name_or_path is {said['base_model_name_or_path']!r}, no name", again))
    with safe_open(folder / ADAPTER_WEIGHTS, "np") as file:
        down = [file.get_slice(key).get_shape() for key in list(file.keys()) if ".lora_A." in key and ".experts." not in key]
    ranks = {shape[0] for shape in down if shape}
    if ranks - {rank} and not said.get("rank_pattern"):
        stored = ", ".join(map(str, sorted(ranks)))
        what = f"its tensors have rank {stored}, {ADAPTER_CONFIG} says {rank}"
        found.append(Problem(str(folder / ADAPTER_WEIGHTS), what, "copy both files from the same run"))
    return found


def check_adapter(folder: Path) -> None:
    """Raises UserError with everything that keeps an adapter's folder from being used."""
    if problems := adapter_problems(folder):
        raise UserError(*problems)
