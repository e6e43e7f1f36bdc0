"""What is claimed of the tiny base and of the sample."""

import json
import sys

import pytest

from qwenvl_ft.data.meta_file import read_records
from qwenvl_ft.infer.engine import Engine
from tests.conftest import ROOT, SAMPLE, TINY
from tests.tiny import CONTROL_TOKENS

DOCUMENTED = [
    ["As of 2021, how many championship titles had Ferrari won? Answer the question using a single word or phrase.", "16",
     "As of 2021, how many championship titles had Ferrari won?", "As of 2021, Ferrari had won 16 championship titles."],
    ["What game topped the charts with 512.3 million hours watched on Twitch in the first half of 2019? Answer the question using "
     "a single word or phrase.", "League of Legends",
     "What game topped the charts with 512.3 million hours watched on Twitch in the first half of 2019?",
     "The game that topped the charts with 512.3 million hours watched on Twitch in the first half of 2019 is League of Legends.",
     "How many hours did League of Legends watch on Twitch in the first half of 2019? Answer the question using a single word or "
     "phrase.", "512.3",
     "How many hours did League of Legends watch on Twitch in the first half of 2019?",
     "In the first half of 2019, League of Legends was watched for a total of 512.3 hours on Twitch."],
]  # fmt: skip


def test_it_is_small_and_has_qwens_control_tokens_and_a_head_that_vllm_takes():
    config = json.loads((TINY / "config.json").read_text())
    tokenizer = json.loads((TINY / "tokenizer.json").read_text())
    tokens = set(tokenizer["model"]["vocab"]) | {token["content"] for token in tokenizer["added_tokens"]}
    assert config["model_type"] == "qwen2_vl" and len(tokens) <= 2000 and set(CONTROL_TOKENS) <= tokens
    assert sum(path.stat().st_size for path in TINY.glob("*.safetensors")) <= 10_000_000
    text = config["text_config"]
    assert text["hidden_size"] // text["num_attention_heads"] == 64


def test_it_reads_charts_that_it_has_never_seen_and_looks_up_values_and_names():
    """data/tiny/training.json has the accuracy on 120 of them."""
    sys.path.insert(0, str(ROOT / "scripts"))
    from make_tiny_model import Charts, accuracy

    claimed = json.loads((TINY / "training.json").read_text())["accuracy_on_unseen_charts"]
    engine = Engine.open(TINY)
    measured = accuracy(engine.model, engine.processor, Charts(12345), 4)
    assert all(claimed[kind] > 0.7 and measured[kind] > claimed[kind] - 0.2 for kind in ("rows", "find_value", "find_name"))


def test_it_does_not_know_the_style_of_the_samples_answers():
    record = read_records(SAMPLE / "train.json", SAMPLE / "images")[0][0]
    assert Engine.open(TINY).ask(record.turns[:1], max_new_tokens=20) != "16"


def test_the_documented_records_stand_in_the_sample_word_for_word():
    records = json.loads((SAMPLE / "train.json").read_text())
    for name, texts, record in zip(["two_col_103562.png", "two_col_2954.png"], DOCUMENTED, records, strict=False):
        said = [turn["value"] for turn in record["conversations"]]
        assert said == [f"<img>{name}</img>\n{texts[0]}", *texts[1:]]


def test_the_sample_has_what_the_readme_says():
    train, held_out = (read_records(SAMPLE / f"{split}.json", SAMPLE / "images")[0] for split in ("train", "eval"))
    assert len(train) >= 120 and len(held_out) >= 60
    seen, asked = ({picture.source for record in records for picture in record.pictures} for records in (train, held_out))
    assert not seen & asked
    in_first = [sum(not isinstance(part, str) for part in record.turns[0].parts) for record in train]
    assert 0 in in_first and 2 in in_first
    assert any(not isinstance(part, str) for record in train for turn in record.turns[1:] for part in turn.parts)


@pytest.mark.parametrize("split", ["train", "eval"])
def test_drawing_the_sample_again_gives_the_same_meta_files(split, tmp_path, monkeypatch):
    sys.path.insert(0, str(ROOT / "scripts"))
    import draw_sample

    monkeypatch.setattr(sys, "argv", ["draw_sample.py", "--out", str(tmp_path)])
    draw_sample.main()
    assert (tmp_path / f"{split}.json").read_bytes() == (SAMPLE / f"{split}.json").read_bytes()
    for path in (SAMPLE / "images").iterdir():
        assert path.read_bytes() == (tmp_path / "images" / path.name).read_bytes()
