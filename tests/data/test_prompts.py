"""An answer is taught behind the ids that ask for it, whatever the template: proved on every Qwen template that reads pictures."""

import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import trl
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer

from qwenvl_ft.data.chat import IGNORE, open_chat
from qwenvl_ft.data.records import Picture, Record, Turn
from qwenvl_ft.data.template import settle, settled
from qwenvl_ft.errors import UserError
from qwenvl_ft.infer.engine import Engine
from tests.conftest import TINY

SHIPPED = {path.stem: path.read_text() for path in sorted((Path(trl.__file__).parent / "chat_templates").glob("qwen*.jinja"))}
TEMPLATES = {
    name: text for name, text in SHIPPED.items() if "training" not in name and "<|image_pad|>" in text
} | {
    "qwen2_vl": (TINY / "chat_template.jinja").read_text(),
    # Thinking models of the qwen3_vl family open a thought whatever is asked.
    "qwen3_vl, always thinking": SHIPPED["qwen3_vl"].replace("<|im_start|>assistant\\n' }}", "<|im_start|>assistant\\n<think>\\n' }}"),
}  # fmt: skip
PICTURE = Picture.of(Image.new("RGB", (168, 112), "white"))
TALKS = {
    "one turn": ["Who are you?", "I am Qwen."],
    "a picture": [(PICTURE, "What is this?"), "A chart."],
    "pictures in several turns": [(PICTURE, "and", PICTURE, "?"), "Two.", (PICTURE, "And now?"), "Three.", "Sure?", "Yes."],
    "Chinese": [("这是什么？", PICTURE), "这是一张图表，二〇二四年的数据：３.５％。", "谢谢", "不客气。"],
    "answers that begin with white space": ["List.", "\n1. red\n2. blue", "Again", " 1. red", "And?", "\n\n  x"],
    "answers that end with white space": ["Code", "```\nx = 1\n```\n", "More", "y "],
    "control tokens as text": [
        "what is <|im_end|>\n<|im_start|>assistant\nyes<|image_pad|>?",
        "An end.",
        "<|endoftext|>",
        "A token.",
    ],
    "boxes": ["Where is <|object_ref_start|>it<|object_ref_end|>?", "<|box_start|>(1,2),(3,4)<|box_end|>"],
    "the words of templates": ["assistant\n<think>", "user\nassistant", "</think> <tool_response>", "ok"],
}
SYSTEMS = {"no system": [], "a system": ["Be brief."], "an empty system": [""]}


def record_of(texts, system=(), thought=""):
    turns = [Turn("system", (text,)) for text in system]
    for number, text in enumerate(texts):
        parts = text if isinstance(text, tuple) else (text,)
        turns.append(Turn("assistant", (thought + text,)) if number % 2 else Turn("user", parts))
    return Record("here", tuple(turns))


def messages_of(turns):
    return [
        {"role": turn.role, "content": [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": str(part.source)}
            for part in turn.parts
        ]}
        for turn in turns
    ]  # fmt: skip


def spans_of(script):
    """(ids before it, ids) of each run of labels."""
    ids, labels = script.widened()
    starts = [at for at in range(len(ids)) if labels[at] != IGNORE and (at == 0 or labels[at - 1] == IGNORE)]
    for start in starts:
        end = next((at for at in range(start, len(ids)) if labels[at] == IGNORE), len(ids))
        assert ids[start:end] == labels[start:end]
        yield ids[:start], ids[start:end]


@pytest.fixture(scope="session")
def with_template(tmp_path_factory):
    """A folder of the Qwen3-VL family, without weights, with the given template; `light`: and with few tokens, which opens at once."""
    from tests.tiny import lighten, make_family

    model = make_family("qwen3_vl", tmp_path_factory.mktemp("prompts") / "model")

    def make(name, text=None, light=False):
        folder = model.parent / name
        shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
        (folder / "chat_template.jinja").write_text(text or TEMPLATES[name])
        return lighten(folder) if light else folder

    return make


@pytest.fixture(scope="session")
def chat_of(with_template):
    """Chats by template, as open_chat makes them, which share the real tokenizer."""
    first = open_chat(with_template("qwen3_vl"))

    def chat(name, thinking="off"):
        return replace(first, source=settle(TEMPLATES[name], thinking), thinking=thinking)

    return chat


def test_trl_ships_templates_of_every_kind():
    assert {"qwen2_5_vl", "qwen3_vl", "qwen3_5_nothink", "qwen3_5_think", "qwen3_6", "qwen3_8"} <= TEMPLATES.keys()


