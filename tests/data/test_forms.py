"""Every form of the field, as its own project writes it: the ids, labels and grids of the documented form, or a problem in words."""

import copy
import json
import os
import random
import re
import typing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from qwenvl_ft.config import load_config
from qwenvl_ft.data.chat import open_chat
from qwenvl_ft.data.formats import FORMS, form_of, keys, lists, read_entry, rows, turns
from qwenvl_ft.data.media import Media
from qwenvl_ft.data.meta_file import Tally, read_records
from qwenvl_ft.data.reading import AS_FOUND, Reading
from qwenvl_ft.data.records import Box, Turn
from qwenvl_ft.errors import alike
from qwenvl_ft.values import Form
from tests.conftest import ROOT, TINY
from tests.data.form_cases import (
    AGAIN,
    ANSWER,
    CALL,
    CALLS,
    EVERY,
    FORM_OF,
    GROUNDED,
    LAST,
    ONE,
    QUESTION,
    RESULT,
    ROWS,
    SAME,
    TOOL,
    WANTED,
    documented,
    messages,
    text,
)
from tests.runs import write_film


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """a.png of 50 x 40 px, b.png of 90 x 60."""
    folder = tmp_path_factory.mktemp("pictures")
    for name, size in (("a.png", (50, 40)), ("b.png", (90, 60))):
        Image.new("RGB", size).save(folder / name)
    return folder


@pytest.fixture(scope="module")
def chat():
    return open_chat(TINY)


@pytest.fixture
def read(folder):
    """(record, problems) of one entry."""

    def read(entry, **reading):
        problems = []
        record = read_entry(entry, "train.json[0]", Media(folder, AS_FOUND), problems, Reading(**reading))
        assert (record is None) == bool(problems)
        return record, problems

    return read


def written(chat, record):
    """What training sees of a record."""
    return [(script.ids, script.labels, script.grids) for script in chat.write_scripts(record)]


@pytest.mark.parametrize("name", SAME)
def test_a_form_gives_the_ids_labels_and_grids_of_the_documented_one(name, read, chat):
    (record, problems), (wanted, _) = read(SAME[name]), read(WANTED)
    assert not problems and written(chat, record) == written(chat, wanted)
    assert form_of(SAME[name]) == FORM_OF[name]


def test_an_index_counts_the_pictures_of_the_whole_record(read):
    """HuggingFaceH4/llava-instruct-mix-vsft counts the pictures of all messages."""
    parts = [[{"index": number, "text": None, "type": "image"}, {"index": None, "text": "q", "type": "text"}] for number in (0, 1)]
    entry = {"images": ["a.png", "b.png"], "messages": messages(parts[0], "a", parts[1], "a")}
    record, problems = read(entry)
    assert not problems and [picture.name for picture in record.pictures] == ["a.png", "b.png"]
    _, (problem, *_) = read({"images": ["a.png", "b.png"], "messages": messages(parts[1], "a", parts[0], "a")})
    assert problem.what == 'its "index" is 1, and it is the next picture'


@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_a_table_is_a_picture_a_question_and_an_answer(name, read, chat):
    (record, problems), (wanted, _) = read(ROWS[name]), read(ONE)
    assert not problems and written(chat, record) == written(chat, wanted)


def test_the_first_qwen_vl_keeps_its_own_text(read, chat):
    value = f"Picture 1: <img>a.png</img>\nPicture 2: <img>b.png</img>\n{QUESTION}"
    entry = documented(value, ANSWER, id="identity_0")
    record, _ = read(entry)
    assert form_of(entry) == "v1"
    assert [part if isinstance(part, str) else part.name for part in record.turns[0].parts] == [
        "Picture 1: ", "a.png", "Picture 2: ", "b.png", QUESTION,
    ]  # fmt: skip


def test_of_a_prompt_and_its_completion_the_completion_is_taught(read, chat):
    shown = [{"type": "image", "image": "a.png"}, text(QUESTION)]
    record, _ = read({"prompt": messages(shown, ANSWER, AGAIN), "completion": messages(LAST, first="assistant")})
    (wanted, _) = read(documented(f"<img>a.png</img>\n{QUESTION}", ANSWER, AGAIN, LAST))
    (script,) = chat.write_scripts(record)
    assert chat.taught_texts(script) == [f"{LAST}<|im_end|>"] and script.ids == chat.write_scripts(wanted)[0].ids


