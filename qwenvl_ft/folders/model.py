"""What a model's folder says of itself: its config, its chat template, which files hold its weights."""

import json
from pathlib import Path
from typing import Any

from qwenvl_ft.errors import Problem, UserError

INDEX = "model.safetensors.index.json"
# Where a folder of models has them; nothing hidden, which may be half a download.
BELOW = ("[!.]*", "[!.]*/[!.]*", "snapshots/*", "[!.]*--*/snapshots/*", "[!.]*/*--*/snapshots/*")
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def read_model_json(path: Path) -> dict[str, Any]:
    """A JSON object out of a model's folder. Raises UserError where it is none, as in a git clone without LFS."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise UserError(Problem(str(path), "is no JSON object (a git-lfs pointer, perhaps)", "download the whole model"))
    return content


def read_config(model_dir: Path) -> dict[str, Any]:
    """config.json. Raises UserError where the folder holds none: it is an adapter's, or no model's."""
    if not (model_dir / "config.json").is_file():
        if (model_dir / ADAPTER_CONFIG).is_file():
            raise UserError(Problem(str(model_dir), "is an adapter, not a model", "give its base, and this folder with --adapter"))
        fix = "download one: qwenvl-ft download Qwen/Qwen2-VL-7B-Instruct --hub modelscope --local-dir DIR"
        if below := model_below(model_dir):
            fix = f"give a model's folder below it, such as {below}"
        raise UserError(Problem(str(model_dir), "holds no config.json, so it is not a model's folder", fix))
    return read_model_json(model_dir / "config.json")


def model_below(folder: Path) -> Path | None:
    """A model's folder within one that is none itself: the cache_dir of a hub's own client has it some folders down."""
    if (folder / "config.json").is_file():
        return None
    found = (path for shape in BELOW for path in sorted(folder.glob(shape)) if (path / "config.json").is_file())
    return next((path for path in found if any(path.glob("*.safetensors"))), None)


def read_template(model_dir: Path) -> str | None:
    """The chat template, of several the default one; None if there is none.

    Looked for as `ProcessorMixin.get_processor_dict` of transformers 5.23 does, and then where only the tokenizer looks.
    """
    for name in ("processor_config.json", "chat_template.json", "chat_template.jinja", "tokenizer_config.json"):
        path = model_dir / name
        if not path.is_file():
            continue
        if name.endswith(".jinja"):
            return path.read_text(encoding="utf-8")
        found = read_model_json(path).get("chat_template")
        if isinstance(found, list):  # as transformers 4 wrote named ones into tokenizer_config.json
            found = {of.get("name"): of.get("template") for of in found if isinstance(of, dict)}
        if isinstance(found, dict):
            found = found.get("default")
        if isinstance(found, str) and found:
            return found
    return None


def weight_files(model_dir: Path) -> list[Path]:
    """The safetensors files of a model: those of its index, if it has one."""
    index = model_dir / INDEX
    names = set(read_model_json(index)["weight_map"].values()) if index.is_file() else None
    return [path for path in sorted(model_dir.glob("*.safetensors")) if names is None or path.name in names]
