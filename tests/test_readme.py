"""The commands and snippets of README.md and of docs/ are run as they stand, in a folder like the checkout where the tiny base has
the big one's name. Only what a machine without a network lacks is replaced: the download, a port, a URL's host.
"""

import ast
import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path

import httpx
import pytest
from PIL import Image

from qwenvl_ft.cli.main import main
from tests.conftest import ROOT, SAMPLE, TINY
from tests.runs import write_film
from tests.serving import data_url

TOPICS = [
    "data",
    "training",
    "memory",
    "ask",
    "serve",
    "board",
    "download",
    "pai",
]  # in the order in which their commands run, after those of README
RECIPES = ["recipes/charts", "recipes/documents", "recipes/boxes", "recipes/films"]
PAGES = {  # of each language
    "en": {"README": "README.md", **{topic: f"docs/{topic}.md" for topic in TOPICS + RECIPES}},
    "zh": {"README": "README_zh.md", **{topic: f"docs/zh/{topic}.md" for topic in TOPICS + RECIPES}},
}
ELSEWHERE = {"pai": "tests/cloud/test_pai.py", **dict.fromkeys(RECIPES, "tests/test_recipes.py")}  # who runs their commands
CORE = ["qwenvl_ft/train/loop.py", "qwenvl_ft/data/rows.py", "qwenvl_ft/export/merge.py"]  # a click from the README each
BASE = Path("models/Qwen2-VL-7B-Instruct")
CHART = SAMPLE / "images" / "two_col_2954.png"
ADDRESS = "http://127.0.0.1:8000"
SMALL = ["max_steps=1", "rows_per_step=1", "row_tokens=700", "dataloader_num_workers=0", "gradient_checkpointing=false"]


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, kind: str) -> list[str]:
    """The code blocks of a kind: bash is run, sh is curl's."""
    return re.findall(rf"^```{kind}\n(.*?)^```", text_of(page), re.DOTALL | re.MULTILINE)


def commands(page: str) -> list[str]:
    """The lines of the bash blocks without their comments."""
    lines = [re.sub(r"\s+#.*", "", line) for block in blocks(page, "bash") for line in block.splitlines()]
    return [line for line in lines if line]


def snippets(page: str) -> list[str]:
    """The Python of a table of documented snippets."""
    rows = [line for line in text_of(page).splitlines() if line.startswith("| ")]
    return re.findall(r"`((?:engine\.|Engine\.)[^`]+)`", "\n".join(rows))


def same_code(one: str, other: str) -> bool:
    """Equal but for comments."""
    return ast.dump(ast.parse(one)) == ast.dump(ast.parse(other))


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A folder like the checkout, with the pictures that stand for the reader's own, after every command but `serve`."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("data/sample", "configs", "scripts"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(ROOT / name)
    (folder / BASE).parent.mkdir()
    (folder / BASE).symlink_to(TINY)
    for name in ("picture.png", "1.png"):
        shutil.copy(CHART, folder / name)
    Image.open(CHART).convert("L").save(folder / "2.png")
    write_film(folder / "film.mp4", 336, 252)
    (folder / "questions.jsonl").write_text(blocks("docs/ask.md", "json")[0].splitlines()[0] + "\n")
    with contextlib.chdir(folder):
        pages = {topic: page for topic, page in PAGES["en"].items() if topic not in ELSEWHERE}
        ran = {topic: [name for name in map(run, commands(page)) if name] for topic, page in pages.items()}
    assert ran == {
        "README": ["download", "cp", "validate-meta", "show", "plan", "train", "eval", "export", "ask"],
        "data": ["convert", "validate-meta", "show"],
        "training": ["plan"],
        "memory": ["plan"],
        "ask": ["ask", "compare"],
        "serve": ["serve", "serve", "serve"],
        "board": ["board", "board", "board"],
        "download": ["doctor"],
    }
    return folder


def run(command: str) -> str:
    """Runs a command in the current folder; returns its name, nothing for one that is left out."""
    words = shlex.split(command)
    if words[0] == "cp":
        subprocess.run(command, shell=True, check=True)
        for name in ("train", "eval"):  # a few records are enough here
            path = Path(f"data/{name}.json")
            path.write_text(json.dumps(json.loads(path.read_text())[:3]))
        return "cp"
    if "--config_file" in words:  # wants several GPUs: the launch file is read, and the settings are planned with
        from accelerate.commands.config.config_args import load_config_from_file

        assert load_config_from_file(words[words.index("--config_file") + 1]).distributed_type == "MULTI_GPU"
        words = ["qwenvl-ft", "plan", *words[words.index("train.py") + 1 :]]
    if words[0] == "accelerate":
        words = ["qwenvl-ft", "train", *words[words.index("train.py") + 1 :], *SMALL]
    if words[0] == "validate-meta":
        words = ["qwenvl-ft", *words]
    if words[0] != "qwenvl-ft":
        return ""
    named = words[1]
    if named == "download":  # has tests of its own; here its options must exist
        words = [*words, "--help"]
    if named == "serve" or (named == "board" and "--export" not in words):
        words = [*words, "--help"]
    try:
        main(words[1:])
    except SystemExit as done:
        assert done.code in (0, None), command
    return named


