"""One training process of bench_train.py: runs a toolkit's own entry point and writes what was really trained, a JSON line a step.

    ENVIRONMENT/bin/python scripts/bench_train_probe.py JOB.json

It needs nothing but what is in the toolkit's environment. Counted inside the model itself: tokens that the language model is
given (padding apart) and patches that the vision tower is given, so a toolkit that leaves out a picture is found out.
"""

import functools
import importlib.util
import json
import os
import sys
import time
from importlib.abc import MetaPathFinder
from importlib.metadata import version
from pathlib import Path

MODELING = "transformers.models.qwen2_vl.modeling_qwen2_vl"
IGNORE = -100


def tree(top: int) -> list[int]:
    """A process and all below it."""
    parents = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            parents[int(name)] = int(Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has just ended
            continue
    found = [top]
    for above in found:  # grows on the way
        found += [number for number, parent in parents.items() if parent == above]
    return found


def cpu_seconds() -> float:
    """User and system, of this process and all below it, those that have ended among them."""
    ticks = 0
    for number in tree(os.getpid()):
        try:
            ticks += sum(map(int, Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[11:15]))
        except OSError:
            continue
    return ticks / os.sysconf("SC_CLK_TCK")


class Counts:
    """What one step comes to. `summed` is the cross entropy over taught tokens; `optimized` the value that went backward.

    `layers` (of the language model) and `blocks` (of the tower) are to be run; with recomputing, twice as many runs are counted.
    """

    def __init__(self, file: Path):
        self.file, self.begun = file, False
        self.clear()

    def clear(self) -> None:
        self.tokens = self.padding = self.patches = self.taught = 0
        self.layers = self.layer_runs = self.blocks = self.block_runs = 0
        self.summed = self.optimized = 0.0

    def begin(self) -> None:
        """The first forward pass: what comes before is the start."""
        if not self.begun:
            self.begun = True
            self.write()

    def write(self, **counted: object) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps({"cpu": cpu_seconds(), "wall": time.time()} | counted) + "\n")


def watch(counts: Counts, modeling: object) -> None:
    """Counts in the classes, so that whoever builds a model from them is counted."""
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    def wrap(holder: object, name: str, before=None, after=None) -> None:
        stock = getattr(holder, name)

        @functools.wraps(stock)
        def wrapped(*args, **kwargs):
            if before:
                before(*args, **kwargs)
            result = stock(*args, **kwargs)
            if after:
                after(result, *args, **kwargs)
            return result

        setattr(holder, name, wrapped)

    def language(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None, **_):
        counts.begin()
        rows, length = (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]
        plain = isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2
        real = int((attention_mask != 0).sum()) if plain else rows * length
        counts.tokens += real
        counts.padding += rows * length - real
        counts.layers += len(self.layers)

    def vision(self, hidden_states, *args, **kwargs):
        counts.begin()
        counts.patches += len(hidden_states)
        counts.blocks += len(self.blocks)

    def layer(*args, **named):
        counts.layer_runs += 1

    def block(*args):
        counts.block_runs += 1

    def entropy(loss, input, target, weight=None, size_average=None, ignore_index=IGNORE, reduce=None, reduction="mean", **_):
        taught = int((target != ignore_index).sum())
        counts.taught += taught
        counts.summed += float(loss.detach().sum()) * (taught if reduction == "mean" else 1) if taught else 0.0

    def backward(loss, *args, **kwargs):
        counts.optimized += float(loss.detach())

    wrap(modeling.Qwen2VLTextModel, "forward", before=language)
    wrap(modeling.Qwen2VisionTransformerPretrainedModel, "forward", before=vision)
    # A layer's own forward is left alone: transformers does not recompute one that was replaced.
    wrap(modeling.Qwen2VLAttention, "forward", before=layer)
    wrap(modeling.VisionMlp, "forward", before=block)
    wrap(torch.nn.functional, "cross_entropy", after=entropy)
    wrap(torch.Tensor, "backward", before=backward)

    def stepped(optimizer, *_):
        trained = sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"])
        counted = {key: value for key, value in vars(counts).items() if key not in ("file", "begun")}
        counts.write(**counted, trained=trained, torch=version("torch"), transformers=version("transformers"))
        counts.clear()

    register_optimizer_step_post_hook(stepped)


class Watching(MetaPathFinder):
    """Watches as soon as the model's module is imported: what a toolkit does before that stays as it is."""

    def __init__(self, counts: Counts):
        self.counts = counts

    def find_spec(self, name, path, target=None):
        if name != MODELING:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        stock = spec.loader.exec_module

        def exec_module(module):
            stock(module)
            watch(self.counts, module)

        spec.loader.exec_module = exec_module
        return spec


# The toolkits: each is given its own settings.


