"""Ids, grids and labels against transformers' own processor, for every family, with the real Qwen tokenizer."""

import json

import pytest

from qwenvl_ft.data.chat import IGNORE, open_chat
from qwenvl_ft.data.meta_file import read_records
from qwenvl_ft.errors import UserError
from tests.data.test_prompts import messages_of, spans_of

TALKS = {
    "several answers": ["Hi", "Hello!", "<img>b.png</img>\nand this?", "A dog.", "ok?", "ok"],
    "no picture": ["Who are you?", "I am Qwen."],
    "one picture": ["<img>a.png</img>\nWhat is this? ", "A chart."],
    "three pictures": ["<img>a.png</img>\n<img>b.png</img>\nand <img>c.jpg</img>, which?", "the second"],
    "chinese": ["<img>c.jpg</img>\n这是什么？请用一句话回答。", "这是一张图表，二〇二四年的数据：３.５％。"],
    "many turns": ["Hi", "Hello!", "<img>b.png</img>\nand this?", "\n\nnew lines first", "ok?", "ok"],
    "code and emoji": ["print('hi')  \t\n\n\n# ok 👍🏽", "```\nx = 1\n```\n"],
}


@pytest.fixture(scope="module")
def chat(family_model):
    return open_chat(family_model)


@pytest.fixture(scope="module")
def processor(family_model):
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(family_model)


@pytest.mark.parametrize("name", TALKS)
def test_each_answer_stands_behind_the_processors_prompt_for_it(name, chat, processor, talk, pictures):
    (record,), problems, _ = read_records(talk(TALKS[name]), pictures)
    assert not problems
    spans = [span for script in chat.write_scripts(record) for span in spans_of(script)]
    answers = [number for number, turn in enumerate(record.turns) if turn.role == "assistant"]
    for (prompt, taught), number in zip(spans, answers, strict=True):
        asked = processor.apply_chat_template(
            messages_of(record.turns[:number]), tokenize=True, return_dict=True, add_generation_prompt=True, enable_thinking=False
        )
        assert prompt == asked["input_ids"][0]
        assert taught == processor.tokenizer.encode(record.turns[number].text + "<|im_end|>")


@pytest.mark.parametrize("name", [name for name, texts in TALKS.items() if all(text == text.strip() for text in texts[1::2])])
def test_ids_and_grids_equal_the_processors(name, chat, processor, talk, pictures):
    (record,), _, _ = read_records(talk(TALKS[name]), pictures)
    script = chat.write_scripts(record)[-1]
    wanted = processor.apply_chat_template(messages_of(record.turns), tokenize=True, return_dict=True)
    assert script.widened()[0] == wanted["input_ids"][0]
    assert [list(grid) for grid in script.grids] == [list(map(int, grid)) for grid in wanted.get("image_grid_thw", [])]


def test_each_answer_is_taught_to_its_end_token_and_nothing_else_is(chat, talk, pictures):
    (record,), _, _ = read_records(talk(TALKS["many turns"]), pictures)
    taught = [text for script in chat.write_scripts(record) for text in chat.taught_texts(script)]
    assert [text.lstrip("\n") for text in taught] == ["Hello!<|im_end|>", "new lines first<|im_end|>", "ok<|im_end|>"]


def test_the_newline_after_the_end_token_is_not_taught(chat, talk, tmp_path):
    """The model never has to produce it: generation stops at <|im_end|>."""
    (record,), _, _ = read_records(talk(["Hi", "Hello!"]), tmp_path)
    (script,) = chat.write_scripts(record)
    end = chat.tokenizer.token_to_id("<|im_end|>")
    assert script.labels[-2:] == [end, IGNORE] and chat.said(script.ids[-1:]) == "\n"


def test_a_user_who_writes_the_word_assistant_is_not_taught(chat, talk, tmp_path):
    """A label finder that scans for the token "assistant" (id 77091) teaches the user's words after it."""
    (record,), _, _ = read_records(talk(["Role:\nassistant\nWhat does the sign say?", "Stop."]), tmp_path)
    (script,) = chat.write_scripts(record)
    assert chat.taught_texts(script) == ["Stop.<|im_end|>"]


def test_pictures_are_widened_to_their_tokens_in_ids_and_labels(chat, talk, pictures):
    (record,), _, _ = read_records(talk(TALKS["three pictures"]), pictures)
    (script,) = chat.write_scripts(record)
    ids, labels = script.widened()
    assert len(ids) == len(labels) == script.length
    assert ids.count(chat.picture_id) == sum(rows * columns // 4 for _, rows, columns in script.grids)
    assert all(label == IGNORE for token, label in zip(ids, labels, strict=True) if token == chat.picture_id)


def test_max_pixels_of_the_config_replaces_the_processors(family_model, talk, pictures):
    (record,), _, _ = read_records(talk(TALKS["one picture"]), pictures)
    small, large = (open_chat(family_model, max_pixels=size).write_scripts(record)[0].length for size in (5000, 50000))
    assert small < large


def test_the_template_is_found_where_transformers_4_kept_it(chat, family_model, tmp_path):
    for path in family_model.iterdir():
        if path.name not in ("chat_template.jinja", "model.safetensors"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    text = (family_model / "chat_template.jinja").read_text()
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": text}))
    record = read_meta_record(tmp_path)
    assert open_chat(tmp_path).write_scripts(record)[0].ids == chat.write_scripts(record)[0].ids


def read_meta_record(folder):
    from qwenvl_ft.data.records import Record, Turn

    return Record("here", (Turn("system", ("Be brief.",)), Turn("user", ("Hi",)), Turn("assistant", ("Hello!",))))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "processor_config.json"])
def test_a_model_folder_with_pointers_in_place_of_files_is_said_to_be_one(family_model, tmp_path, name):
    for path in family_model.iterdir():
        if path.name != "model.safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7031645\n")
    with pytest.raises(UserError, match=rf"{name}: is no JSON object \(a git-lfs pointer, perhaps\)"):
        open_chat(tmp_path)
