"""The model card, README.md beside an adapter or a merged model: what was taught, how, to what end, and how to use it.

Its head is what Hugging Face and ModelScope read. All of it is taken from what lies in the run's folder, so it can be written anew
after every evaluation; one that somebody has changed is left alone.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData, metadata_load

from qwenvl_ft.config import read_yaml
from qwenvl_ft.evaluate.overlap import is_right
from qwenvl_ft.evaluate.table import markdown
from qwenvl_ft.folders.adapter import quantization_of
from qwenvl_ft.folders.model import read_model_json
from qwenvl_ft.folders.runs import run_folder_of
from qwenvl_ft.folders.whole import sha256

CARD, SCORES = "README.md", "scores-{}.json"
EXAMPLES = 3  # of right answers, and of wrong ones
LONGEST = 160  # characters of a question or an answer
SEAL = re.compile(r"\n<!-- written by qwenvl_ft: ([0-9a-f]{16}); changed by hand, it is left alone -->\n$")


def write_card(adapter: Path, base: Path, merged: Path | None = None, proofs: Sequence[dict[str, Any]] = ()) -> bool:
    """Writes the card into the adapter's folder, or that of the `merged` model, whose merge has `proofs`. False where one is that
    was changed."""
    folder = merged or adapter
    place = folder / CARD
    if place.is_file():
        there = place.read_text(encoding="utf-8")
        seal = SEAL.search(there)
        if not seal or _hash(there[: seal.start()]) != seal[1]:
            return False
    text = card_of(adapter, base, proofs if merged else None)
    aside = folder / f".{CARD}"
    aside.write_text(f"{text}\n<!-- written by qwenvl_ft: {_hash(text)}; changed by hand, it is left alone -->\n", encoding="utf-8")
    aside.replace(place)
    return True


def card_of(adapter: Path, base: Path, proofs: Sequence[dict[str, Any]] | None) -> str:
    """The card's text: of a merged model with `proofs`, else of an adapter."""
    origin, merged, run = _origin(base), proofs is not None, run_folder_of(adapter)
    scores = {path.stem.partition("-")[2]: read_model_json(path) for path in sorted(adapter.glob(SCORES.format("*")))}
    title = f"{origin.rpartition('/')[2]}, fine-tuned with LoRA" + " and merged" * merged
    parts = [
        f"---\n{_metadata(origin, base, [*scores.values()], merged, title)}\n---\n",
        f"# {title}\n",
        _use(origin, merged),
        _data(run),
    ]
    for name, of in scores.items():
        parts += [_scored(of), _examples(adapter / f"predictions-{name}.jsonl")]
    parts += [_training(run), _merge(proofs, quantization_of(adapter)) if proofs is not None else ""]
    return "\n".join(part for part in parts if part)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _origin(base: Path) -> str:
    """The base's name where it was downloaded from, or that of its folder."""
    record = base / ".download" / "manifest.json"
    return str(read_model_json(record).get("repo", base.name)) if record.is_file() else base.resolve().name


def _metadata(origin: str, base: Path, scores: Sequence[dict[str, Any]], merged: bool, title: str) -> str:
    """YAML: what Hugging Face reads, and `frameworks`, `tasks` and `domain`, which ModelScope reads."""
    readme = base / CARD
    said = (metadata_load(readme) or {}) if readme.is_file() else {}
    results = [
        EvalResult(
            task_type="image-text-to-text", dataset_type=of["meta"], dataset_name=of["meta"], metric_type=row["metric"],
            metric_name=row["metric"], metric_value=round(row["value"], 4),
        )
        for of in scores
        for row in of["table"]["rows"]
        if row["value"] is not None
    ]  # fmt: skip
    data = ModelCardData(
        base_model=origin, library_name="transformers" if merged else "peft", pipeline_tag="image-text-to-text",
        license=said.get("license"), license_link=said.get("license_link"), license_name=said.get("license_name"),
        tags=["lora", "qwen-vl", "qwenvl_ft"], model_name=title if results else None, eval_results=results or None,
        base_model_relation="finetune" if merged else "adapter",
        frameworks=["Pytorch"], tasks=["image-text-to-text"], domain=["multi-modal"],
    )  # fmt: skip
    return str(data.to_yaml())


def _use(origin: str, merged: bool) -> str:
    if merged:
        return f"""A whole model: base {origin} and adapter in one. Made with qwenvl_ft.

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model, processor = AutoModelForImageTextToText.from_pretrained("."), AutoProcessor.from_pretrained(".")
```

`vllm serve .` and `qwenvl-ft serve .` answer OpenAI's clients.
"""
    return f"""A LoRA adapter for {origin}. Made with qwenvl_ft.

```python
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained("{origin}"), ".")
processor = AutoProcessor.from_pretrained(".")  # with the limits of pixels and the chat template that it was trained with
```

`qwenvl-ft serve BASE --adapter .` answers OpenAI's clients, `qwenvl-ft export --adapter . --out DIR` merges it into its base.
"""