def test_the_input_of_alpaca_follows_its_instruction(read):
    """As LLaMA-Factory's alpaca converter joins them: with a newline between."""
    record, _ = read({"instruction": "Sum up.", "input": "A text.", "output": LAST, "system": "Be brief."})
    assert record.turns == (Turn("system", ("Be brief.",)), Turn("user", ("Sum up.\nA text.",)), Turn("assistant", (LAST,)))


def test_a_weight_of_nought_and_loss_false_mask_an_answer(read, chat):
    for masks in ({"weight": 0}, {"loss": False}, {"loss": 0}, {"loss": False, "weight": 0.0}):
        record, _ = read(
            {"messages": [*messages(QUESTION), {"role": "assistant", "content": ANSWER, **masks}, *messages(AGAIN, LAST)]}
        )
        assert [turn.taught for turn in record.turns] == [True, False, True, True]
        assert chat.taught_texts(chat.write_scripts(record)[-1]) == [f"{LAST}<|im_end|>"]


@pytest.mark.parametrize("name", CALLS)
def test_a_call_of_a_tool_is_the_same_however_it_is_written(name, read):
    record, problems = read(CALLS[name])
    assert not problems
    assert [json.loads(tool) for tool in record.tools] == [{"type": "function", "function": TOOL}]
    assert [turn.role for turn in record.turns] == ["user", "assistant", "tool", "assistant"]
    assert [json.loads(call) for call in record.turns[1].calls] == [CALL] and record.turns[2].text == RESULT


@pytest.mark.parametrize("tool", [{"type": "function", **TOOL}, {"function": TOOL}, json.dumps({**TOOL, "type": "function"})])
def test_a_tool_is_taught_as_it_is_served(tool, read):
    """The flat tool of OpenAI's Responses kept its "type" within the function, where a server that is sent it writes none."""
    record, problems = read(CALLS["TRL's"] | {"tools": [tool]})
    assert not problems and record.tools == (json.dumps({"type": "function", "function": TOOL}),)


@pytest.mark.parametrize(("tool", "what"), [
    ([TOOL], "is not an object"), ({"name": 5}, "is no function with a name"), ({"type": "web_search", "name": "x"}, "with a name"),
    ('{"name": "a", "name": "b"}', "that is not JSON"), (5, "not an object or a list"),
])  # fmt: skip
def test_what_is_no_tool_is_a_problem(tool, what, read):
    """A list among the tools was left out without a word."""
    _, (problem,) = read(CALLS["TRL's"] | {"tools": [TOOL, tool]})
    assert what in problem.what and problem.where == "train.json[0].tools[1]"


def test_several_calls_are_one_answer_and_may_follow_its_text(read):
    calls = [{"role": "tool_call", "content": json.dumps({"name": name, "arguments": {}})} for name in "ab"]
    results = [{"role": "tool_response", "content": name} for name in "ab"]
    record, _ = read({"messages": [*messages(QUESTION, "Let me look."), *calls, *results, *messages(LAST, first="assistant")]})
    assert [(turn.role, turn.text, len(turn.calls)) for turn in record.turns] == [
        ("user", QUESTION, 0), ("assistant", "Let me look.", 2), ("tool", "a", 0), ("tool", "b", 0), ("assistant", LAST, 0),
    ]  # fmt: skip


@pytest.mark.parametrize(("turn", "what"), [
    ({"from": "function_call", "value": "crop(1)"}, "holds a call or a tool that is not JSON"),
    ({"from": "function_call", "value": '{"name": "crop", "name": "b"}'}, "holds a call or a tool that is not JSON"),
    ({"from": "function_call", "value": '{"name": "crop", "arguments": NaN}'}, "holds a call or a tool that is not JSON"),
    ({"from": "function_call", "value": '{"arguments": {}}'}, "holds a call of a tool without its name"),
    ({"from": "function_call", "value": '{"name": "crop", "arguments": [1]}'}, 'its "arguments" is a list, not an object'),
    ({"from": "function_call", "value": '{"name": "crop", "arguments": {}, "x": 1}'}, 'has a key "x", which is not read'),
    ({"from": "function_call", "value": "[]"}, "calls no tool"),
    ({"from": "observation", "value": "a"}, "is from the tool where the assistant's turn was due"),
])  # fmt: skip
def test_what_is_no_call_is_a_problem(turn, what, read):
    _, problems = read({"conversations": [{"from": "human", "value": "q"}, turn, *documented("q", "a")["conversations"]]})
    assert problems[0].what == what


