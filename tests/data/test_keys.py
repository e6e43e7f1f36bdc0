"""What a record says beside its texts: a key is read, or it is a problem that names it. Nothing is dropped without a word."""

import json
import subprocess
import sys

import pytest
from PIL import Image

from qwenvl_ft.cli.main import main
from qwenvl_ft.data.chat import open_chat
from qwenvl_ft.data.formats.json_entries import kind_of
from qwenvl_ft.data.formats.keys import FIXES, TURN_FIXES
from qwenvl_ft.data.formats.lists import KNOWN
from qwenvl_ft.data.formats.turns import KNOWN as KNOWN_OF_A_TURN
from qwenvl_ft.data.formats.turns import OLD
from qwenvl_ft.data.meta_file import read_records
from qwenvl_ft.data.notes import Noted
from qwenvl_ft.data.records import Turn
from tests.conftest import TINY

QUESTION, ANSWER = {"from": "user", "value": "<img>a.png</img>\nWhat colour?"}, {"from": "assistant", "value": "Red."}
KNOWN_TO_PEERS = """
    audio audios image_path image_url img weight chosen rejected label messages history query response prompt completion
    instruction input output rejected_response kto_tag bbox functions tool_choice parallel_tool_calls
""".split()
OF_A_TURN = "train trainable mask masked content role function_call thinking image images loss_scale tools".split()


@pytest.fixture
def read(tmp_path):
    """(records, problems) of a list of records, a.png beside them."""
    Image.new("RGB", (50, 40)).save(tmp_path / "a.png")

    def read(*entries: dict):
        (tmp_path / "train.json").write_text(json.dumps(entries))
        return read_records(tmp_path / "train.json", tmp_path)[:2]

    return read


@pytest.mark.parametrize("key", KNOWN_TO_PEERS)
def test_a_key_of_a_record_that_is_not_read_is_a_problem_with_a_fix_of_its_own(key, read):
    """A record with `audio`, `chosen` or `image_url` trained as text alone, without a word."""
    records, (problem,) = read({"conversations": [QUESTION, ANSWER], key: "x"}, {"conversations": [QUESTION, ANSWER]})
    assert (problem.where, problem.what) == ("train.json[0]", f'has a key "{key}", which is not read')
    assert problem.fix == FIXES[key] and [record.where for record in records] == ["train.json[1]"]


@pytest.mark.parametrize("key", OF_A_TURN)
def test_a_key_of_a_turn_that_is_not_read_is_a_problem_with_a_fix_of_its_own(key, read):
    records, (problem,) = read({"conversations": [QUESTION, ANSWER | {key: 1}]})
    assert (problem.where, problem.what) == ("train.json[0].conversations[1]", f'has a key "{key}", which is not read')
    assert problem.fix == TURN_FIXES[key] and not records


def test_a_key_that_nobody_knows_is_to_be_deleted_and_one_in_another_case_to_be_written_right(read):
    entry = {"conversations": [QUESTION | {"zz": 1}, {"From": 1} | ANSWER], "source": "web", "ID": 7, "k" * 999: 1}
    _, problems = read(entry)
    assert [(problem.what[:40], problem.fix) for problem in problems] == [
        ('has a key "ID", which is not read', 'write it as "id"'),
        ('has a key "kkkkkkkkkkkkkkkkkkkkkkkkkkkkk', f"delete it, or leave it out with columns: {{{'k' * 60}: null}}"),
        ('has a key "source", which is not read', "delete it, or leave it out with columns: {source: null}"),
        ('has a key "zz", which is not read', "delete it, or leave it out with columns: {zz: null}"),
        ('has a key "From", which is not read', 'write it as "from"'),
    ]
    assert not read({"conversations": [QUESTION, ANSWER], "id": ["any", "thing"]})[1]


def test_keys_come_in_the_same_order_in_every_process():
    """They were looked through as a set, whose order is another in every process."""
    code = f"""
from pathlib import Path
from qwenvl_ft.data.formats import read_entry
from qwenvl_ft.data.media import Media
from qwenvl_ft.data.reading import AS_FOUND
problems = []
read_entry({{"conversations": [{ANSWER!r}], **dict.fromkeys("qwertyuiop")}}, "", Media(Path("."), AS_FOUND), problems)
print([problem.what for problem in problems])
"""
    said = {subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, env={"PYTHONPATH": ".", "PYTHONHASHSEED": seed}).stdout
            for seed in "123"}  # fmt: skip
    assert len(said) == 1 and said.pop().count(b"which is not read") == 10