@pytest.fixture
def there(checkout, monkeypatch):
    """The tests' own folder is the checkout."""
    monkeypatch.chdir(checkout)
    return checkout


def test_every_command_runs_and_leaves_what_the_pages_say(there):
    assert (there / "runs/first/predictions-eval.jsonl").is_file() and (there / "runs/first-merged/config.json").is_file()
    wanted = json.loads(blocks("docs/ask.md", "json")[0].splitlines()[1])
    found = json.loads((there / "answers.jsonl").read_text())
    assert list(found) == list(wanted) and (found["line"], found["id"]) == (wanted["line"], wanted["id"])
    assert len(found["asked"]) == len(wanted["asked"])


@pytest.mark.parametrize("topic", PAGES["en"])
def test_a_chinese_page_has_the_same_commands_and_snippets(topic):
    page, chinese = PAGES["en"][topic], PAGES["zh"][topic]
    assert commands(chinese) == commands(page)
    assert snippets(chinese) == snippets(page)
    for kind in ("sh", "json"):
        assert blocks(chinese, kind) == blocks(page, kind)
    pairs = list(zip(blocks(chinese, "python"), blocks(page, "python"), strict=True))
    assert len(pairs) == {"README": 1, "ask": 1, "serve": 3}.get(topic, 0) and all(same_code(*pair) for pair in pairs)
    assert text_of(chinese).count("\n## ") == text_of(page).count("\n## ")
    assert len(re.findall(r"[\u4e00-\u9fff]", text_of(chinese))) > 100


@pytest.mark.parametrize("language", PAGES)
def test_the_first_page_is_short_and_leads_to_the_core_in_one_click(language):
    page = PAGES[language]["README"]
    lines = text_of(page).splitlines()
    links = set(re.findall(r"\]\(([^)#:]+)\)", "\n".join(lines)))
    assert len(lines) <= 150 and links >= {*CORE, *list(PAGES[language].values())[1:]}
    first = "\n".join(lines[:40])
    assert len(re.findall(r"!\[", first)) == 1 and "docs/show.svg" in first and {"make demo", "make test"} <= set(commands(page))
    assert first.count("```bash") == 1
    rooms = {room.name for room in (ROOT / "qwenvl_ft").iterdir() if (room / "__init__.py").is_file()}
    assert rooms == {link.removeprefix("qwenvl_ft/") for link in links if link.startswith("qwenvl_ft/")} & rooms


@pytest.mark.parametrize("language", PAGES)
def test_the_readmes_block_of_python_runs(language, there, capsys):
    names: dict = {}
    exec(blocks(PAGES[language]["README"], "python")[0], names)
    assert len(names["found"].records) == 3 and not names["found"].problems and names["config"].lora_rank == 32
    question = [{"role": "user", "content": [{"image": "data/images/two_col_103562.png"}, "What is shown?"]}]
    assert capsys.readouterr().out.strip() == names["engine"].ask(question).strip() != ""


@pytest.mark.parametrize("language", PAGES)
def test_the_engines_block_and_every_snippet_of_the_table_run(language, there, capsys):
    page = PAGES[language]["ask"]
    names: dict = {}
    exec(blocks(page, "python")[0], names)
    said = capsys.readouterr().out
    assert names["engine"].ask(names["messages"]) in said
    web = HTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=there))
    threading.Thread(target=web.serve_forever, daemon=True).start()
    replaced = {
        "https://example.com": f"http://127.0.0.1:{web.server_port}",
        "data:image/png;base64,...": data_url(there / "picture.png"),
    }
    answers = {}
    for snippet in snippets(page):
        code = snippet
        for usual, here in replaced.items():
            code = code.replace(usual, here)
        answers[snippet] = eval(code, names)
    web.shutdown()
    web.server_close()
    engines = [answer for answer in answers.values() if not isinstance(answer, str | list)]
    assert len(answers) == 9 and len(engines) == 2
    of_one_picture = [answer for snippet, answer in answers.items() if re.search(r"picture\.png|base64", snippet)]
    assert len(of_one_picture) == 3 and len(set(of_one_picture)) == 1 and of_one_picture[0]
    batch = next(answer for answer in answers.values() if isinstance(answer, list))
    assert batch == [of_one_picture[0], names["engine"].ask("Who are you?")]  # 1.png is the same picture