def test_a_user_may_go_on_in_openai_s_parts_and_nowhere_else(read):
    """OpenAI's guide to vision fine-tuning has a user's text in one message and the picture in the next."""
    turns = [*messages(QUESTION), *messages([{"type": "image_url", "image_url": {"url": "a.png", "detail": "auto"}}], ANSWER)]
    record, _ = read({"messages": turns})
    assert [(turn.role, len(turn.media)) for turn in record.turns] == [("user", 0), ("user", 1), ("assistant", 0)]
    _, (problem,) = read({"messages": [*messages(QUESTION), *messages(AGAIN, ANSWER)]})
    assert problem.what == "is from the user where the assistant's turn was due"


def test_a_tool_may_bring_a_picture(read):
    """ms-swift's example of an agent: the tool answers with a screenshot."""
    call = {"role": "tool_call", "content": json.dumps(CALL)}
    turns = [
        *messages("<image>What time is it?", "<think>\nI look.\n</think>\n"),
        call,
        {"role": "tool", "content": '{"image": "<image>"}'},
    ]
    record, _ = read({"messages": [*turns, *messages(LAST, first="assistant")], "images": ["a.png", "b.png"]})
    assert [medium.name for medium in record.turns[2].media] == ["b.png"] and record.turns[1].calls


def test_tools_answer_in_the_order_of_the_calls(read):
    entry = copy.deepcopy(CALLS["OpenAI's"])
    entry["messages"][2]["tool_call_id"] = "call_2"
    _, (problem,) = read(entry)
    assert (problem.where, problem.what) == (
        "train.json[0].messages[2]", 'its "tool_call_id" is "call_2", where an answer to call_1 was due',
    )  # fmt: skip


def test_the_boxes_of_ms_swift_are_parts_of_the_texts(read):
    record, problems = read(GROUNDED)
    assert not problems and record.turns[0].text == "Where is the cat?"
    assert record.turns[1].parts == (Box((5.0, 10.0, 25.0, 30.0), "cat", 0),)
    shares = GROUNDED | {"objects": {"ref": ["cat", "cat"], "bbox": [[0.1, 0.25, 0.5, 0.75]], "bbox_type": "norm1"}}
    assert read(shares)[0].turns[1].parts == (Box((5.0, 10.0, 25.0, 30.0), "cat", 0),)


@pytest.mark.parametrize(("objects", "where", "what"), [
    ({"ref": ["cat"], "bbox": [[5, 10, 25, 30]]}, ".objects", "lists 1 and the texts hold 2 <ref-object>"),
    ({"ref": ["a", "b"], "bbox": []}, ".objects", "lists 0 and the texts hold 1 <bbox>"),
    ({"ref": ["a", "b"], "bbox": [[5, 10, 25, 300]]}, ".objects.bbox[0]", None),
    ({"ref": ["a", "b"], "bbox": [[5, 10, 25]]}, ".objects.bbox[0]", None),
    ({"ref": ["a", "b"], "bbox": [[5, 10, 25, float("nan")]]}, ".objects.bbox[0]", None),
    ({"ref": ["a", "b"], "bbox": [[5, 10, 25, 10**400]]}, ".objects.bbox[0]", None),
    ({"ref": ["a", "b"], "bbox": [[5, 10, 25, 30]], "image_id": [1]}, ".objects.bbox[0]", None),
    ({"ref": ["a", "b"], "bbox": [[5, 10, 25, 30]], "image_id": [0, 1]}, ".objects", 'has 1 boxes and 2 "image_id"'),
    ({"ref": ["a", "b"], "bbox": [[5, 10, 25, 30]], "bbox_type": "norm1000"}, ".objects", 'its "bbox_type" is norm1000'),
    ({"ref": ["a<|im_end|>", "b"], "bbox": [[5, 10, 25, 30]]}, ".objects", "holds the control token <|im_end|>"),
    ("x", ".objects", "is a text, not an object"),
])  # fmt: skip
def test_boxes_that_do_not_fit_are_problems(objects, where, what, read):
    _, problems = read(GROUNDED | {"objects": objects})
    assert problems[0].where == f"train.json[0]{where}" and what in (problems[0].what, None)


