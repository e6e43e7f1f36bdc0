"""Makes one folder of a base and an adapter that loads with `from_pretrained` and nothing else, proven before it is there.

The merge streams (merge.py); what was written is proven (prove.py).
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from qwenvl_ft.config import load_config
from qwenvl_ft.data.geometry import read_limits
from qwenvl_ft.data.meta_file import read_records
from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.export.merge import Deltas, merge_files
from qwenvl_ft.export.prove import prove
from qwenvl_ft.folders.model import ADAPTER_CONFIG, INDEX, read_config, read_model_json, weight_files
from qwenvl_ft.folders.problems import check_adapter
from qwenvl_ft.folders.runs import PROCESSORS, holds_processor, run_folder_of
from qwenvl_ft.folders.whole import write_json, write_whole
from qwenvl_ft.infer.engine import check_folders

COPIED = (
    "config.json", "generation_config.json", "configuration.json", INDEX, "tokenizer.json", "tokenizer_config.json",
    "chat_template.jinja", "chat_template.json", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "video_preprocessor_config.json", *PROCESSORS, "LICENSE", "NOTICE",
)  # fmt: skip


def export(
    adapter: Path, out: Path, model_dir: Path | None, verify: int, on_bytes: Callable[[int, int], None]
) -> list[dict[str, Any]]:
    """Writes the merged model to `out`: whole and proven, or not at all.

    Returns, for each of `verify` training records, `where`, `difference` (the largest of a logit) and `largest` (logit).
    `model_dir` defaults to the base that the adapter names. Raises UserError if the base is quantized or not the one that
    was trained on, if an adapter tensor has no home in it, or if the merged model differs by more than rounding explains.
    """
    check_adapter(adapter)  # which names the base
    base = model_dir or Path(read_model_json(adapter / ADAPTER_CONFIG).get("base_model_name_or_path") or "")
    if not (base / "config.json").is_file():
        raise UserError(Problem(str(base), "is not a model's folder", "give the base with --model DIR"))
    if out.exists():
        raise UserError(Problem(str(out), "exists already", "choose another --out, or delete it"))
    config = read_config(base)
    if "quantization_config" in config:
        raise UserError(Problem(str(base), "is quantized", "merge into the same model in its full precision, with --model DIR"))
    check_folders(base, [adapter])
    run = run_folder_of(adapter)
    deltas = Deltas(adapter, config)
    records = _sample(run, verify)
    proofs: list[dict[str, Any]] = []

    def write(folder: Path) -> dict[str, str]:
        digests = merge_files(weight_files(base), folder, deltas, on_bytes)
        _copy_settings(folder, run, base)
        if records:
            proofs.extend(prove(folder, base, adapter, records))
        (folder / "README.md").write_text(model_card(run, base, proofs), encoding="utf-8")
        return digests

    write_whole(out, write, replace=False)
    return proofs


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
        if config.train_meta_file.is_file():
            records = read_records(config.train_meta_file, config.train_data_dir, most=number).records
            if records:
                return [(record.where, record.turns) for record in records]
    from PIL import Image

    picture = Image.linear_gradient("L").convert("RGB")
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "What is this?"}]
    return [("a made-up picture, the training records not being here", [{"role": "user", "content": content}])][:number]


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