def ours(job: dict, counts: Counts) -> None:
    from qwenvl_ft.cli.main import main
    from qwenvl_ft.train import setup

    def measured(*args, stock=setup.keep_what_fits):
        """Its forward pass decides what is recomputed and trains on nothing: it belongs to the start."""
        counts.begun = True
        kept = stock(*args)
        counts.clear()
        counts.begun = False
        return kept

    setup.keep_what_fits = measured
    Path("empty.yaml").write_text("seed: 42\n")
    main(["train", "--config", "empty.yaml", *(f"{key}={value}" for key, value in job["settings"].items())])


def llamafactory(job: dict, counts: Counts) -> None:
    columns = {"messages": "messages", "images": "images"}
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    about = {"file_name": job["records"], "formatting": "sharegpt", "columns": columns, "tags": tags}
    Path("dataset_info.json").write_text(json.dumps({"records": about}))
    from llamafactory.train.tuner import run_exp

    run_exp(job["settings"])


def ms_swift(job: dict, counts: Counts) -> None:
    from swift.pipelines import sft_main
    from swift.template.templates.qwen import Qwen2VLTemplate

    # It has the id of the published vocabulary; with another one it trains on one token a picture, without a word.
    Qwen2VLTemplate.image_token_id = json.loads(Path(job["model"], "config.json").read_text())["image_token_id"]
    sft_main([word for key, value in job["settings"].items() for word in (f"--{key}", str(value))])


def trl(job: dict, counts: Counts) -> None:
    from datasets import Dataset, Image, List
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    class Counted(SFTTrainer):
        """Its head computes the loss by itself, so the taught tokens are counted here."""

        def compute_loss(self, model, inputs, *args, **kwargs):
            counts.taught += int((inputs["labels"][:, 1:] != IGNORE).sum())
            return super().compute_loss(model, inputs, *args, **kwargs)

    records = json.loads(Path(job["records"]).read_text())
    for record in records:  # it puts the picture before the text by itself
        record["messages"] = [turn | {"content": turn["content"].removeprefix("<image>")} for turn in record["messages"]]
    data = Dataset.from_list(records).cast_column("images", List(Image()))
    config = SFTConfig(**job["settings"])
    Counted(job["model"], args=config, train_dataset=data, peft_config=LoraConfig(**job["lora"], task_type="CAUSAL_LM")).train()


def recipe(job: dict, counts: Counts) -> None:
    """As QwenLM's qwen-vl-finetune does it: a lazy dataset, records padded to the longest, transformers.Trainer."""
    import torch
    from peft import LoraConfig, get_peft_model
    from PIL import Image
    from torch.nn.utils.rnn import pad_sequence
    from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

    processor = AutoProcessor.from_pretrained(job["model"])
    records = json.loads(Path(job["records"]).read_text())

    class Lazy(torch.utils.data.Dataset):
        def __len__(self):
            return len(records)

        def __getitem__(self, number):
            images, messages = records[number]["images"], []
            for turn in records[number]["messages"]:
                shown = [{"type": "image"}] * turn["content"].startswith("<image>")
                messages.append(turn | {"content": [*shown, {"type": "text", "text": turn["content"].removeprefix("<image>")}]})
            opened = [Image.open(path).convert("RGB") for path in images] or None
            texts = [
                processor.apply_chat_template(messages),
                processor.apply_chat_template(messages[:1], add_generation_prompt=True),
            ]
            whole = processor(text=texts[:1], images=opened, return_tensors="pt")
            asked = len(processor.tokenizer(texts[1])["input_ids"]) - len(processor.tokenizer(texts[0])["input_ids"])
            whole["labels"] = whole["input_ids"].clone()
            whole["labels"][:, :asked] = IGNORE  # negative: all but the answer
            whole["labels"][:, -1] = IGNORE  # the newline behind it, which ours does not teach: so their losses are comparable
            return whole

    def join(examples):
        ends = {"input_ids": processor.tokenizer.pad_token_id, "labels": IGNORE, "attention_mask": 0, "mm_token_type_ids": 0}
        batch = {
            key: pad_sequence([example[key][0] for example in examples], batch_first=True, padding_value=end)
            for key, end in ends.items() if key in examples[0]
        }  # fmt: skip
        for key in ("pixel_values", "image_grid_thw"):
            if any(key in example for example in examples):
                batch[key] = torch.cat([example[key] for example in examples if key in example])
        return batch

    model = AutoModelForImageTextToText.from_pretrained(job["model"], dtype=torch.float32, attn_implementation="sdpa")
    model.config.use_cache = False
    model.enable_input_require_grads()
    model = get_peft_model(model, LoraConfig(**job["lora"], task_type="CAUSAL_LM"))
    Trainer(model, TrainingArguments(**job["settings"]), join, Lazy()).train()


TOOLKITS = {"ours": ours, "ms-swift": ms_swift, "llamafactory": llamafactory, "trl": trl, "recipe": recipe}


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    sys.path.pop(0)  # of this folder, whose names are not a toolkit's
    sys.argv = sys.argv[:1]
    counts = Counts(Path(job["lines"]))
    sys.meta_path.insert(0, Watching(counts))
    TOOLKITS[job["toolkit"]](job, counts)


if __name__ == "__main__":
    main()