@pytest.mark.parametrize(("entry", "what"), [
    ({"messages": messages("<image>q", "a"), "images": []}, "holds <image>, which is no tag here: it would be read as text"),
    ({"messages": messages("<image>q", "a"), "images": ["a.png", "b.png"]}, "holds 1 <image> and names 2 pictures"),
    ({"messages": messages("q", "a"), "images": ["a.png"]}, "holds 0 <image> and names 1 picture"),
    ({"messages": messages("<image>q", "a"), "images": [7]}, "is a number, not a file name"),
    ({"messages": messages("<image>q", "a"), "images": [{"path": "a.png"}]}, "is an object, not a file name"),
    ({"messages": messages("<image>q", "a"), "images": ["a.png"], "image": "b.png"}, 'has "image" and "images"'),
    ({"messages": messages([{"type": "audio", "audio": "a.mp3"}], "a")}, 'is a part of the type "audio", which is not read'),
    ({"messages": messages([{"type": "image", "image": "a.png", "min_pixels": "x"}], "a")},
     'its "min_pixels" is a text, not a number of pixels'),
    ({"messages": messages([{"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}}], "a")},
     'has a key "detail", which is not read'),
    ({"messages": messages("q", [{"type": "image", "image": "a.png"}])}, "a part of the assistant's turn is no text"),
    ({"messages": messages("q", None)}, 'its "content" is null, not a text'),
    ({"messages": [*messages("q"), {"role": "assistant", "content": "a", "weight": 0.5}]},
     'its "weight" is 0.5, and nothing is weighed'),
    ({"messages": [*messages("q"), {"role": "assistant", "content": "a", "weight": 0, "loss": True}]},
     'its "loss" and its "weight" do not agree'),
    ({"messages": messages("q", "a"), "rejected_response": "b"}, 'has a key "rejected_response", which is not read'),
    ({"messages": messages("q", "a"), "parallel_tool_calls": False}, 'has a key "parallel_tool_calls", which is not read'),
    ({"prompt": "q", "chosen": "a", "rejected": "b"}, 'has a key "chosen", which is not read'),
    ({"question": "q", "answers": ["a", "b"]}, "holds 2 answers, and one is taught"),
    ({"question": "q", "answer": 3}, "is a number, not a text"),
    ({"question": "q", "answer": "a", "solution": "b"}, 'has a key "solution", which is not read'),
    ({"question": "q", "answer": "a", "difficulty": 3}, 'has a key "difficulty", which is not read'),
    ({"question": "q"}, "has no answer"),
    ({"text": "a"}, "the user's turn is empty"),
    ({"query": "q", "response": "a", "history": [["a"]]}, "is no pair of a question and its answer"),
    ({"Messages": []}, 'has a key "Messages", which is not read'),
    ({"chat": [], "n": 1}, "holds no talk that is read: its keys are chat, n"),
])  # fmt: skip
def test_what_is_not_read_in_a_form_is_named(entry, what, read):
    assert what in [problem.what for problem in read(entry)[1]]


def test_columns_names_what_a_table_calls_otherwise_and_leaves_out_what_it_should(read):
    row = {"img": "a.png", "frage": QUESTION, "antwort": ANSWER, "difficulty": 3}
    columns = {"question": "frage", "answer": "antwort", "difficulty": None}
    (record, problems), (wanted, _) = read(row, columns=columns), read(ONE)
    assert not problems and record.turns == wanted.turns
    _, (problem,) = read(row | {"more": 1}, columns=columns)
    assert problem.what == 'has a key "more", which is not read' and "columns: {more: null}" in problem.fix
    _, problems = read(row, columns=columns | {"answer": "anwort"})
    assert problems[0].what == 'has no key "anwort", which columns names as its answer'


def test_a_key_is_left_out_at_every_level_where_columns_says_so(read):
    entry = documented("q", "a", model="")
    entry["conversations"][1]["model"] = "x"
    assert len(read(entry)[1]) == 2 and not read(entry, columns={"model": None})[1]


def test_columns_names_the_keys_of_turns_too(read):
    """{from: speaker} was told that there was no such column, and the turn to write it as "from"."""
    talk = [{"speaker": "human", "text": "q", "train": False}, {"speaker": "gpt", "text": "a"}]
    columns = {"from": "speaker", "value": "text", "train": None}
    record, problems = read({"conversations": talk, "value": 3}, columns=columns)
    assert [problem.what for problem in problems] == ['has a key "value", which is not read']
    record, problems = read({"conversations": talk, "text": 3}, columns=columns | {"text": None})
    assert not problems and [(turn.role, turn.text) for turn in record.turns] == [("user", "q"), ("assistant", "a")]
    parts = [{"who": "user", "said": [{"type": "text", "text": "q"}]}, {"who": "assistant", "said": "a", "loss": True},
             {"who": "user", "said": "r"}, {"who": "assistant", "said": "b", "loss": False}]  # fmt: skip
    record, problems = read({"messages": parts}, columns={"role": "who", "content": "said"})
    assert not problems and [turn.taught for turn in record.turns] == [True, True, True, False]
    record, problems = read({"messages": parts, "loss": 2}, columns={"role": "who", "content": "said", "loss": None})
    assert not problems and all(turn.taught for turn in record.turns), "null leaves a key out of turns, too"
    assert form_of({"messages": parts}, Reading(columns={"role": "who", "content": "said"})) == "openai"


def test_a_form_that_is_forced_and_wrong_is_a_problem_that_names_the_key(read):
    assert not read(ROWS["VQA"], format="columns")[1]
    for form in FORMS.keys() - {"documented", "v1", "llava", "sharegpt"}:
        _, (problem,) = read(WANTED, format=form)
        assert problem.what.startswith(f"is not of the form {form}: it has no ") and "format" in problem.fix


def test_every_form_can_be_forced_in_a_config(tmp_path):
    assert set(typing.get_args(Form)) == FORMS.keys()
    config = load_config(ROOT / "configs" / "demo.yaml", ["format=llava", "columns={question: query, difficulty: null}"])
    assert Reading.of(config) == Reading(format="llava", columns={"question": "query", "difficulty": None},
                                         video_fps=config.video_fps, video_max_frames=config.video_max_frames)  # fmt: skip


def test_the_examples_of_the_page_are_of_the_forms_that_it_names(read):
    table = re.findall(r"^\| `(\w+)` \|.*`(\{.*\})` \|$", (ROOT / "docs" / "data.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert [name for name, _ in table] == [*FORMS]
    for name, example in table:
        entry = json.loads(example)
        record, problems = read(entry)
        assert form_of(entry) == name and not problems and len(record.media) == (name != "alpaca")


def test_the_packed_records_of_qwenlm_are_records_of_their_own(folder, tmp_path):
    (tmp_path / "train.json").write_text(json.dumps([[ROWS["2U1's"], WANTED], SAME["llava"]]))
    tally = Tally()
    records, problems, total = read_records(tmp_path / "train.json", folder, tally=tally)
    assert not problems and total == 3
    assert [record.where for record in records] == ["train.json[0][0]", "train.json[0][1]", "train.json[1]"]
    assert tally.forms == {"llava": 2, "documented": 1}


def test_the_same_trouble_in_every_record_is_one_line(folder):
    problems, media = [], Media(folder, AS_FOUND)
    for number in range(2000):
        read_entry(documented("q", "a", source="web"), f"train.json[{number}]", media, problems)
        read_entry({"image": "a.png", "question": "q", "answer": 3}, f"train.json[{number}]", media, problems)
    assert [group.count for group in alike(problems)] == [2000, 2000]


# ---- videos ----

FILM = documented(f"<video>film.mp4</video>\n{QUESTION}", ANSWER)
FRAMES = documented(f"<video>frames</video>\n{QUESTION}", ANSWER)
TALK = f"<video>\n{QUESTION}"
LIST = [f"frames/{number}.png" for number in range(4)]
FILMS = {
    "QwenLM's": {"video": "film.mp4", "conversations": [{"from": "human", "value": TALK}, {"from": "gpt", "value": ANSWER}]},
    "2U1's list": {"id": "s", "video": ["film.mp4"], "conversations": [{"from": "human", "value": TALK}, {"from": "gpt", "value": ANSWER}]},
    "LLaMA-Factory's": {"messages": messages(TALK, ANSWER), "videos": ["film.mp4"]},
    "Qwen's parts": {"messages": messages([{"type": "video", "video": "film.mp4"}, text(QUESTION)], ANSWER)},
    "DashScope's url": {"messages": messages([{"type": "video_url", "video_url": {"url": "film.mp4"}}, text(QUESTION)], ANSWER)},
    "a row": {"video": "film.mp4", "question": QUESTION, "answer": ANSWER},
}  # fmt: skip
FRAME_LISTS = {
    "QwenLM's": {"video": LIST, "conversations": [{"from": "human", "value": TALK}, {"from": "gpt", "value": ANSWER}]},
    "LLaMA-Factory's and ms-swift's": {"messages": messages(TALK, ANSWER), "videos": [LIST]},
    "Qwen's parts": {"messages": messages([{"type": "video", "video": LIST}, text(QUESTION)], ANSWER)},
    "a row": {"video": LIST, "question": QUESTION, "answer": ANSWER},
}


@pytest.fixture(scope="module")
def films(folder) -> Path:
    """A film and a folder of frames beside the pictures."""
    write_film(folder / "film.mp4", 56, 56)
    (folder / "frames").mkdir()
    for number in range(4):
        Image.new("RGB", (56, 56), (number, 0, 0)).save(folder / f"frames/{number}.png")
    return folder


@pytest.mark.parametrize(("entry", "wanted"), [*((entry, FILM) for entry in FILMS.values()),
                                               *((entry, FRAMES) for entry in FRAME_LISTS.values())])  # fmt: skip
def test_a_video_is_the_same_in_every_form(entry, wanted, read, films, chat):
    (record, problems), (same, none) = read(entry), read(wanted)
    assert not problems and not none and written(chat, record) == written(chat, same)
    assert record.turns == same.turns and len(record.media) == 1


def test_a_video_s_own_settings_count_and_others_are_named(read, films):
    entry = {"messages": messages([{"type": "video", "video": "film.mp4", "nframes": 4, "max_pixels": 4000}, text("q")], "a")}
    record, problems = read(entry)
    assert not problems and len(record.media[0].indices) == 4 and record.media[0].max_pixels == 4000
    _, (problem,) = read({"messages": messages([{"type": "video", "video": "film.mp4", "video_start": 1}, text("q")], "a")})
    assert problem.what == 'has a key "video_start", which is not read'


def test_pictures_and_videos_of_one_record_are_told_apart_in_their_order(read, films):
    entry = {"messages": messages("<video> <image>\n<video>q", "a"), "images": ["a.png"], "videos": ["film.mp4", LIST]}
    record, problems = read(entry)
    assert not problems and [part if isinstance(part, str) else part.name for part in record.turns[0].parts] == [
        "film.mp4", " ", "a.png", "0.png", "q",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "value", ["<video>" * 200_000, "<video>" * 100_000 + "</video>", "</video>" * 200_000, "<image>" * 200_000]
)
def test_hostile_placeholders_take_linear_time(value, read):
    """In quadratic time each of them would run into the time limit of the tests."""
    assert read({"messages": messages(value, "a"), "videos": ["x"], "images": ["a.png"]})[1]


# ---- nothing is dropped without a word ----

ALL_KEYS = {
    *keys.IDS, *lists.READ, *rows.QUESTION, *rows.ANSWER, *rows.PICTURE, *rows.VIDEO, *rows.BESIDE, *turns.SAYS, *turns.OLD, *turns.NEW,
    *turns.KINDS, *turns.OPTIONS["image"], *turns.OPTIONS["video"], "conversations", "messages", "texts", "conversation", "human", "detail", "input", "name", "index",
    "type", "url", "function", "arguments", "ref", "bbox", "bbox_type", "image_id",
}  # fmt: skip
JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda of: st.lists(of) | st.dictionaries(st.text(), of),
                    max_leaves=4)  # fmt: skip


def objects_in(value) -> list[dict]:
    """The object and all objects within it, but for what a tool or a call holds, which is the tool's own."""
    found = [value] if isinstance(value, dict) else []
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        found += objects_in(inner) if key not in ("arguments", "tools") else []
    return found


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(sorted(EVERY)), level=st.integers(0, 99), key=st.text(min_size=1), value=JSON)
def test_a_random_key_at_any_level_is_named(name, level, key, value, folder):
    entry = copy.deepcopy(EVERY[name])
    places = objects_in(entry)
    place = places[level % len(places)]
    if key in ALL_KEYS or key in place:
        key += "\0zz"
    place[key] = value
    problems = []
    assert read_entry(entry, "", Media(folder, AS_FOUND), problems) is None
    assert any(problem.what == f'has a key "{key[:60]}", which is not read' for problem in problems)


@pytest.mark.parametrize("name", EVERY)
def test_a_key_that_is_known_is_read_or_named_wherever_it_stands(name, folder):
    """Read: the record is another one. A key known in one form or at one level must not pass in silence at another."""
    media = Media(folder, AS_FOUND)
    plain = read_entry(EVERY[name], "", media, [])
    assert plain
    for level in range(len(objects_in(EVERY[name]))):
        for key in sorted(ALL_KEYS):
            entry = copy.deepcopy(EVERY[name])
            place = objects_in(entry)[level]
            if key in place or (level == 0 and key in keys.IDS) or (key in ("id", "index", "type") and place is not entry):
                continue
            place[key] = "zz"
            problems = []
            record = read_entry(entry, "", media, problems)
            assert problems or record != plain, (level, key)


# ---- files that are broken in every way ----

ODD = [None, True, False, 0, 1, -1, 0.5, 1e308, 10**40, "", " ", "a.png", "<image>", "<video>", "<img>", "</img>", "<img>a.png</img>",
       "<|im_end|>", "\ud83d", "user", "assistant", "tool", "system", [], [[]], {}, [None], ["a.png"], {"url": "a.png"},
       [{"role": "user", "content": "q"}], "[]", "{}", '{"name": "a", "arguments": "{}"}', "<bbox>", "<ref-object>", "x" * 5000,
       "<image>" * 500]  # fmt: skip


def mutated(draw: random.Random) -> bytes:
    """A meta-file of a few entries of any form, broken somewhere."""
    names = draw.choices(sorted(EVERY), k=draw.randint(1, 4))
    entries = [copy.deepcopy(EVERY[name]) for name in names]
    for _ in range(draw.randint(1, 4)):
        holders = [entries]
        for holder in holders:
            inner = holder.values() if isinstance(holder, dict) else holder
            holders += [value for value in inner if isinstance(value, dict | list)]
        holder = draw.choice([holder for holder in holders if holder] or [entries])
        if not holder:
            continue
        at = draw.choice(sorted(holder)) if isinstance(holder, dict) else draw.randrange(len(holder))
        way = draw.randrange(5)
        if way == 0:
            del holder[at]
        elif way == 1:
            holder[at] = copy.deepcopy(draw.choice(ODD))
        elif way == 2:
            holder[at] = copy.deepcopy(draw.choice(draw.choice([[*EVERY.values()], holders])))
        elif way == 3 and isinstance(holder, dict):
            holder[draw.choice(sorted(ALL_KEYS))] = copy.deepcopy(draw.choice(ODD))
        elif isinstance(holder, list):
            holder.insert(at, copy.deepcopy(draw.choice(holder)))
    lines = draw.random() < 0.5 and entries
    said = "\n".join(map(json.dumps, entries)) if lines else json.dumps(entries)
    raw = bytearray(said.encode())
    for _ in range(draw.choice((0, 0, 0, 1, 3))):
        if raw:
            at = draw.randrange(len(raw))
            raw[at : at + draw.randint(0, 3)] = draw.randbytes(draw.randint(0, 2))
    return bytes(raw[: draw.randrange(len(raw) + 1)] if draw.random() < 0.05 else raw)


def test_broken_files_end_in_problems_and_in_right_counts(folder, tmp_path, chat):
    """Each entry is a record or has a problem, none is both, and every record can be written. QWENVL_FT_FUZZ=5000 tries so many."""
    draw = random.Random(0)
    for number in range(int(os.environ.get("QWENVL_FT_FUZZ", "250"))):
        raw = mutated(draw)
        (tmp_path / "train.json").write_bytes(raw)
        records, problems, total = read_records(tmp_path / "train.json", folder)
        good = {record.where for record in records}
        bad = {problem.where.split(".messages")[0].split(".conversations")[0] for problem in problems}
        assert len(good) == len(records) <= total and not good & bad, (number, raw)
        assert total == len(records) or problems, (number, raw)
        assert all(str(problem.where) and problem.what and problem.fix for problem in problems), (number, raw)
        for record in records:
            assert all(isinstance(turn, Turn) for turn in record.turns)
            if not record.tools and not any(turn.calls or turn.role == "tool" for turn in record.turns) and not any(
                isinstance(part, Box) for turn in record.turns for part in turn.parts
            ):  # fmt: skip
                chat.write_scripts(record)
