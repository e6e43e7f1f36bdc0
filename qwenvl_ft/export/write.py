"""Makes one folder of a base and an adapter that loads with `from_pretrained` and nothing else, proven before it is there.

The merge streams (merge.py). Proven is what was written: every merged weight against PEFT's own sum, and the logits of the
merged folder against those of base + adapter.
"""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from qwenvl_ft.config import load_config
from qwenvl_ft.data.chat import open_chat
from qwenvl_ft.data.geometry import read_limits
from qwenvl_ft.data.records import read_meta
from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.export.merge import Deltas, merge_files
from qwenvl_ft.folders.adapter import check_adapter
from qwenvl_ft.folders.base import check_base
from qwenvl_ft.folders.problems import INDEX, model_problems, read_model_json
from qwenvl_ft.folders.runs import PROCESSORS, holds_processor, run_folder_of
from qwenvl_ft.folders.tensors import module_of, read_header
from qwenvl_ft.folders.whole import write_json, write_whole

COPIED = (
    "config.json", "generation_config.json", "configuration.json", INDEX, "tokenizer.json", "tokenizer_config.json",
    "chat_template.jinja", "chat_template.json", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "video_preprocessor_config.json", *PROCESSORS, "LICENSE", "NOTICE",
)  # fmt: skip
HALF_ULP = {"F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}  # of a number: what storing it may change
REPORT = "nothing was written; report this with the adapter's adapter_config.json"
LIMIT = {"F32": 1e-3, "F16": 0.02, "BF16": 0.1}  # of the largest logit: what rounding every weight can explain


def export(
    adapter: Path, out: Path, model_dir: Path | None, verify: int, on_bytes: Callable[[int, int], None]
) -> list[dict[str, Any]]:
    """Writes the merged model to `out`: whole and proven, or not at all.

    Returns, for each of `verify` training records, `where`, `difference` (the largest of a logit) and `largest` (logit).
    `model_dir` defaults to the base that the adapter names. Raises UserError if the base is quantized or not the one that
    was trained on, if an adapter tensor has no home in it, or if the merged model differs by more than rounding explains.
    """
    check_adapter(adapter)
    base = model_dir or Path(read_model_json(adapter / "adapter_config.json").get("base_model_name_or_path") or "")
    if not (base / "config.json").is_file():
        raise UserError(Problem(str(base), "is not a model's folder", "give the base with --model DIR"))
    if out.exists():
        raise UserError(Problem(str(out), "exists already", "choose another --out, or delete it"))
    if problems := model_problems(base):
        raise UserError(*problems)
    open_chat(base)
    config = read_model_json(base / "config.json")
    if "quantization_config" in config:
        raise UserError(Problem(str(base), "is quantized", "merge into the same model in its full precision, with --model DIR"))
    run = run_folder_of(adapter)
    check_base(adapter, base)
    deltas = Deltas(adapter, config)
    records = _sample(run, verify)
    proofs: list[dict[str, Any]] = []

    def write(folder: Path) -> dict[str, str]:
        digests = merge_files(weights_of(base), folder, deltas, on_bytes)
        _copy_settings(folder, run, base)
        if records:
            proofs.extend(prove(folder, base, adapter, records))
        (folder / "README.md").write_text(model_card(run, base, proofs), encoding="utf-8")
        return digests

    write_whole(out, write, replace=False)
    return proofs


def weights_of(model_dir: Path) -> list[Path]:
    """The safetensors files of a model: those of its index, if it has one."""
    index = model_dir / INDEX
    names = set(read_model_json(index)["weight_map"].values()) if index.is_file() else None
    return [path for path in sorted(model_dir.glob("*.safetensors")) if names is None or path.name in names]


def _copy_settings(folder: Path, run: Path, base: Path) -> None:
    """Config, tokenizer, processor and the like as the base has them, so that whatever reads the base reads this, too; in the
    processor the limits that training used."""
    for name in COPIED:
        if (base / name).is_file():
            shutil.copy(base / name, folder / name)
    if not holds_processor(run):
        return
    limits = read_limits(run)
    values = dict.fromkeys(("min_pixels", "shortest_edge"), limits.min_pixels)
    values |= dict.fromkeys(("max_pixels", "longest_edge"), limits.max_pixels)
    for path in (folder / name for name in PROCESSORS if (folder / name).is_file()):
        content = read_model_json(path)
        settings = content.get("image_processor", content)
        if "patch_size" in settings:
            for place in (settings, settings.get("size") or {}):
                place |= {key: value for key, value in values.items() if place.get(key) is not None}
            write_json(path, content)


def _sample(run: Path, number: int) -> list[tuple[str, Any]]:
    """(place, conversation) of the first records that the run trained on; a question about a picture where they are gone."""
    settings = run / "config.yaml"
    if number and settings.is_file():
        config = load_config(settings)
        if config.train_meta_file.is_file() and (records := read_meta(config.train_meta_file, config.train_data_dir)[0]):
            return [(record.where, record.turns) for record in records[:number]]
    from PIL import Image

    picture = Image.linear_gradient("L").convert("RGB")
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "What is this?"}]
    return [("a made-up picture, the training records not being here", [{"role": "user", "content": content}])][:number]


