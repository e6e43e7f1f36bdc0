"""What is wrong with a folder is said in one place: `doctor` and whoever opens the folder say the same of it."""

import json
import shutil

import pytest

from qwenvl_ft.data.chat import open_chat
from qwenvl_ft.errors import UserError
from qwenvl_ft.folders.model import read_model_json, read_template
from qwenvl_ft.hub.doctor import examine
from qwenvl_ft.infer.engine import check_folders
from tests.conftest import TINY


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    return folder


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def into(name, template):
    """Moves the chat template to another file; `template` makes of its text what stands there."""

    def move(folder):
        text = (folder / "chat_template.jinja").read_text()
        (folder / "chat_template.jinja").unlink()
        if not (folder / name).is_file():
            (folder / name).write_text("{}")
        edit(folder / name, chat_template=template(text))

    return move


def several(text):
    return [{"name": "tool_use", "template": "no"}, {"name": "default", "template": text}]


def cached(folder):
    """Moves the model to where ModelScope's client puts it below a cache_dir. Returns that folder."""
    below = folder / "models" / "Qwen--Qwen2-VL-2B-Instruct" / "snapshots" / "master"
    below.mkdir(parents=True)
    for path in [path for path in folder.iterdir() if path.is_file()]:
        path.rename(below / path.name)
    return below


WHOLE = {
    "as it is": lambda folder: None,
    "a template in processor_config.json": into("processor_config.json", lambda text: text),
    "a template in chat_template.json": into("chat_template.json", lambda text: text),
    "a template in tokenizer_config.json": into("tokenizer_config.json", lambda text: text),
    "named templates in tokenizer_config.json": into("tokenizer_config.json", several),
    "named templates in processor_config.json": into(
        "processor_config.json", lambda text: {of["name"]: of["template"] for of in several(text)}
    ),
}
BROKEN = {
    "a template of another name only": into("tokenizer_config.json", lambda text: [{"name": "rag", "template": text}]),
    "no template": lambda folder: (folder / "chat_template.jinja").unlink(),
    "vocab.json without tokenizer.json": lambda folder: (folder / "tokenizer.json").rename(folder / "vocab.json"),
    "no processor": lambda folder: (folder / "processor_config.json").unlink(),
    "a processor without limits": lambda folder: (folder / "processor_config.json").write_text("{}"),
    "a config of another family": lambda folder: (folder / "config.json").write_text(
        '{"model_type": "llava", "vision_config": {}}'
    ),
    "a folder above the model": lambda folder: cached(folder),
    "no config": lambda folder: (folder / "config.json").unlink(),
    "a cut file": lambda folder: (folder / "model.safetensors").write_bytes((TINY / "model.safetensors").read_bytes()[:-9]),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "a pointer": lambda folder: (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n"),
}


@pytest.mark.parametrize("form", WHOLE)
def test_what_can_be_opened_has_no_problem_for_doctor_either(model, form):
    """A template in processor_config.json only: doctor was content, ask said that there is none."""
    WHOLE[form](model)
    text = (TINY / "chat_template.jinja").read_text()
    assert read_template(model) == text and check_folders(model, []) and examine(model).problems == []


@pytest.mark.parametrize("damage", BROKEN)
def test_what_cannot_be_opened_is_named_by_doctor_in_the_same_words(model, damage):
    """vocab.json without tokenizer.json: doctor was content, ask was not."""
    BROKEN[damage](model)
    with pytest.raises(UserError) as refused:
        check_folders(model, [])
    known = examine(model).problems
    assert known and all(problem in known for problem in refused.value.problems)


def test_of_a_folder_above_a_model_only_that_is_said(model):
    """There were five problems, and the fix of each was to download it once more."""
    below = cached(model)
    with pytest.raises(UserError) as refused:
        check_folders(model, [])
    assert [problem.fix for problem in refused.value.problems] == [f"give a model's folder below it, such as {below}"]
    check_folders(below, [])


@pytest.mark.parametrize("form", [form for form in WHOLE if "tokenizer" not in form])
def test_the_template_is_the_one_that_transformers_takes(model, form):
    from transformers import AutoProcessor

    WHOLE[form](model)
    found = AutoProcessor.from_pretrained(model).chat_template
    assert (found["default"] if isinstance(found, dict) else found) == read_template(model)


def test_of_two_templates_the_one_counts_that_transformers_takes(model):
    from transformers import AutoProcessor

    (model / "chat_template.json").write_text(json.dumps({"chat_template": "{{ 'json' }}"}))
    assert AutoProcessor.from_pretrained(model).chat_template == read_template(model) == "{{ 'json' }}"
    assert (chat := open_chat(model)).said(chat.prompt([])) == "json"


def test_json_that_is_nested_too_deeply_is_a_problem_of_its_file(tmp_path):
    """100,000 brackets in config.json were a traceback of RecursionError."""
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="is no JSON object"):
        read_model_json(tmp_path / "config.json")
