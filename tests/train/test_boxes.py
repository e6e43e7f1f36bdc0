"""A tiny model is trained on boxes of the first Qwen-VL, answers boxes, and eval scores them in px of the pictures."""

import json
import shutil

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from qwenvl_ft.cli.main import main
from tests.conftest import TINY
from tests.runs import run

BARS = {"left.png": (20, 24, 60, 96), "right.png": (100, 12, 160, 60)}  # px of 200 x 120
QUESTION = "Find <ref>the bar</ref>."


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with the model, its run, two pictures and the meta-file."""
    folder = tmp_path_factory.mktemp("boxes")
    shutil.copytree(TINY, folder / "model")
    weights, tokenizer = load_file(TINY / "model.safetensors"), Tokenizer.from_file(str(TINY / "tokenizer.json"))
    rows = weights["model.embed_tokens.weight"]
    generator = torch.Generator().manual_seed(0)
    for token in ("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "(", ")"):
        # The tiny base has never seen them, and their rows are all alike: LoRA does not train these.
        row = torch.randn(rows.shape[1], generator=generator) * 1.7 / rows.shape[1] ** 0.5
        rows[tokenizer.token_to_id(token)] = row.to(rows.dtype)
    save_file(weights, folder / "model" / "model.safetensors", metadata={"format": "pt"})
    records = []
    for name, (left, top, right, bottom) in BARS.items():
        picture = Image.new("RGB", (200, 120), "white")
        ImageDraw.Draw(picture).rectangle((left, top, right, bottom), fill="black")
        picture.save(folder / name)
        box = f"<box>({left * 5},{round(top / 0.12)}),({right * 5},{round(bottom / 0.12)})</box>"
        texts = [f"<img>{name}</img>\n{QUESTION}", f"<ref>the bar</ref>{box}"]
        turns = [{"from": of, "value": text} for of, text in zip(("user", "assistant"), texts, strict=True)]
        records.append({"conversations": turns})
    (folder / "train.json").write_text(json.dumps(records))
    run(
        folder, model=folder / "model", train_meta_file=folder / "train.json", train_data_dir=folder, max_steps=28,
        learning_rate=7e-3, lora_rank=16, lora_alpha=32, warmup_ratio=0.0, max_pixels=40 * 28 * 28,
    )  # fmt: skip
    return folder


def said(capsys, *arguments):
    with pytest.raises(SystemExit) as done:
        main([*map(str, arguments)])
    assert not done.value.code
    return json.loads(capsys.readouterr().out)


def test_eval_scores_the_boxes_that_it_answers(trained, capsys):
    out = trained / "predictions.jsonl"
    command = ["eval", trained / "model", trained / "train.json", "--data-dir", trained, "--max-new-tokens", "40", "--json"]
    scores = said(capsys, *command, "--out", out, "--adapter", trained / "run")
    assert (scores["wanted_boxes"], scores["answered_boxes"]) == (2, 2)
    assert scores["mean_iou"] > 0.8 and scores["iou_at_50"] == 1
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    for line, bar in zip(lines, BARS.values(), strict=True):
        assert line["iou"][0] > 0.8 and line["wanted_boxes"][0]["bbox_2d"] == pytest.approx(bar, abs=0.2)
        assert line["answer"].startswith("<|object_ref_start|>the bar<|object_ref_end|><|box_start|>(")
        assert line["boxes"][0]["bbox_2d"] == pytest.approx(bar, abs=12) and line["boxes"][0]["label"] == "the bar"
    base = said(capsys, *command, "--out", trained / "of_the_base.jsonl")
    assert (base["wanted_boxes"], base["answered_boxes"], base["mean_iou"], base["iou_at_50"]) == (2, 0, 0, 0)


def test_numbers_of_boxes_are_what_they_were_to_the_run_unless_said_otherwise(trained, capsys):
    """A file in px like the run's own was scored as thousandths, near 0, where --config was left out."""
    records = json.loads((trained / "train.json").read_text())
    for record, bar in zip(records, BARS.values(), strict=True):
        record["conversations"][1]["value"] = json.dumps([{"bbox_2d": list(bar), "label": "the bar"}])
    (trained / "px.json").write_text(json.dumps(records))
    run_in_px = shutil.copytree(trained / "run", trained / "in_px")
    settings = (run_in_px / "config.yaml").read_text()
    (run_in_px / "config.yaml").write_text(settings.replace("\nboxes:\n", "\nboxes: pixels\n"))
    command = ["eval", trained / "model", trained / "px.json", "--data-dir", trained, "--max-new-tokens", "40", "--json"]
    out = trained / "px.jsonl"

    def wanted(*settings):
        out.unlink(missing_ok=True)
        said(capsys, *command, "--out", out, "--adapter", *settings)
        return [[box["bbox_2d"] for box in json.loads(line).get("wanted_boxes", [])] for line in out.read_text().splitlines()]

    in_px = [[pytest.approx(bar, abs=0.2)] for bar in BARS.values()]
    assert wanted(run_in_px) == in_px
    assert wanted(trained / "run") != in_px and wanted(run_in_px, "--boxes", "thousand") != in_px


def test_ask_gives_the_boxes_to_programs_in_px_of_the_picture(trained, capsys):
    question = "Find <|object_ref_start|>the bar<|object_ref_end|>."
    model = [trained / "model", "--adapter", trained / "run", "--max-new-tokens", "40"]
    picture = trained / "right.png"
    answer = said(capsys, "ask", *model, "--image", picture, question, "--json")
    assert answer["cut"] is False and answer["answer"].endswith("<|box_end|>")
    (box,) = answer["boxes"]
    assert (box["label"], box["picture"]) == ("the bar", 0)
    numbers = [int(number) for pair in answer["answer"].split("(")[1:] for number in pair.split(")")[0].split(",")]
    assert box["bbox_2d"] == pytest.approx(
        [number * side / 1000 for number, side in zip(numbers, (200, 120) * 2, strict=True)], abs=0.06
    )

    messages = [{"role": "user", "content": [{"image": str(picture)}, {"text": question}]}]
    (trained / "asked.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    with pytest.raises(SystemExit):
        main([*map(str, ["ask", *model, "--jsonl", trained / "asked.jsonl", "--out", trained / "answers.jsonl"])])
    assert json.loads((trained / "answers.jsonl").read_text())["boxes"] == answer["boxes"]