def _data(run: Path) -> str:
    """What was taught: counts, and the sha256 of each file that is still there."""
    if not (run / "plan.json").is_file():
        return ""
    plan = read_model_json(run / "plan.json")
    lines = [
        "## Data\n", f"{plan['used']:,} of {plan['records']:,} records with {plan['pictures']:,} pictures; "
        f"{plan['tokens']['total']:,} tokens, {plan['taught_tokens']:,} of them taught.",
    ]  # fmt: skip
    if any((sides := plan.get("media_position", {})).values()):
        first, last, mixed = (sides[name] for name in ("first", "last", "mixed"))
        lines.append(f"Of the records read, {first:,} show pictures and videos first, {last:,} the text, {mixed:,} mix them."
                     + " Asked the other way round, it may answer much worse." * (not (first and last)))  # fmt: skip
    named = _settings(run).get("train_meta_file") or []
    for name in [named] if isinstance(named, str) else [of["file"] for of in named]:
        known = f", sha256 {sha256(Path(name))}" if Path(name).is_file() else ""
        lines.append(f"* {Path(name).name}{known}")
    return "\n".join([*lines, "", "Licence of the data: not stated. Write it here.", ""])


def _scored(scores: dict[str, Any]) -> str:
    deeper = re.sub(r"^(#+) ", r"\1## ", markdown(scores["table"]), flags=re.MULTILINE)
    return f"## Scores on {scores['meta']}\n\n{deeper}"


def _examples(predictions: Path) -> str:
    """Some answers that are right, and some that are wrong."""
    if not predictions.is_file():
        return ""
    lines = [json.loads(line) for line in predictions.read_text(encoding="utf-8").splitlines()]
    chosen = [*[of for of in lines if is_right(of)][:EXAMPLES], *[of for of in lines if not is_right(of)][:EXAMPLES]]
    if not chosen:
        return ""
    rows = [
        f"## Answers on {predictions.stem.partition('-')[2]}\n",
        "| picture | question | wanted | answered | |",
        "|---|---|---|---|---|",
    ]
    for of in chosen:
        pictures = ", ".join(Path(name).name for name in of["pictures"])
        cells = (pictures, of["question"], of["wanted"], of["answer"], "right" if is_right(of) else "wrong")
        rows.append("| " + " | ".join(map(_cell, cells)) + " |")
    return "\n".join([*rows, ""])


def _cell(text: str) -> str:
    """A text in a table of Markdown, as it stands."""
    short = text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."
    return re.sub(r"([\\`*_<>|\[\]])", r"\\\1", " ".join(short.split()))


def _training(run: Path) -> str:
    lines = ["## Training\n"]
    if (run / "all_results.json").is_file():
        results = read_model_json(run / "all_results.json")
        held_out = [f"step {step}: {loss:.4f}" for step, loss in results["eval_losses"].items()]
        lines.append(f"{results['steps']:,} steps, loss {results['train_loss']:.4f} a taught token over the run"
                     + f"; held-out loss at {', '.join(held_out[-3:])}" * bool(held_out) + ".")  # fmt: skip
        if num := len(results["skipped"]):  # of a record there may be several, and one may be that of a whole file
            lines.append(f"Records were left out for {num:,} problem{'s' * (num != 1)}, which all_results.json lists.")
    shown = {
        key: value for key, value in _settings(run).items()
        if value is not None and key != "model" and not key.endswith(("_dir", "_file"))
    }  # fmt: skip
    if shown:
        lines += ["", "```yaml", *(f"{key}: {json.dumps(value)}" for key, value in shown.items()), "```"]
    return "\n".join([*lines, ""]) if len(lines) > 1 else ""


def _settings(run: Path) -> dict[str, Any]:
    return read_yaml(run / "config.yaml")[0] if (run / "config.yaml").is_file() else {}


def proven(proof: dict[str, Any]) -> str:
    """What the proof of a merge found on a record, in words; where the base was quantized in training, also what it was not merged
    into."""
    said = f"on {proof['where']} its logits differ from base and adapter"
    said += (
        f"{' as they trained' * ('unrounded' in proof)} by at most {proof['difference']:.2g} (largest logit {proof['largest']:.1f})"
    )
    return said + (f", those of the adapter on the base as it is by {proof['unrounded']:.2g}" if "unrounded" in proof else "")


def _merge(proofs: Sequence[dict[str, Any]], quantization: str) -> str:
    lines = [f"{said[0].upper()}{said[1:]}." for said in map(proven, proofs)] or ["Not compared with base and adapter."]
    if quantization != "none":
        held = f"Attention and MLP of the language model were held in {quantization} while it trained"
        lines = [f"{held}; here they are what they stood for then, with the adapter, in the base's own dtype.", "", *lines]
    return "\n".join(["## Merge\n", *lines, ""])
