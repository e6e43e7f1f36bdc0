"""Scores and predictions of `eval`."""

import json
import shutil

import pytest

from qwenvl_ft.cli.main import main
from qwenvl_ft.data.meta_file import read_records
from qwenvl_ft.data.records import Record, Turn
from qwenvl_ft.errors import UserError
from qwenvl_ft.evaluate.controls import shown_by
from qwenvl_ft.evaluate.scoring import questions, score
from qwenvl_ft.infer.engine import Answer, Engine
from tests.conftest import SAMPLE, TINY
from tests.evaluate.asking import predictions_of


class Parrot:
    """Answers from a list, and notes what it was asked."""

    chat = None

    def __init__(self, answers):
        self.answers, self.asked = dict(answers), []

    def answer_many(self, conversations, max_new_tokens):
        self.asked += conversations
        return [Answer(answer := self.answers[record.turns[-1].parts[-1]], answer == "cut") for record in conversations]


def test_every_answer_of_a_record_is_a_question_and_an_empty_one_is_wrong(talk, tmp_path):
    records, _, _ = read_records(talk(["How many?", "100", "And of b?", "7", "Name?", "Bee"], ["Empty?", "x"]), tmp_path)
    parrot = Parrot({"How many?": "104", "And of b?": "8", "Name?": " bee", "Empty?": " "})
    predictions = predictions_of(parrot, records, 2)
    assert score(predictions) == {
        "questions": 4,
        "exact_accuracy": 0.25,
        "relaxed_accuracy": 0.5,
        "empty_answers": 1,
        "cut_answers": 0,
    }
    assert [(line["where"], line["answer"], line["relaxed"]) for line in predictions] == [
        ("train.json[0].conversations[1]", "104", True), ("train.json[0].conversations[3]", "8", False),
        ("train.json[0].conversations[5]", " bee", True), ("train.json[1].conversations[1]", " ", False),
    ]  # fmt: skip


def test_earlier_turns_stand_as_in_the_record(talk, tmp_path):
    records, _, _ = read_records(talk(["a", "1", "b", "2"]), tmp_path)
    assert [record.turns for record, _ in questions(records)] == [records[0].turns[:1], records[0].turns[:3]]


def test_an_answer_that_is_not_to_be_learnt_is_not_asked_for():
    turns = (Turn("user", ("a",)), Turn("assistant", ("1",), taught=False), Turn("user", ("b",)), Turn("assistant", ("2",)))
    assert [record.where for record, _ in questions([Record("r", turns)])] == ["r.conversations[3]"]


def test_a_thought_before_an_answer_is_not_part_of_it(talk, tmp_path):
    records, _, _ = read_records(talk(["How many?", "<think>\nI count.\n</think>\n\n7"], ["Name?", "Bee"]), tmp_path)
    parrot = Parrot({"How many?": "<think>\nwell\n</think>\n\n7", "Name?": "<think>\nBee"})
    predictions = predictions_of(parrot, records, 2)
    assert [line["exact"] for line in predictions] == [True, False]


def test_blank_pictures_are_white_and_of_the_same_size():
    (record, _), *_ = questions(read_records(SAMPLE / "eval.json", SAMPLE / "images")[0])
    engine = Engine.open(TINY)
    seen, blank = (engine.inputs([shown]) for shown in (record, shown_by("blank", [record], 0)(record)))
    assert seen["image_grid_thw"].equal(blank["image_grid_thw"]) and seen["input_ids"].equal(blank["input_ids"])
    assert blank["pixel_values"].unique().numel() <= 3 < seen["pixel_values"].unique().numel()  # one white a colour


def test_the_command_writes_every_prediction(talk, tmp_path, capsys):
    out = tmp_path / "predictions.json"
    with pytest.raises(SystemExit) as done:
        main(["eval", str(TINY), str(talk(["say one", "one"], ["say two", "two"])), "--data-dir", str(tmp_path), "--out", str(out),
              "--max-new-tokens", "8", "--json"])  # fmt: skip
    assert not done.value.code
    scores, predictions = json.loads(capsys.readouterr().out), lines_of(out)
    assert scores["questions"] == len(predictions) == 2 and scores["predictions"] == str(out)
    assert [line["where"] for line in predictions] == ["train.json[0].conversations[1]", "train.json[1].conversations[1]"]


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def eight(talk, tmp_path):
    records, _, _ = read_records(talk(*([f"{'long ' * (8 - number)}{number}", str(number)] for number in range(8))), tmp_path)
    return records, {record.turns[0].text: record.turns[1].text for record in records}