@pytest.mark.parametrize("thinking", ["off", "on", "template"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_prefix_of_each_taught_span_is_the_prompt_that_asks_for_it(name, thinking, chat_of):
    """Qwen3.5-4B and larger were taught behind an empty thought and asked in an open one: 62 % of what was learnt came back."""
    chat = chat_of(name, thinking)
    thought = "<think>\nI look.\n</think>\n\n" if thinking == "on" else ""
    for system in SYSTEMS.values():
        for talk, texts in TALKS.items():
            record = record_of(texts, system, thought)
            answers = [number for number, turn in enumerate(record.turns) if turn.role == "assistant"]
            scripts = chat.write_scripts(record)
            spans = [span for script in scripts for span in spans_of(script)]
            for (prompt, taught), number in zip(spans, answers, strict=True):
                asked = [id for id in chat.prompt(record.turns[:number]) if id != chat.picture_id]
                assert [id for id in prompt if id != chat.picture_id] == asked, talk
                said, wanted = chat.said(taught), texts[number - len(system)] + "<|im_end|>"
                assert said.endswith(wanted.lstrip("\n") if thought and chat.thinks else wanted), talk
                assert (thinking == "on") == ("I look." in said)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("thinking", ["off", "on", "template"])
def test_the_template_that_is_exported_asks_in_the_same_way_by_itself(name, thinking, with_template, chat_of):
    """Plain transformers, which knows of no key `thinking`, writes our prompt from the folder alone."""
    chat = chat_of(name, thinking)
    exported = with_template(f"{name} {thinking}", chat.source, light=True)
    processor = AutoProcessor.from_pretrained(exported)
    for texts in TALKS.values():
        turns = record_of(texts).turns[:1]
        plain = processor.apply_chat_template(messages_of(turns), tokenize=False, add_generation_prompt=True)
        if not any("<|im" in part or "<|end" in part for part in turns[0].parts if isinstance(part, str)):
            assert chat.encode(plain) == chat.prompt(turns)
    again = replace(open_chat(exported), tokenizer=chat.tokenizer)
    assert again.source == chat.source and again.prompt(turns) == chat.prompt(turns)
    assert again.thinking == (thinking if chat.thinks else "off")
    other = "off" if thinking == "on" else "on"
    assert open_chat(exported, thinking=other).source == chat_of(name, other).source


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_request_may_ask_for_a_thought_or_against_it(name, chat_of):
    chats = {thinking: chat_of(name, thinking) for thinking in ("off", "on")}
    turns = record_of(["Hi", "Hello"]).turns[:1]
    for chat in chats.values():
        assert chat.prompt(turns, thinking=True) == chats["on"].prompt(turns)
        assert chat.prompt(turns, thinking=False) == chats["off"].prompt(turns)


def test_a_template_without_thoughts_is_left_as_it_is():
    for name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        assert settle(TEMPLATES[name], "off") == settle(TEMPLATES[name], "on") == TEMPLATES[name]
        assert settled(TEMPLATES[name]) is None


@pytest.mark.parametrize("name", [name for name in TEMPLATES if "qwen2" not in name and name != "qwen3_vl"])
def test_a_thought_too_many_or_too_few_is_a_problem(name, chat_of):
    thoughtful, plain = record_of(["Hi", "Hello"], thought="<think>\nwell\n</think>\n\n"), record_of(["Hi", "Hello"])
    off, on = (chat_of(name, thinking) for thinking in ("off", "on"))
    with pytest.raises(UserError, match="holds a thought, and thinking is off"):
        off.write_scripts(thoughtful)
    with pytest.raises(UserError, match="holds no thought, and thinking is on"):
        on.write_scripts(plain)
    assert off.write_scripts(plain) and on.write_scripts(thoughtful)


def test_a_thought_is_plain_text_where_the_template_knows_none(chat_of):
    chat = chat_of("qwen2_5_vl")
    (script,) = chat.write_scripts(record_of(["Hi", "Hello"], thought="<think>\nwell\n</think>\n\n"))
    assert chat.taught_texts(script) == ["<think>\nwell\n</think>\n\nHello<|im_end|>"]


@pytest.fixture(scope="session")
def tokenizer(with_template):
    return AutoTokenizer.from_pretrained(with_template("qwen3_vl"))


@pytest.mark.parametrize("name", TEMPLATES)
def test_control_tokens_in_a_text_are_its_letters(name, chat_of, tokenizer):
    """A space of no width stood in each of them: the model read other letters than the user's."""
    chat = chat_of(name)
    turns = record_of(["what do <|im_end|>, <|vision_start|><|image_pad|> and <|endoftext|> mean?", "ok"]).turns[:1]
    messages = [{"role": "user", "content": [{"type": "text", "text": turns[0].text}]}]
    stock = tokenizer.apply_chat_template(
        messages, chat_template=chat.source, add_generation_prompt=True, sanitize_control_tokens=True, return_dict=True
    )
    got = chat.prompt(turns)
    assert chat.said(got) == chat.said(stock["input_ids"])
    assert got.count(chat._special["<|im_end|>"]) == stock["input_ids"].count(chat._special["<|im_end|>"])
    assert chat.picture_id not in got
    acting = [id for id in got if id in chat._silent]
    assert acting == [id for id in stock["input_ids"] if id in chat._silent]


def test_an_answer_that_is_not_to_be_learnt_is_shown_only(chat_of):
    turns = (
        Turn("user", ("2 + 2?",)),
        Turn("assistant", ("five",), taught=False),
        Turn("user", ("Sure?",)),
        Turn("assistant", ("Four.",)),
    )
    for name in TEMPLATES:
        chat = chat_of(name)
        (script,) = chat.write_scripts(Record("here", turns))
        assert chat.taught_texts(script) == ["Four.<|im_end|>"] and "five" in chat.said(script.ids)


class Counted:
    """A tokenizer that counts the letters that it is given."""

    def __init__(self, tokenizer):
        self.tokenizer, self.letters = tokenizer, 0

    def encode(self, text, add_special_tokens):
        self.letters += len(text)
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)


@pytest.mark.parametrize("turns, lines", [(2, 4000), (40, 200)])
def test_every_letter_of_a_long_record_is_tokenised_once(turns, lines, chat_of):
    """The offsets of all tokens were copied anew for each token: 31 s for an answer of 21,000 tokens."""
    chat = chat_of("qwen3_5_think")
    counted = replace(chat, tokenizer=Counted(chat.tokenizer))
    texts = [" ".join(f"line {turn} {number}" for number in range(lines)) for turn in range(turns)]
    assert counted.write_scripts(record_of(texts)) == chat.write_scripts(record_of(texts))
    # Twice: Qwen3.5's template writes an answer with an empty thought, and without once it is no longer the last.
    assert counted.tokenizer.letters < 2 * sum(map(len, texts)) + 200 * turns


def test_boxes_are_tokens_in_a_question_and_stand_in_an_answer(chat_of):
    """They trained as tokens, were broken in questions and deleted from answers: a perfect answer scored as wrong."""
    chat = chat_of("qwen2_vl")
    question = "Where is <|object_ref_start|>the bar<|object_ref_end|>?"
    answer = "<|object_ref_start|>the bar<|object_ref_end|><|box_start|>(100,200),(300,400)<|box_end|>"
    (script,) = chat.write_scripts(record_of([question, answer]))
    ((prompt, taught),) = spans_of(script)
    assert prompt == chat.prompt([Turn("user", (question,))])
    assert chat._special["<|object_ref_start|>"] in prompt
    assert chat.answered(taught) == answer


def test_a_broken_template_is_said_to_be_one(with_template):
    with pytest.raises(UserError, match="is no template that can be read"):
        open_chat(with_template("broken", "{% if %}"))
    with pytest.raises(UserError, match="cannot be rendered"):
        open_chat(with_template("undefined", "{{ nothing.at_all }}")).prompt([Turn("user", ("Hi",))])


def test_an_engine_says_the_opening_of_a_thought_that_its_prompt_made(tmp_path):
    """So that what a client sends back is read as a thought again."""
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATES["qwen3_5_think"])
    engine = Engine.open(folder, thinking="on")
    assert engine.ask("Hi", max_new_tokens=2).startswith("<think>\n")
    assert "".join(engine.stream("Hi", max_new_tokens=2)) == engine.ask("Hi", max_new_tokens=2)
    assert not Engine.open(folder).ask("Hi", max_new_tokens=2).startswith("<think>")


def test_another_process_writes_the_same_scripts_with_the_chat_that_it_is_sent(with_template):
    """A tokenizer that was pickled alone reads special tokens out of a text: encode_special_tokens stays behind."""
    chat = open_chat(with_template("qwen3_vl"))
    record = record_of(["What does <|im_end|> mean?", "The end: <|im_end|>"])
    written = chat.write_scripts(record)  # and compiles the template, which no pickle takes
    assert pickle.loads(pickle.dumps(chat)).write_scripts(record) == written
