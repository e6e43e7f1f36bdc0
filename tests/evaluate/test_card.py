"""The model card: what Hugging Face's own reader finds in its head, what it says, and that nobody's words are overwritten."""

import hashlib
import json
import shutil

import pytest
from huggingface_hub import ModelCard

from qwenvl_ft.board.answers import Answer
from qwenvl_ft.evaluate.card import write_card
from qwenvl_ft.evaluate.table import Column, tabulate

ANSWERS = [("ten", "ten", True), ("a|b [c]", "nine", False), ("x" * 400, "x" * 400, True)]


@pytest.fixture
def folders(tmp_path):
    """An adapter with all that a run and an evaluation leave, and its base, as it was downloaded."""
    adapter, base, meta = tmp_path / "run", tmp_path / "base", tmp_path / "train.json"
    adapter.mkdir(), (base / ".download").mkdir(parents=True)
    meta.write_text("[]")
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# The base\n")
    (base / ".download" / "manifest.json").write_text(json.dumps({"repo": "Qwen/Qwen2-VL-7B-Instruct"}))
    plan = {"records": 12, "used": 11, "pictures": 7, "tokens": {"total": 5000}, "taught_tokens": 900,
            "media_position": {"first": 1200, "last": 0, "mixed": 3, "moved": 0}}  # fmt: skip
    long = {"where": "train.json[3]", "what": "... tokens, a row holds 4096", "fix": "raise row_tokens"}
    results = {"steps": 4, "train_loss": 1.25, "eval_losses": {"4": 1.5}, "skipped": [long, long | {"where": "train.json[5]"}]}
    for name, content in {"plan.json": plan, "all_results.json": results}.items():
        (adapter / name).write_text(json.dumps(content))
    (adapter / "config.yaml").write_text(f"model: /secret/base\ntrain_meta_file: {meta}\nlora_rank: 16\nrun_name:\n")
    predictions = [
        {"where": f"held.json[{n}]", "pictures": ["/home/me/a.png"], "question": "How many?", "wanted": wanted, "answer": answer,
         "cut": False, "exact": right, "relaxed": right} for n, (wanted, answer, right) in enumerate(ANSWERS)
    ]  # fmt: skip
    (adapter / "predictions-held.jsonl").write_text("".join(json.dumps(of) + "\n" for of in predictions))
    table = tabulate([Column("tuned", predictions)], [], 0)
    (adapter / "scores-held.json").write_text(json.dumps({"meta": "held.json", "table": table}))
    return adapter, base


def test_its_head_is_what_hugging_face_and_modelscope_read(folders, tmp_path):
    adapter, base = folders
    assert write_card(adapter, base)
    of_adapter = ModelCard.load(adapter / "README.md").data
    (tmp_path / "merged").mkdir()
    assert write_card(adapter, base, tmp_path / "merged", [{"where": "train.json[0]", "difference": 1e-5, "largest": 20.0}])
    card = ModelCard.load(tmp_path / "merged" / "README.md")
    for data, library, relation in ((of_adapter, "peft", "adapter"), (card.data, "transformers", "finetune")):
        assert (data.library_name, data.base_model, data.license) == (library, "Qwen/Qwen2-VL-7B-Instruct", "apache-2.0")
        assert data.base_model_relation == relation and data.tasks == ["image-text-to-text"] == [data.pipeline_tag]
        found = {of.metric_type: of.metric_value for of in data.eval_results}
        assert found == {"relaxed": 0.6667, "exact": 0.6667} and data.eval_results[0].dataset_name == "held.json"
    assert "by at most 1e-05 (largest logit 20.0)" in card.text


def test_it_says_what_was_taught_how_and_with_what_success_and_no_path(folders):
    adapter, base = folders
    write_card(adapter, base)
    text = (adapter / "README.md").read_text()
    assert "11 of 12 records with 7 pictures; 5,000 tokens, 900 of them taught." in text
    one_way = "Of the records read, 1,200 show pictures and videos first, 0 the text, 3 mix them. Asked the other way round, it may"
    assert one_way in text
    assert f"* train.json, sha256 {hashlib.sha256(b'[]').hexdigest()}" in text
    assert "4 steps, loss 1.2500 a taught token over the run; held-out loss at step 4: 1.5000." in text
    assert "Records were left out for 2 problems, which all_results.json lists." in text and "break" not in text
    assert "lora_rank: 16" in text and "run_name" not in text
    assert "| a.png | How many? | ten | ten | right |" in text and r"| a\|b \[c\] | nine | wrong |" in text
    assert "x" * 160 + " ..." in text and "x" * 161 not in text
    assert "## Scores on held.json" in text and "95 %" in text
    assert "/secret" not in text and "/home/me" not in text and str(adapter.parent) not in text


def test_an_answer_is_right_where_the_board_has_it_right(folders):
    adapter, base = folders
    boxes = {"where": "held.json[0]", "pictures": [], "question": "Where?", "wanted": "(1,2)", "cut": False, "exact": False}
    predictions = [
        boxes | {"answer": "near", "relaxed": False, "iou": [0.99]},
        boxes | {"answer": "far", "relaxed": True, "iou": [0.1]},
    ]
    (adapter / "predictions-held.jsonl").write_text("".join(json.dumps(of) + "\n" for of in predictions))
    write_card(adapter, base)
    text = (adapter / "README.md").read_text()
    assert "| near | right |" in text and "| far | wrong |" in text
    assert [Answer("", 0, of).right for of in predictions] == [True, False]


def test_it_is_written_anew_until_somebody_changes_it(folders):
    adapter, base = folders
    write_card(adapter, base)
    before = (adapter / "README.md").read_text()
    (adapter / "scores-held.json").unlink()
    assert write_card(adapter, base) and "Scores" in before and "Scores" not in (adapter / "README.md").read_text()
    changed = before.replace("not stated. Write it here", "CC BY 4.0")
    (adapter / "README.md").write_text(changed)
    assert not write_card(adapter, base) and (adapter / "README.md").read_text() == changed
    (adapter / "README.md").write_text("# My own\n")
    assert not write_card(adapter, base)


def test_a_checkpoint_has_the_scores_of_its_own_and_the_plan_of_its_run(folders):
    adapter, base = folders
    (adapter / "preprocessor_config.json").write_text("{}")
    checkpoint = adapter / "checkpoint-4"
    checkpoint.mkdir()
    shutil.move(adapter / "scores-held.json", checkpoint)
    write_card(checkpoint, base)
    text = (checkpoint / "README.md").read_text()
    assert "11 of 12 records" in text and "## Scores on held.json" in text and "## Answers on" not in text
