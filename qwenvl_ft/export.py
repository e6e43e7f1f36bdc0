"""Makes one folder of a base and an adapter that loads with `from_pretrained` and nothing else, proven before it is there.

The merge streams (merge.py); what is compared is what is released: the logits of the merged folder against base + adapter.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from qwenvl_ft import checkpoint
from qwenvl_ft.config import load_config
from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.geometry import read_model_json
from qwenvl_ft.merge import Deltas, check_adapter, merge_files
from qwenvl_ft.meta import Turn, read_meta
from qwenvl_ft.prepare import BASE, base_fingerprint

PROCESSORS = ("processor_config.json", "preprocessor_config.json")
LIMIT = {"float32": 1e-3, "float16": 0.02, "bfloat16": 0.1}  # of the largest logit: what rounding the weights can explain


def export(
    adapter: Path, out: Path, model_dir: Path | None, verify: int, on_bytes: Callable[[int, int], None]
) -> list[dict[str, Any]]:
    """Writes the merged model to `out`: whole and proven, or not at all.

    Returns, for each of `verify` training records, `where`, `difference` (the largest of a logit) and `largest` (logit).
    `model_dir` defaults to the base that the adapter names. Raises UserError if the base is quantized or not the one that
    was trained on, if an adapter tensor has no home in it, or if the merged model differs by more than rounding explains.
    """
    check_adapter(adapter)
    base = model_dir or Path(read_model_json(adapter / "adapter_config.json")["base_model_name_or_path"])
    if not (base / "config.json").is_file():
        raise UserError(Problem(str(base), "is not a model's folder", "give the base with --model DIR"))
    if out.exists():
        raise UserError(Problem(str(out), "exists already", "choose another --out, or delete it"))
    config = read_model_json(base / "config.json")
    if "quantization_config" in config:
        raise UserError(Problem(str(base), "is quantized", "merge into the same model in its full precision, with --model DIR"))
    if (adapter / BASE).is_file() and json.loads((adapter / BASE).read_text()) != base_fingerprint(base):
        raise UserError(Problem(str(base), "is not the base that this adapter was trained on", "give that base with --model DIR"))
    deltas = Deltas(adapter, config)
    proofs: list[dict[str, Any]] = []

    def write(folder: Path) -> dict[str, str]:
        digests = merge_files(base, folder, deltas, on_bytes)
        _copy_settings(folder, adapter, base)
        proofs.extend(prove(folder, base, adapter, turns) | {"where": where} for where, turns in _sample(adapter, verify))
        (folder / "README.md").write_text(model_card(adapter, base, proofs), encoding="utf-8")
        return digests

    out.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.write_whole(out, write)
    return proofs


def _copy_settings(folder: Path, adapter: Path, base: Path) -> None:
    """Config, generation config and index of the base; the adapter's processor, with the limits that training used."""
    for path in base.iterdir():
        if path.is_file() and path.suffix in (".json", ".jinja", ".txt", ".model") and path.name not in PROCESSORS:
            shutil.copy(path, folder / path.name)
    (folder / checkpoint.MANIFEST).unlink(missing_ok=True)  # the base's own
    processor = next((source for source in (adapter, base) if any((source / name).is_file() for name in PROCESSORS)), base)
    for name in (*PROCESSORS, "chat_template.jinja", "tokenizer.json", "tokenizer_config.json"):
        if (processor / name).is_file():
            shutil.copy(processor / name, folder / name)


def _sample(adapter: Path, number: int) -> list[tuple[str, tuple[Turn, ...]]]:
    """(place, turns) of the first records that the run trained on; a plain question where they are gone."""
    settings = adapter / "config.yaml"
    if number and settings.is_file():
        config = load_config(settings)
        if config.train_meta_file.is_file() and (records := read_meta(config.train_meta_file, config.train_data_dir)[0]):
            return [(record.where, record.turns) for record in records[:number]]
    return [("a plain question", (Turn("user", ("What is this?",)),))][:number]


def prove(merged: Path, base: Path, adapter: Path, turns: tuple[Turn, ...]) -> dict[str, Any]:
    """`difference` (largest of a logit) and `largest` (logit) between merged and base + adapter on one conversation.

    Raises UserError if the difference is more than rounding can explain.
    """
    from qwenvl_ft.engine import Engine

    def logits(model_dir: Path, with_adapter: Path | None) -> Any:
        engine = Engine.open(model_dir, with_adapter)
        return engine.model(**engine.inputs([turns])).logits.detach().float().cpu()

    wanted, got = logits(base, adapter), logits(merged, None)
    difference, largest = (wanted - got).abs().max().item(), wanted.abs().max().item()
    config = read_model_json(merged / "config.json")
    stored = config.get("dtype") or config.get("torch_dtype") or "float32"
    if not difference <= LIMIT.get(stored, LIMIT["float32"]) * largest:
        raise UserError(
            Problem(
                "the merged model",
                f"differs from base and adapter by {difference:.3g} (largest logit {largest:.3g})",
                "nothing was written; report this with the adapter's adapter_config.json",
            )
        )
    return {"difference": difference, "largest": largest}


def model_card(adapter: Path, base: Path, proofs: list[dict[str, Any]]) -> str:
    """README.md of a merged model: what it was trained on, how, to what end, and how exactly it was merged."""
    lines = ["---", "library_name: transformers", "pipeline_tag: image-text-to-text", f"base_model: {base.name}", "---", ""]
    lines += [f"# {base.name}, fine-tuned with LoRA and merged", "", "By qwenvl_ft. Loads with `from_pretrained`.", ""]
    if (adapter / "plan.json").is_file():
        plan = read_model_json(adapter / "plan.json")
        lines += ["## Data", "", f"{plan['used']:,} of {plan['records']:,} records with {plan['pictures']:,} pictures;"
                  f" {plan['tokens']['total']:,} tokens, {plan['taught_tokens']:,} of them taught.", ""]  # fmt: skip
    if (adapter / "all_results.json").is_file():
        lines += ["## Results", "", "```json", (adapter / "all_results.json").read_text(encoding="utf-8").strip(), "```", ""]
    if (adapter / "config.yaml").is_file():
        settings = YAML(typ="safe").load((adapter / "config.yaml").read_text(encoding="utf-8"))
        shown = {key: value for key, value in settings.items() if value is not None and not key.endswith(("_dir", "_file"))}
        lines += ["## Settings", "", "```yaml", *(f"{key}: {value}" for key, value in shown.items()), "```", ""]
    lines += ["## Merge", ""]
    for proof in proofs:
        lines.append(f"On {proof['where']} its logits differ from base and adapter by at most {proof['difference']:.2g} "
                     f"(largest logit {proof['largest']:.1f}).")  # fmt: skip
    if not proofs:
        lines.append("Not compared with base and adapter.")
    return "\n".join(lines) + "\n"