def prove(merged: Path, base: Path, adapter: Path, records: Sequence[tuple[str, Any]]) -> list[dict[str, Any]]:
    """For each conversation `where`, `difference` (largest of a logit) and `largest` (logit) between merged and base + adapter.

    Raises UserError if a weight or a logit differs by more than rounding to the stored dtype can explain.
    """
    from qwenvl_ft.infer.engine import Engine

    def logits(engine: Engine) -> list[Any]:
        return [engine.model(**engine.inputs([talk])).logits.detach().float().cpu() for _, talk in records]

    adapted = Engine.open(base, adapter)
    dtype = prove_weights(merged, base, adapted.model)
    wanted = logits(adapted)
    del adapted  # one model in memory at a time
    proofs, problems = [], []
    for (where, _), left, right in zip(records, wanted, logits(Engine.open(merged)), strict=True):
        if left.shape != right.shape:
            what = f"reads {right.shape[1]} tokens where base and adapter read {left.shape[1]}"
            problems.append(Problem(f"the merged model on {where}", what, REPORT))
            continue
        difference, largest = (left - right).abs().max().item(), left.abs().max().item()
        proofs.append({"where": where, "difference": difference, "largest": largest})
        if not difference <= LIMIT[dtype] * largest:
            what = f"differs from base and adapter by {difference:.3g} (largest logit {largest:.3g})"
            problems.append(Problem(f"the merged model on {where}", what, REPORT))
    if problems:
        raise UserError(*problems)
    return proofs


def prove_weights(merged: Path, base: Path, adapted: Any) -> str:
    """Compares every merged weight with the base's and PEFT's own change; returns the dtype of most of the model's bytes.

    Raises UserError where they differ by more than rounding.
    """
    from peft.tuners.lora import LoraLayer
    from safetensors import safe_open

    named = {name.removeprefix("base_model.model."): layer for name, layer in adapted.named_modules()}
    layers = {name: layer for name, layer in named.items() if isinstance(layer, LoraLayer)}
    number, wrong, sizes = len(layers), {}, dict.fromkeys(HALF_ULP, 0)
    for path in weights_of(merged):
        for tensor in read_header(path)[1]:
            if tensor.dtype in sizes:
                sizes[tensor.dtype] += tensor.num_bytes
            if not (layer := layers.pop(module_of(tensor.key), None)):
                continue
            with safe_open(path, "pt") as after, safe_open(base / path.name, "pt") as before:
                found, start = (file.get_tensor(tensor.key).float() for file in (after, before))
            delta = layer.get_delta_weight(adapted.active_adapter).float().cpu()
            wanted = start + delta
            # Beside rounding, sums of products come in another order.
            bound = 1.01 * HALF_ULP[tensor.dtype] * wanted.abs() + 1e-5 * delta.abs().max() + 1e-7
            if not ((found - wanted).abs() <= bound).all():
                wrong[tensor.key] = (found - wanted).abs().max().item()
    if wrong or layers:
        worst = max(wrong, key=lambda key: wrong[key], default="")
        what = f"{len(wrong) + len(layers)} of {number} weights are not PEFT's sum of base and adapter"
        what += f", {worst} by up to {wrong[worst]:.3g}" if worst else f", {next(iter(layers))} is missing"
        raise UserError(Problem("the merged model", what, REPORT))
    return max(sizes, key=lambda dtype: sizes[dtype])


def model_card(run: Path, base: Path, proofs: list[dict[str, Any]]) -> str:
    """README.md of a merged model: what it was trained on, how, to what end, and how exactly it was merged."""
    origin = base.name
    if (record := base / ".download" / "manifest.json").is_file():
        origin = read_model_json(record).get("repo", origin)
    lines = ["---", "library_name: transformers", "pipeline_tag: image-text-to-text", f"base_model: {origin}", "---", ""]
    lines += [f"# {origin}, fine-tuned with LoRA and merged", "", "By qwenvl_ft. Loads with `from_pretrained`.", ""]
    if (run / "plan.json").is_file():
        plan = read_model_json(run / "plan.json")
        lines += ["## Data", "", f"{plan['used']:,} of {plan['records']:,} records with {plan['pictures']:,} pictures;"
                  f" {plan['tokens']['total']:,} tokens, {plan['taught_tokens']:,} of them taught.", ""]  # fmt: skip
    if (run / "all_results.json").is_file():
        lines += ["## Results", "", "```json", (run / "all_results.json").read_text(encoding="utf-8").strip(), "```", ""]
    if (run / "config.yaml").is_file():
        settings = YAML(typ="safe").load((run / "config.yaml").read_text(encoding="utf-8"))
        shown = {
            key: value
            for key, value in settings.items()
            if value is not None and key != "model" and not key.endswith(("_dir", "_file"))
        }
        lines += ["## Settings", "", "```yaml", *(f"{key}: {value}" for key, value in shown.items()), "```", ""]
    lines += ["## Merge", ""]
    for proof in proofs:
        lines.append(f"On {proof['where']} its logits differ from base and adapter by at most {proof['difference']:.2g} "
                     f"(largest logit {proof['largest']:.1f}).")  # fmt: skip
    if not proofs:
        lines.append("Not compared with base and adapter.")
    return "\n".join(lines) + "\n"