def test_a_kill_loses_no_answer_and_a_second_run_goes_on(talk, tmp_path):
    """Every prediction was written at the end, so a kill after an hour lost the hour."""
    records, answers = eight(talk, tmp_path)
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    predictions_of(Parrot(answers), records, 2, out=whole)

    class Killed(Parrot):
        def answer_many(self, conversations, max_new_tokens):
            if len(self.asked) == 6:
                raise KeyboardInterrupt
            return super().answer_many(conversations, max_new_tokens)

    with pytest.raises(KeyboardInterrupt):
        predictions_of(Killed(answers), records, 2, out=out)
    assert len(lines_of(out)) == 6
    out.write_text(out.read_text()[:-5])  # the last line torn
    second = Parrot(answers)
    predictions = predictions_of(second, records, 2, out=out)
    assert len(second.asked) == 3 and score(predictions)["relaxed_accuracy"] == 1
    assert lines_of(out) == predictions == lines_of(whole), "in the meta-file's order at the end"
    assert predictions_of(third := Parrot({}), records, 2, out=out) == predictions and not third.asked


def test_the_predictions_of_another_model_or_meta_file_are_not_lost(talk, tmp_path):
    """Two bases wrote one file, ./predictions-META.json."""
    records, answers = eight(talk, tmp_path)
    out = tmp_path / "out.jsonl"
    predictions_of(Parrot(answers), records, 2, out=out)
    before = out.read_bytes()
    others = [(records, "you", 10), (records, "me", 11), (records[:3], "me", 10)]
    for other, who, tokens in others:
        with pytest.raises(UserError, match="holds answers to other questions, of another model"):
            predictions_of(Parrot(answers), other, 2, tokens, out, who)
    (tmp_path / "array.json").write_text("[]")
    with pytest.raises(UserError, match="holds answers to other questions"):
        predictions_of(Parrot(answers), records, 2, out=tmp_path / "array.json")
    assert out.read_bytes() == before and (tmp_path / "array.json").read_text() == "[]"


def test_two_bases_have_a_file_each(talk, tmp_path, monkeypatch, capsys):
    meta = talk(["say one", "one"])
    monkeypatch.chdir(tmp_path)
    for name in ("first", "second"):
        shutil.copytree(TINY, tmp_path / name)
        with pytest.raises(SystemExit):
            main(["eval", str(tmp_path / name), str(meta), "--data-dir", str(tmp_path), "--max-new-tokens", "2", "--json"])
    names = sorted(path.name for path in tmp_path.glob("predictions*"))
    assert names == ["predictions-train-first.jsonl", "predictions-train-second.jsonl"]


def test_where_predictions_go_is_looked_at_before_anything_is_answered(talk, tmp_path, monkeypatch, capsys):
    """`--out p/x.json` without a folder p answered everything and then lost it."""
    arguments = ["eval", str(TINY), str(talk(["say one", "one"])), "--data-dir", str(tmp_path), "--max-new-tokens", "2"]
    with pytest.raises(SystemExit) as done:
        main([*arguments, "--out", str(tmp_path / "p" / "q" / "x.json")])
    assert not done.value.code and len(lines_of(tmp_path / "p" / "q" / "x.json")) == 1
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(Engine, "open", lambda *_: pytest.fail("the model was loaded"))
    for out in ("file/x.json", "p"):
        capsys.readouterr()
        with pytest.raises(SystemExit) as done:
            main([*arguments, "--out", str(tmp_path / out)])
        assert done.value.code == 1 and "cannot be written" in capsys.readouterr().err


def test_a_prediction_names_its_pictures_and_whether_it_was_cut(talk, pictures, capsys):
    records, _, _ = read_records(talk(["<img>a.png</img>which <img>b.png</img>", "x"], ["end", "cut"]), pictures)
    predictions = predictions_of(Parrot({records[0].turns[0].parts[-1]: "y", "end": "cut"}), records, 2)
    assert [line["pictures"] for line in predictions] == [[str(pictures / "a.png"), str(pictures / "b.png")], []]
    assert [line["cut"] for line in predictions] == [False, True] and score(predictions)["cut_answers"] == 1


def test_an_answer_is_cut_if_it_has_no_end(capsys):
    engine = Engine.open(TINY)
    (whole,) = engine.answer_many(["say one"], 200)
    ids = engine.chat.tokenizer.encode(whole.text).ids
    assert not whole.cut and len(ids) > 3
    short, again = engine.answer_many(["say one", "say one"], len(ids) - 1)
    assert short.cut and again == short and whole.text.startswith(short.text)
    assert not engine.answer_many(["say one"], len(ids) + 1)[0].cut, "its end is the last that it may have"
    heard = []
    for tokens in (len(ids) - 1, 200):
        list(engine.stream("say one", tokens, on_cut=lambda tokens=tokens: heard.append(tokens)))
    assert heard == [len(ids) - 1]
    with pytest.raises(SystemExit):
        main(["ask", str(TINY), "say one", "--max-new-tokens", "2"])
    assert "cut after 2 tokens" in capsys.readouterr().err


def test_a_bad_meta_file_stops_the_evaluation(talk, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["eval", str(TINY), str(talk(["<img>no.png</img>x", "one"])), "--data-dir", str(tmp_path)])
    assert stopped.value.code == 1 and "no.png is not in" in capsys.readouterr().err
