"""Scores and predictions of `eval`."""

import json

import pytest

from qwenvl_ft.cli.main import main
from qwenvl_ft.data.meta_file import read_records
from qwenvl_ft.evaluate.scoring import evaluate, questions
from qwenvl_ft.infer.engine import Engine
from tests.conftest import SAMPLE, TINY


class Parrot:
    """Answers from a list, and notes what it was asked."""

    def __init__(self, answers):
        self.answers, self.asked = dict(answers), []

    def ask_many(self, conversations, max_new_tokens):
        self.asked += conversations
        return [self.answers[turns[-1].parts[-1]] for turns in conversations]


def test_every_answer_of_a_record_is_a_question_and_an_empty_one_is_wrong(talk, tmp_path):
    records, _, _ = read_records(talk(["How many?", "100", "And of b?", "7", "Name?", "Bee"], ["Empty?", "x"]), tmp_path)
    parrot = Parrot({"How many?": "104", "And of b?": "8", "Name?": " bee", "Empty?": " "})
    scores, predictions = evaluate(parrot, records, 2, 10, lambda done, total: None)
    assert scores == {"questions": 4, "exact_accuracy": 0.25, "relaxed_accuracy": 0.5, "empty_answers": 1}
    assert [(line["where"], line["answer"], line["relaxed"]) for line in predictions] == [
        ("train.json[0].conversations[1]", "104", True), ("train.json[0].conversations[3]", "8", False),
        ("train.json[0].conversations[5]", " bee", True), ("train.json[1].conversations[1]", " ", False),
    ]  # fmt: skip


def test_earlier_turns_stand_as_in_the_record(talk, tmp_path):
    records, _, _ = read_records(talk(["a", "1", "b", "2"]), tmp_path)
    assert [turns for _, turns, _ in questions(records)] == [records[0].turns[:1], records[0].turns[:3]]


def test_blank_pictures_are_white_and_of_the_same_size():
    turns = read_records(SAMPLE / "eval.json", SAMPLE / "images")[0][0].turns[:1]
    seen, blank = (Engine.open(TINY, blank=blank).inputs([turns]) for blank in (False, True))
    assert seen["image_grid_thw"].equal(blank["image_grid_thw"]) and seen["input_ids"].equal(blank["input_ids"])
    assert blank["pixel_values"].unique().numel() <= 3 < seen["pixel_values"].unique().numel()  # one white a colour


def test_the_command_writes_every_prediction(talk, tmp_path, capsys):
    out = tmp_path / "predictions.json"
    with pytest.raises(SystemExit) as done:
        main(["eval", str(TINY), str(talk(["say one", "one"], ["say two", "two"])), "--data-dir", str(tmp_path), "--out", str(out),
              "--max-new-tokens", "8", "--json"])  # fmt: skip
    assert not done.value.code
    scores, predictions = json.loads(capsys.readouterr().out), json.loads(out.read_text())
    assert scores["questions"] == len(predictions) == 2 and scores["predictions"] == str(out)


def test_a_bad_meta_file_stops_the_evaluation(talk, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["eval", str(TINY), str(talk(["<img>no.png</img>x", "one"])), "--data-dir", str(tmp_path)])
    assert stopped.value.code == 1 and "no.png is not in" in capsys.readouterr().err