@pytest.fixture(scope="module")
def address(checkout):
    """Where the first server of serve.md is, started as it says but for the port."""
    words = shlex.split(commands("docs/serve.md")[0])
    words = [str(Path(sys.executable).parent / words[0]), *words[1 : words.index("--port")], "--port", "0"]
    environment = {**os.environ, "COLUMNS": "300", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        words, cwd=checkout, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as server:
        try:
            at = server.stdout.readline().split(" at ")[1].split("/v1")[0]
            until = time.monotonic() + 60
            while True:
                with contextlib.suppress(httpx.ConnectError):
                    httpx.get(f"{at}/health")
                    break
                assert time.monotonic() < until and server.poll() is None
                time.sleep(0.1)
            yield at
        finally:
            server.kill()


@pytest.mark.parametrize("language", PAGES)
def test_the_clients_get_the_engines_answer(language, there, address, capsys, monkeypatch):
    import dashscope

    monkeypatch.setattr(dashscope, "api_key", None)  # put back at the end, as the address is
    monkeypatch.setattr(dashscope, "base_http_api_url", None)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    page, answers = PAGES[language]["serve"], []
    for client in blocks(page, "python"):
        assert ADDRESS in client
        exec(client.replace(ADDRESS, address), {})
        answers.append(capsys.readouterr().out.strip())
    if shutil.which("curl"):
        (command,) = blocks(page, "sh")
        done = subprocess.run(["bash", "-c", command.replace(ADDRESS, address)], text=True, capture_output=True, check=True)
        answers.append(json.loads(done.stdout)["choices"][0]["message"]["content"].strip())
    from qwenvl_ft import Engine

    question = [{"role": "user", "content": [{"image": "picture.png"}, "What is shown?"]}]
    assert set(answers) == {Engine.open("runs/first-merged").ask(question, 128).strip()} != {""}


WRITTEN = [*(page for pages in PAGES.values() for page in pages.values()), "CONTRIBUTING.md", "AGENTS.md"]


@pytest.mark.parametrize("page", WRITTEN)
def test_the_files_and_headings_that_a_page_names_exist(page):
    """A link is read from the page's folder, a name such as `configs/lora.yaml` from the checkout."""
    text = text_of(page)
    links = re.findall(r"\]\(([^):#]*)(?:#([^)]+))?\)", text)
    named = re.findall(r"`(?:python )?((?:configs|scripts|tests|qwenvl_ft|docs)/[\w./-]+)", text)
    assert links or named
    assert [name for name in named if not (ROOT / name).exists()] == []
    for link, heading in links:
        target = (ROOT / page).parent / link if link else ROOT / page
        assert target.exists(), link
        if heading:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in [re.sub(r"[^\w-]", "", name.lower().replace(" ", "-")) for name in headings], heading


@pytest.mark.parametrize("language", PAGES)
def test_the_extras_that_the_pages_name_are_those_of_the_package(language):
    import tomllib

    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    text = "\n".join(map(text_of, PAGES[language].values()))
    assert set(re.findall(r"pip install '\.\[(\w+)\]'", text)) <= extras
    assert extras <= set(re.findall(r"`(\w+)`", text))


def test_make_has_the_targets_of_the_pages():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"\bmake ([\w./]+)", "\n".join(["\n".join(commands("README.md")), text_of("CONTRIBUTING.md")]))
    assert {"demo", "test", "check"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), target


def test_lora_yaml_names_every_key_with_a_comment_and_its_default():
    from qwenvl_ft.config import Config, load_config

    lines = [line for line in (ROOT / "configs/lora.yaml").read_text().splitlines() if line and not line.startswith("#")]
    assert {line.split(":")[0] for line in lines} == set(Config.model_fields) and all("#" in line for line in lines)
    config = load_config(ROOT / "configs/lora.yaml")
    for name, field in Config.model_fields.items():
        assert field.is_required() or name == "train_data_dir" or getattr(config, name) == field.default, name


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_config_loads(path):
    from ruamel.yaml import YAML

    from qwenvl_ft.config import load_config

    if "distributed_type" in YAML(typ="safe").load(path.read_text()):
        from accelerate.commands.config.config_args import load_config_from_file

        assert load_config_from_file(str(path)).num_processes == 8
    else:
        assert load_config(path).model
