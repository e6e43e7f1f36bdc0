"""The table of scores: what stands in it, and the words beneath it."""

import json
import re

import pytest

from qwenvl_ft.cli.main import main
from qwenvl_ft.evaluate.scoring import prediction
from qwenvl_ft.evaluate.table import Column, forms_of, groups_of, markdown, sections, tabulate
from tests.conftest import TINY


def answered(*said, wanted=None, question="What is it?"):
    """Predictions, each about a picture of its own."""
    wanted = wanted or ["yes"] * len(said)
    return [
        {"where": f"r[{number}].conversations[1]", "pictures": [f"{number}.png"], "question": question, "wanted": want, "answer": answer,
         "cut": False}
        for number, (answer, want) in enumerate(zip(said, wanted, strict=True))
    ]  # fmt: skip


WANTED = ["yes", "no"] * 10
GOOD, BLIND = answered(*WANTED, wanted=WANTED), answered(*["yes"] * 20, wanted=WANTED)


def row_of(table, model, metric="exact"):
    return next(row for row in table["rows"] if (row["model"], row["metric"]) == (model, metric))


def test_a_row_has_a_score_with_its_interval_and_what_it_is_compared_with():
    table = tabulate([Column("good", GOOD), Column("blind", BLIND)], [], 0)
    assert [(row["metric"], row["model"]) for row in table["rows"]] == [
        ("relaxed", "good"), ("relaxed", "blind"), ("exact", "good"), ("exact", "blind"),
    ]  # fmt: skip
    good, blind = row_of(table, "good"), row_of(table, "blind")
    assert good["value"] == 1 and blind["value"] == 0.5 and blind["low"] < 0.5 < blind["high"]
    assert "p" not in good and blind["p"] == 2 / 2**10, "ten are right with one of the two alone"
    assert good["prior"]["value"] == 0.5 and good["prior"]["p"] == 2 / 2**10 and blind["prior"]["p"] == 1
    assert (table["questions"], table["groups"]) == (20, 20)


def test_a_model_that_is_no_better_than_chance_is_told_so():
    table = tabulate([Column("good", GOOD, {"blank": BLIND}), Column("blind", BLIND, {"blank": BLIND})], [], 0)
    (score,) = {cells[2] for cells in sections(table)[0][2] if cells[1] == "blind"}
    said = f"blind is no better than {{}}: {score} against {score}, p = 1"
    assert score.startswith("50.0% (") and table["words"] == [
        said.format("with blank pictures"), said.format("what the commonest answer gets"),
    ]  # fmt: skip


def test_a_lower_error_rate_is_better():
    table = tabulate([Column("good", GOOD, {"blank": BLIND})], ["cer"], 0)
    assert not table["words"] and row_of(table, "good", "cer")["blank"]["value"] > 0
    assert len(tabulate([Column("bad", BLIND, {"blank": GOOD})], ["cer"], 0)["words"]) == 2


def test_how_many_answers_another_picture_changes_is_counted():
    changed = answered(*["no"] * 5, *[of["answer"] for of in GOOD[5:]], wanted=WANTED)
    table = tabulate([Column("good", GOOD, {"shuffled": changed})], [], 0)
    assert row_of(table, "good")["shuffled"] | {"answers_changed": 3, "of": 20} == row_of(table, "good")["shuffled"]
    assert "good gave another answer to 3 of 20 questions over other pictures" in table["words"]


def test_that_a_model_fails_with_the_text_first_is_said_and_that_it_does_not_is_not():
    table = tabulate([Column("good", GOOD, {"text_first": BLIND})], ["exact"], 0)
    (word,) = [word for word in table["words"] if "text first" in word]
    assert word.startswith("good is worse with the text first: 50.0%") and "media_position: both" in word
    assert "text first" in sections(table)[0][1] and row_of(table, "good")["text_first"]["value"] == 0.5
    for other in (Column("good", GOOD, {"text_first": GOOD}), Column("blind", BLIND, {"text_first": GOOD})):
        assert not any("text first" in word for word in tabulate([other], ["exact"], 0)["words"])


def test_scores_by_answer_and_by_the_form_of_the_question():
    table = tabulate([Column("blind", BLIND)], ["exact"], 0)
    assert {of["kind"]: (of["questions"], of["scores"]["blind"]["value"]) for of in table["by_answer"]} == {
        "yes": (10, 1),
        "no": (10, 0),
    }
    assert [(of["kind"], of["questions"]) for of in table["by_question"]] == [("What is it?", 20)]
    asked = [
        "How many cars? Answer with a number.",
        "What year? Answer with a number.",
        "How many dogs?",
        "What is it?",
        "What is it?",
    ]
    assert forms_of(asked) == ["Answer with a number."] * 2 + ["How many ...", "What is it?", "What is it?"]
    assert forms_of(["图中有几只猫？请用一个词回答。", "这是什么？请用一个词回答。"]) == ["请用一个词回答。"] * 2


def test_questions_about_a_picture_or_of_a_record_are_a_group():
    of = [("r[0].conversations[1]", ["a.png"]), ("r[1].conversations[1]", ["a.png", "b.png"]), ("r[2].conversations[1]", []),
          ("r[2].conversations[3]", []), ("r[3].conversations[1]", ["b.png"])]  # fmt: skip
    assert groups_of([{"where": where, "pictures": pictures} for where, pictures in of]) == [0, 0, 1, 1, 2]


