"""A file of questions answered by `ask --jsonl`, stopped and gone on with."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qwenvl_ft.cli.main import main
from qwenvl_ft.errors import UserError
from qwenvl_ft.infer.batch_file import answer_file, read_questions
from qwenvl_ft.infer.engine import Engine
from tests.conftest import SAMPLE, TINY
from tests.serving import wait_for

CHART = str(SAMPLE / "images" / "two_col_2954.png")


@pytest.fixture(scope="module")
def engine():
    return Engine.open(TINY)


def asked(folder, *parts):
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps({"messages": [{"role": "user", "content": part}], "id": f"q{number}"}, ensure_ascii=False) + "\n\n"
                            for number, part in enumerate(parts)))  # fmt: skip
    return path


def answered(out):
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_each_line_is_answered_as_alone_and_a_second_run_goes_on_behind_a_torn_line(engine, tmp_path):
    parts = [[{"image": CHART}, {"text": "read"}], "say one", "say two words", [{"image": CHART}, {"text": "find most"}], "say no"]
    lines, out = read_questions(asked(tmp_path, *parts)), tmp_path / "answers.jsonl"
    seen = []
    assert answer_file(engine, lines, out, 2, 12, lambda done, total: seen.append((done, total))) == (0, [])
    whole = answered(out)
    assert seen == [(2, 5), (4, 5), (5, 5)] and [line["id"] for line in whole] == ["q0", "q1", "q2", "q3", "q4"]
    assert [line["answer"] for line in whole] == [engine.ask(line["messages"], 12) for _, line in lines]
    text = out.read_text().splitlines(keepends=True)
    out.write_text("".join(text[:3]) + text[3][:10])
    assert answer_file(engine, lines, out, 2, 12, lambda done, total: seen.append((done, total))) == (3, [])
    assert answered(out) == whole and seen[3:] == [(5, 5)]


def test_a_run_that_was_killed_is_gone_on_with(engine, tmp_path):
    lines = read_questions(asked(tmp_path, *(f"say {word}" for word in "one two three four five six seven eight nine".split())))
    whole, out = tmp_path / "whole", tmp_path / "out"
    answer_file(engine, lines, whole, 1, 40, lambda done, total: None)
    files = ["--jsonl", str(tmp_path / "questions.jsonl"), "--out", str(out)]
    command = ["ask", str(TINY), *files, "--batch-size", "1", "--max-new-tokens", "40"]
    killed = subprocess.Popen([Path(sys.executable).parent / "qwenvl-ft", *command])
    wait_for(lambda: out.is_file() and out.stat().st_size, 200)
    killed.kill()
    killed.wait()
    half = len(answered(out))
    assert 0 < half < 9
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert not ended.value.code
    without = [{key: line[key] for key in line if key != "asked"} for line in answered(out)]
    assert without == [{key: line[key] for key in line if key != "asked"} for line in answered(whole)]


def test_a_bad_line_fails_alone_and_is_not_forgotten(engine, tmp_path):
    parts = "say a", [{"image": "nowhere.png"}, {"text": "read"}], "say b\u2028c"
    lines, out = read_questions(asked(tmp_path, *parts)), tmp_path / "out"
    _, (problem,) = answer_file(engine, lines, out, 8, 5, lambda done, total: None)
    assert problem.where.startswith("line 3") and "cannot be read" in problem.what
    assert ["answer" in line for line in answered(out)] == [True, False, True]
    _, (problem,) = answer_file(engine, lines, out, 8, 5, lambda done, total: None)
    assert problem.where == f"{out}, line 3" and "error in place of an answer" in problem.what


def test_an_answer_that_was_cut_says_so(engine, tmp_path):
    lines = read_questions(asked(tmp_path, "say one", "say two"))
    for tokens, cut in ((2, [True, True]), (200, [False, False])):
        out = tmp_path / f"out{tokens}"
        answer_file(engine, lines, out, 8, tokens, lambda done, total: None)
        assert [line.get("cut", False) for line in answered(out)] == cut


def test_answers_of_a_model_that_has_changed_in_its_folder_are_not_gone_on_with(tmp_path, capsys):
    """Only the names of the folders were compared, so a run that had been trained again went on with the answers of the one before."""
    shutil.copytree(TINY, tmp_path / "model")
    arguments = ["ask", str(tmp_path / "model"), "--jsonl", str(asked(tmp_path, "say a")), "--out", str(tmp_path / "p" / "out")]
    arguments += ["--max-new-tokens", "2"]
    codes = []
    for changed in ([], [], ["--max-pixels", "50176"]):
        with pytest.raises(SystemExit) as done:
            main([*arguments, *changed])
        codes.append(done.value.code)
    for name in ("generation_config.json", "model.safetensors"):
        os.utime(tmp_path / "model" / name)
        with pytest.raises(SystemExit) as done:
            main(arguments)
        codes.append(done.value.code)
    assert codes == [0, 0, 1, 1, 1] and "of another model or with other settings" in capsys.readouterr().err


def test_answers_to_other_questions_or_of_another_model_are_not_gone_on_with(engine, tmp_path):
    def answer(words, out, who="tiny", tokens=5):
        return answer_file(engine, read_questions(asked(tmp_path, *words)), out, 8, tokens, lambda done, total: None, who)

    out = tmp_path / "out"
    assert answer(["say a"], out) == (0, [])
    assert answer(["say a", "say b"], out) == (1, []), "new lines at the end are asked"
    for changed in ({"words": ["say c", "say b"]}, {"who": "tuned"}, {"tokens": 6}, {"words": ["say a"]}):
        with pytest.raises(UserError, match="holds answers to other questions"):
            answer(**{"words": ["say a", "say b"], "out": out} | changed)
    (tmp_path / "other").write_text('{"line": 1, "answer": "x"}\n')
    with pytest.raises(UserError, match="holds answers to other questions"):
        answer(["say a"], tmp_path / "other")


def test_every_line_that_is_no_question_is_named(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text('{"messages": []}\n{"question": "?"}\nnot json\n')
    with pytest.raises(UserError) as error:
        read_questions(path)
    assert [problem.where for problem in error.value.problems] == [f"{path}:2", f"{path}:3"]


def test_the_command_answers_a_file_or_chats(tmp_path, capsys, monkeypatch):
    path, out = asked(tmp_path, "say a"), tmp_path / "out.jsonl"
    main_code = []
    for arguments in (["--jsonl", str(path), "--out", str(out)], ["--jsonl", str(path)], ["what?", "--out", str(out)]):
        with pytest.raises(SystemExit) as stopped:
            main(["ask", str(TINY), *arguments])
        main_code.append(stopped.value.code)
    assert main_code == [0, 2, 2] and len(answered(out)) == 1
    lines = iter(["say one\n", "say two\n", "\n"])
    monkeypatch.setattr("sys.stdin.readline", lambda: next(lines), raising=False)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["ask", str(TINY), "--image", CHART, "--max-new-tokens", "4"])
    assert len(capsys.readouterr().out.splitlines()) >= 2
