"""Looks at a model's or an adapter's folder: what is wrong with it, and how vLLM can serve it. Never imports torch."""

import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np

from qwenvl_ft.data.families import family_of
from qwenvl_ft.data.geometry import read_limits
from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.folders.adapter import (
    BASE,
    BEYOND_VLLM,
    DTYPES,
    LORA_KEY,
    MAGNITUDE_KEY,
    QUANTIZATION,
    Place,
    Stored,
    base_problems,
    module_of,
    read_header,
    vllm_rank,
    weight_of,
)
from qwenvl_ft.folders.model import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_model_json
from qwenvl_ft.folders.problems import adapter_problems, is_pointer, model_problems, talk_problems, unreadable
from qwenvl_ft.folders.runs import checkpoints, holds_processor
from qwenvl_ft.folders.whole import MANIFEST, damage
from qwenvl_ft.hub.download import damaged
from qwenvl_ft.hub.environment import Report

TOP = "base_model.model."
VISION = "visual."
HEAD, EMBEDDINGS = "lm_head", "model.language_model.embed_tokens"
ON_A_HUB = re.compile(r"[\w.-]+/[\w.-]+")
# Of vLLM's LoRAConfig, which calls it experimental; early versions do not have it, and no version here can be asked.
TOWERS_TOO = "; or try --enable-tower-connector-lora (experimental), where `vllm serve --help` lists it: older versions do not"


def examine(folder: Path) -> Report:
    """Facts and problems of a folder that holds a model or an adapter."""
    if not folder.is_dir():
        return Report({}, [Problem(str(folder), "is not a folder", "give a model's folder, or the output_dir of a run")])
    if (folder / ADAPTER_CONFIG).is_file() or (folder / ADAPTER_WEIGHTS).is_file() or (folder / "adapter_model.bin").is_file():
        return _adapter(folder)
    if unfinished := checkpoints(folder):
        return Report({}, [Problem(str(folder), f"is a run that did not finish; its newest checkpoint is {unfinished[-1].name}",
                                   f"go on with resume=true, or look at {unfinished[-1]}")])  # fmt: skip
    return _model(folder)


def _model(folder: Path) -> Report:
    problems = model_problems(folder) + talk_problems(folder)
    facts: dict[str, Any] = {"is": "a model"}
    config = folder / "config.json"
    if config.is_file() and not is_pointer(config):
        for look in (family_of, read_limits) if holds_processor(folder) else (family_of,):
            try:
                look(folder)
            except UserError as error:
                problems += [problem for problem in error.problems if problem not in problems]
        settings = _json(config)
        facts["model_type"] = settings.get("model_type")
        inner = settings.get("text_config") or {}  # where some released configs say it
        said = (of.get(key) for of in (settings, inner) for key in ("dtype", "torch_dtype"))
        facts["stored as"] = next(filter(None, said), "not said")
        if "quantization_config" in settings:
            facts["training"] = "it is quantized: adapters merge into the same model in full precision only"
    if (folder / MANIFEST).is_file() and (reason := damage(folder)):
        problems.append(Problem(str(folder), reason, "export or copy it again"))
    problems += [Problem(str(folder / name), "is not as it was downloaded", "run the same `qwenvl-ft download` again")
                 for name in damaged(folder)]  # fmt: skip
    facts["vLLM"] = "mend the problems first" if problems else shlex.join(["vllm", "serve", str(folder)])
    return Report(facts, problems)