def test_classes_and_fields_have_tables_of_their_own():
    table = tabulate([Column("blind", BLIND)], ["class"], 0)
    assert table["confusion"] == {"blind": {"yes": {"yes": 10}, "no": {"yes": 10}}}
    assert ("what blind answered", ["wanted", "yes", "no"], [["yes", "10", "0"], ["no", "10", "0"]]) in sections(table)
    table = tabulate([Column("m", answered('{"a": 1}', "", wanted=['{"a": 1}', '{"a": 2}']))], ["json"], 0)
    assert sections(table)[-1] == ("fields that are right", ["field", "m"], [["a", "1 of 2"]])
    assert "confusion" not in table and len(tabulate([Column("m", GOOD)], ["exact"], 0).keys() & {"confusion", "fields"}) == 0


def test_what_no_question_asks_has_no_value():
    table = tabulate([Column("m", GOOD)], ["json", "mean_iou"], 0)
    assert [row["value"] for row in table["rows"]] == [None, None] and not table["words"]
    assert sections(table)[0][2] == [["json", "-", "-"], ["mean_iou", "-", "-"]]


def test_markdown_has_a_row_a_line_whatever_the_texts():
    odd = answered("x", "x", "x", wanted=["a|b\nc"] * 3, question="a | b\nc?")
    lines = [line for line in markdown(tabulate([Column("m", odd)], [], 0)).splitlines() if line.startswith("|")]
    widths = [len(re.split(r"(?<!\\)\|", line)) for line in lines]
    assert widths == [5] * 4 + [5] * 6
    assert "| a\\|b c | 3 | 0.0% (0.0 to 70.8) |" in lines


def test_eval_prints_and_returns_the_table(talk, tmp_path, capsys):
    """A mean stands beside its interval, for a person and for a program."""
    meta, out = talk(["say one", "one"], ["say two", "two"], ["say three", "three"]), tmp_path / "out.jsonl"
    arguments = ["eval", str(TINY), str(meta), "--out", str(out), "--max-new-tokens", "4"]
    said = []
    for more in (["--json", "--limit", "2", "--metric", "f1", "--metric", "cer"], ["--no-pictures", "--seed", "1"]):
        with pytest.raises(SystemExit) as done:
            main([*arguments, *more])
        assert not done.value.code
        said.append(capsys.readouterr().out)
    scores = json.loads(said[0])
    assert scores["questions"] == 2 and [row["metric"] for row in scores["table"]["rows"]] == ["f1", "cer"]
    assert scores["table"]["rows"][0].keys() == {"metric", "questions", "model", "value", "low", "high", "prior"}
    assert "relaxed" in said[1] and "no pictures" in said[1] and "to" in said[1] and "no better" in said[1]
    assert len(out.read_text().splitlines()) == 3 and (tmp_path / "out-no_pictures.jsonl").is_file()


def test_a_record_says_how_its_answers_are_scored(talk, tmp_path, capsys):
    """A set of many kinds has a line for each; a name that is none is said before anything is asked."""
    meta, out = talk(["say one", "one"], ["say two", "two"], ["say three", "three"]), tmp_path / "out.jsonl"

    def scored(*metrics):
        records = json.loads(meta.read_text())
        for record, metric in zip(records, metrics, strict=True):
            record |= {"metric": metric} if metric else {}
        path = tmp_path / f"of{len(list(tmp_path.iterdir()))}" / "train.json"
        path.parent.mkdir()
        path.write_text(json.dumps(records))
        with pytest.raises(SystemExit) as done:
            main(["eval", str(TINY), str(path), "--out", str(out), "--max-new-tokens", "4", "--json"])
        said = capsys.readouterr()
        return said.err if done.value.code else json.loads(said.out)["table"]

    table = scored("anls", "cer", "anls")
    assert [(row["metric"], row["questions"]) for row in table["rows"]] == [("anls", 2), ("cer", 1)]
    before = out.read_bytes()
    table = scored("anls", "", "")
    assert [(row["metric"], row["questions"]) for row in table["rows"]] == [("anls", 1), ("relaxed", 2), ("exact", 2)]
    assert sections(table)[0][1] == ["metric", "questions", "score (95 %)", "prior"]
    assert out.read_bytes() == before, "nothing was asked again"
    said = scored("anls", "os:system", "bleu")
    assert "train.json[1].metric: is 'os:system', which is none" in said and "train.json[2].metric" in said


def test_a_metric_that_there_is_not_is_said_before_a_model_is_loaded(talk, capsys):
    for command in ("eval", "compare"):
        with pytest.raises(SystemExit) as done:
            main([command, str(TINY), str(talk(["say one", "one"])), "--metric", "bleu"])
        assert done.value.code == 1 and "--metric bleu: is none" in capsys.readouterr().err


def test_a_prediction_without_a_model_is_that_of_scoring():
    """What these tests make by hand has the keys of what is kept."""
    from qwenvl_ft.data.records import Record, Turn

    kept = prediction((Record("r[0].conversations[1]", (Turn("user", ("What is it?",)),)), "yes"), "yes", False)
    assert kept.keys() >= GOOD[0].keys()