def test_an_answer_with_loss_false_is_shown_and_not_taught(read):
    """`"loss": false` was dropped, and the wrong answer that it masks was taught."""
    masked = {"from": "gpt", "value": "five", "loss": False}
    (record,), problems = read({"conversations": [QUESTION | {"loss": False}, masked, {"from": "user", "value": "Sure?"}, ANSWER]})
    assert not problems and [turn.taught for turn in record.turns if turn.role == "assistant"] == [False, True]
    (record,), problems = read({"conversations": [QUESTION, ANSWER | {"loss": True}]})
    assert not problems and record.turns[1] == Turn("assistant", ("Red.",), taught=True)


@pytest.mark.parametrize("loss", ["false", [], 0.5, 2, {}])
def test_loss_is_true_or_false_and_nothing_else(loss, read):
    _, (problem,) = read({"conversations": [QUESTION, ANSWER | {"loss": loss}]})
    assert problem.what == f'its "loss" is {kind_of(loss)}, not true or false'


def test_loss_on_a_question_and_a_record_that_teaches_nothing_are_problems(read):
    _, problems = read(
        {"conversations": [{"from": "system", "value": "s", "loss": True}, QUESTION | {"loss": True}, ANSWER]},
        {"conversations": [QUESTION, ANSWER | {"loss": False}]},
        {"conversations": [QUESTION, ANSWER | {"loss": False}, QUESTION, {"from": "assistant"}]},
    )
    assert [(problem.where, problem.what) for problem in problems] == [
        ("train.json[0].conversations[0]", 'has "loss": true in the system\'s turn'),
        ("train.json[0].conversations[1]", 'has "loss": true in the user\'s turn'),
        ("train.json[1]", 'has "loss": false on every answer, so it teaches nothing'),
        ("train.json[2].conversations[3]", 'has no key "value"'),
    ]


def test_the_reasoning_of_an_answer_is_taught_before_it_as_templates_write_it(read):
    (record,), problems = read({"conversations": [QUESTION, ANSWER | {"reasoning": "\nIt looks red.\n\n"}]})
    assert not problems and record.turns[1].parts == ("<think>\nIt looks red.\n</think>\n\nRed.",)


@pytest.mark.parametrize(("turn", "what"), [
    ({"reasoning": 7}, 'its "reasoning" is a number, not a text'),
    ({"reasoning_content": ["a"]}, 'its "reasoning_content" is a list, not a text'),
    ({"reasoning": " \n"}, 'its "reasoning" is empty'),
    ({"reasoning": "a</think>b"}, 'its "reasoning" holds <think> or </think>'),
    ({"reasoning": "a", "value": "\n<think>b</think>c"}, 'has "reasoning", and a value that begins with <think>'),
    ({"reasoning": "a<|im_end|>"}, "holds the control token <|im_end|>"),
    ({"reasoning": "a", "value": " "}, "the assistant's turn is empty"),
])  # fmt: skip
def test_reasoning_that_cannot_be_taught_is_a_problem(turn, what, read):
    _, problems = read({"conversations": [QUESTION, ANSWER | turn]})
    assert [problem.what for problem in problems] == [what]


def test_reasoning_stands_in_an_answer_only(read):
    _, problems = read({"conversations": [QUESTION | {"reasoning": "a"}, ANSWER], "reasoning": "a"})
    assert [problem.what for problem in problems] == [
        'has a key "reasoning", which is not read', "has \"reasoning\" in the user's turn",
    ]  # fmt: skip


def test_a_known_key_has_no_fix():
    assert FIXES.keys() & KNOWN["conversations"] == {"conversations"} and not TURN_FIXES.keys() & KNOWN_OF_A_TURN[OLD]


def test_thoughts_that_a_template_does_not_know_are_noted(talk, tmp_path, capsys):
    """`thinking` did nothing with such a model, and no command said so."""
    meta = talk(["q", "<think>hm</think>a", "r", "<think>\nso\n</think>\n\nb"], ["q", "a <think>"])
    with pytest.raises(SystemExit):
        main(["validate-meta", str(meta), "--model", str(TINY), "--thinking", "on", "--json"])
    assert json.loads(capsys.readouterr().out)["notes"] == [
        "2 answers begin with a thought, which is taught as text: the model's chat template knows none, and `thinking` changes nothing "
        "(train.json[0] for one)",
        "thinking: on changes nothing: the model's chat template knows no thoughts",
    ]
    records, _, _ = read_records(meta, tmp_path)
    assert not Noted(records).lines and open_chat(TINY).write_scripts(records[0]) and not open_chat(TINY).notes


def test_answers_that_begin_with_white_space_are_noted(talk, tmp_path):
    records, problems, _ = read_records(talk(["List.", "\n1. red"], ["Say.", "It is."], ["Again", " so"]), tmp_path)
    assert not problems and Noted(records).lines == [
        "2 answers begin with white space, which is taught as it stands: take it out if it is not meant (train.json[0] for one)"
    ]