def _adapter(folder: Path) -> Report:
    problems = adapter_problems(folder)
    settings = _json(folder / ADAPTER_CONFIG)
    shapes: dict[str, list[int]] = {}
    weights = folder / ADAPTER_WEIGHTS
    if weights.is_file() and not is_pointer(weights) and not unreadable(weights):
        tensors = read_header(weights)[1]
        shapes = {tensor.key: tensor.shape for tensor in tensors}
        problems += _tensors(folder, shapes) + _not_finite(weights, tensors)
    base_problems, base = _base(folder, settings)
    problems += base_problems
    base_is_here = base is not None and Path(base).is_dir()
    if base_is_here and not base_problems:
        problems += _fit(folder, shapes, Path(str(base)))
    facts: dict[str, Any] = {"is": "an adapter", "base": base, "tensors": len(shapes)}
    if base and not base_is_here:
        facts["base"] = f"{base}, which is not here" + ("" if base_problems else ": taken for a hub's name, and not looked at")
    if held := _json(folder / BASE).get(QUANTIZATION):
        facts["trained"] = f"on its base in {held}; export merges it into what that stood for"
    if shapes:
        facts["on"] = ", ".join(_towers(shapes))
        facts["vLLM"] = _serving(folder, settings, shapes, base)
    lacking = talk_problems(folder)
    if lacking:
        facts["processor"] = "the base's own, at the base's resolution: the folder holds none from training"
        if not base or (base_problems and not base_is_here):
            problems += lacking
    return Report(facts, problems)


def _tensors(folder: Path, shapes: dict[str, list[int]]) -> list[Problem]:
    """Names that transformers 5 will not find, tensors without their other half."""
    where, problems = str(folder / ADAPTER_WEIGHTS), []
    old = [key for key in shapes if _is_old(key)]
    if old:
        what = f"{len(old)} tensors have the names of transformers 4 ({old[0]}): PEFT and vLLM may load the model without them"
        problems.append(Problem(where, what, "merge it with `qwenvl-ft export`, which reads them, as ask, eval and serve do"))
    strange = [key for key in shapes if not key.startswith((f"{TOP}model.", f"{TOP}{HEAD}.")) and key not in old]
    if strange:
        what = f"{len(strange)} tensors belong to no module of a Qwen-VL model ({strange[0]})"
        problems.append(Problem(where, what, "give the adapter of a Qwen-VL model as PEFT saves it"))
    halves = {
        key: key.replace(".lora_A.", ".lora_B.") if ".lora_A." in key else key.replace(".lora_B.", ".lora_A.") for key in shapes
    }
    alone = [key for key, other in halves.items() if other not in shapes]
    if alone:
        problems.append(Problem(where, f"{len(alone)} tensors lack their other half ({alone[0]})", "copy it again"))
    if not shapes:
        problems.append(Problem(where, "holds no tensors", "copy it again"))
    return problems


def _is_old(key: str) -> bool:
    """Whether a tensor is named as transformers 4 before 4.52 named modules."""
    module = key.removeprefix(TOP).removesuffix(".weight")
    return key.startswith(TOP) and module_of(module) != module


def _not_finite(weights: Path, tensors: list[Stored]) -> list[Problem]:
    """A NaN or an infinity, of which a single one spoils every answer."""
    found = [tensor.key for tensor in tensors if tensor.dtype in DTYPES and not np.isfinite(tensor.read()).all()]
    what = f"{len(found)} tensors hold NaN or infinity ({', '.join(found[:1])})"
    return [Problem(str(weights), what, "take an earlier checkpoint, and train with a lower learning_rate")] if found else []


def _fit(folder: Path, shapes: dict[str, list[int]], base: Path) -> list[Problem]:
    """Tensors for modules that the base has not, or has in another size."""
    if "quantization_config" in _json(base / "config.json"):
        return []  # whose files have other keys and shapes
    settings = _json(folder / ADAPTER_CONFIG)
    stored: dict[str, list[int]] = {}
    for of in (of for path in sorted(base.glob("*.safetensors")) for of in read_header(path)[1]):
        place = Place.of(module_of(of.key))
        # One of several experts, of which gate_up_proj is two tensors.
        stored[place.weight] = (
            of.shape if place.expert is None else [0, of.shape[0] * (1 if place.half is None else 2), of.shape[1]]
        )
    stored.setdefault(HEAD, stored.get(EMBEDDINGS, []))  # tied: stored once
    unplaced, unlike = [], []
    for key, shape in shapes.items():
        if _is_old(key) or not key.startswith(TOP):
            continue  # told already
        match = LORA_KEY.match(key) or MAGNITUDE_KEY.match(key)
        wanted = stored.get(weight_of(module_of(match[1]), settings) if match else module_of(key.removeprefix(TOP)))
        if not wanted:
            unplaced.append(key)
        elif not match:  # a whole tensor, in place of the base's
            unlike += [key] * (shape != wanted)
        elif ".experts." in key:  # whose axes may be stored either way round
            unlike += [key] * (shape[".lora_A." in key] not in wanted[1:])
        elif shape[1:] != wanted[1:] if ".lora_A." in key else shape[0] != wanted[0]:
            unlike.append(key)
    where, fix = str(folder / ADAPTER_WEIGHTS), "bring the base that it was trained on, or export with --model DIR"
    problems = []
    if unplaced:
        problems.append(Problem(where, f"{len(unplaced)} tensors have no module in {base} ({unplaced[0]})", fix))
    if unlike:
        problems.append(Problem(where, f"{len(unlike)} tensors do not fit the sizes of {base} ({unlike[0]})", fix))
    return problems


def _base(folder: Path, settings: dict[str, Any]) -> tuple[list[Problem], str | None]:
    """Problems of the base that the adapter names, and that name: a folder, or a hub's ORG/NAME, which vLLM takes as well."""
    if not settings:
        return [], None
    where, named = str(folder / ADAPTER_CONFIG), settings.get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        return [Problem(where, "names no base model", "give the base with --model DIR when you export")], None
    base = Path(named)
    if not base.is_dir():
        if ON_A_HUB.fullmatch(named) and not (folder / BASE).is_file():  # which training here writes, of a folder
            return [], named
        return [Problem(where, f"its base {named} is not here", "bring it there, or export with --model DIR")], named
    problems = model_problems(base)
    return problems or base_problems(folder, base), named


def _towers(shapes: dict[str, list[int]]) -> list[str]:
    """The parts of the model that the adapter changes."""
    names = {
        HEAD if f"{HEAD}." in key else "embed_tokens" if "embed_tokens." in key
        else "merger" if "merger" in key else "vision" if VISION in key else "experts" if ".experts." in key else "language"
        for key in shapes
    }  # fmt: skip
    return [name for name in ("language", "experts", "vision", "merger", "embed_tokens", HEAD) if name in names]


def _serving(folder: Path, settings: dict[str, Any], shapes: dict[str, list[int]], base: str | None) -> str:
    """How vLLM can serve it: as it is only if nothing but the language model's linear layers is changed."""
    merge = "; merge first: " + shlex.join(["qwenvl-ft", "export", "--adapter", str(folder), "--out", f"{folder}-merged"])
    beyond = _towers(shapes)
    refused = [key for key in BEYOND_VLLM if settings.get(key)]
    if not refused and (unseen := [tower for tower in beyond if tower in ("vision", "merger")]):
        return f"leaves out LoRA on {' and '.join(unseen)}{merge}{TOWERS_TOO}"
    more = refused + [f"LoRA on {tower}" for tower in beyond if tower in (HEAD, "embed_tokens")]
    rank = max((shape[0] for key, shape in shapes.items() if ".lora_A." in key), default=0)
    fitting = vllm_rank(rank)
    if more or not fitting:
        return f"does not take {', '.join(more) or f'rank {rank}'}{merge}"
    command = ["vllm", "serve", base or "BASE", "--enable-lora", "--lora-modules", f"NAME={folder}"]
    return shlex.join([*command, "--max-lora-rank", str(fitting)])


def _json(path: Path) -> dict[str, Any]:
    """What the file holds; nothing if that is no JSON object."""
    try:
        return read_model_json(path)
    except UserError:
        return {}
