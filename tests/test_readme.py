"""The README's commands and snippets are run as they stand, in a folder like the checkout where the tiny base has the big one's
name. Only what a machine without a network lacks is replaced: the download, a port, a URL's host.
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

READMES = ["README.md", "README_zh.md"]
BASE = Path("models/Qwen2-VL-7B-Instruct")
CHART = SAMPLE / "images" / "two_col_2954.png"
ADDRESS = "http://127.0.0.1:8000"
SMALL = ["max_steps=1", "rows_per_step=1", "row_tokens=700", "dataloader_num_workers=0", "gradient_checkpointing=false"]


def blocks(readme: str, language: str) -> list[str]:
    """The code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / readme).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands(readme: str) -> list[str]:
    """The lines of the bash blocks without their comments."""
    lines = [re.sub(r"\s+#.*", "", line) for block in blocks(readme, "bash") for line in block.splitlines()]
    return [line for line in lines if line]


def snippets(readme: str) -> list[str]:
    """The Python of the table of documented snippets."""
    return re.findall(r"`((?:engine\.|Engine\.)[^`]+)`", "\n".join(table(readme)))


def table(readme: str) -> list[str]:
    """The rows of the table of documented snippets."""
    return [line for line in (ROOT / readme).read_text(encoding="utf-8").splitlines() if line.startswith("| ")]


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
    (folder / "questions.jsonl").write_text(blocks("README.md", "json")[1].splitlines()[0] + "\n")
    with contextlib.chdir(folder):
        ran = [run(command) for command in commands("README.md")]
    assert [name for name in ran if name] == [
        "download", "cp", "validate-meta", "show", "plan", "train", "eval", "export", "ask", "ask", "serve", "serve", "serve", "doctor",
    ]  # fmt: skip
    return folder


def run(command: str) -> str:
    """Runs a command of the README in the current folder; returns its name, nothing for one that is left out."""
    words = shlex.split(command)
    if words[0] == "cp":
        subprocess.run(command, shell=True, check=True)
        for name in ("train", "eval"):  # a few records are enough here
            path = Path(f"data/{name}.json")
            path.write_text(json.dumps(json.loads(path.read_text())[:3]))
        return "cp"
    if words[0] == "accelerate":
        words = ["qwenvl-ft", "train", *words[words.index("train.py") + 1 :], *SMALL]
    if words[0] == "validate-meta":
        words = ["qwenvl-ft", *words]
    if words[0] != "qwenvl-ft":
        return ""
    named = words[1]
    if named == "download":  # has tests of its own; here its options must exist
        words = [*words, "--help"]
    if named == "serve":
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


def test_every_command_of_the_readme_runs_and_leaves_what_it_says(there):
    assert (there / "runs/first/predictions-eval.json").is_file() and (there / "runs/first-merged/config.json").is_file()
    wanted = json.loads(blocks("README.md", "json")[1].splitlines()[1])
    found = json.loads((there / "answers.jsonl").read_text())
    assert list(found) == list(wanted) and (found["line"], found["id"]) == (wanted["line"], wanted["id"])
    assert len(found["asked"]) == len(wanted["asked"])


def test_the_chinese_readme_has_the_same_commands_and_snippets():
    assert commands("README_zh.md") == commands("README.md")
    assert snippets("README_zh.md") == snippets("README.md")
    for language in ("sh", "json"):
        assert blocks("README_zh.md", language) == blocks("README.md", language)
    pairs = list(zip(blocks("README_zh.md", "python"), blocks("README.md", "python"), strict=True))
    assert len(pairs) == 4 and all(same_code(*pair) for pair in pairs)


@pytest.mark.parametrize("readme", READMES)
def test_the_engines_block_and_every_snippet_of_the_table_run(readme, there, capsys):
    names: dict = {}
    exec(blocks(readme, "python")[0], names)
    said = capsys.readouterr().out
    assert names["engine"].ask(names["messages"]) in said
    web = HTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=there))
    threading.Thread(target=web.serve_forever, daemon=True).start()
    replaced = {
        "https://example.com": f"http://127.0.0.1:{web.server_port}",
        "data:image/png;base64,...": data_url(there / "picture.png"),
    }
    answers = {}
    for snippet in snippets(readme):
        code = snippet
        for usual, here in replaced.items():
            code = code.replace(usual, here)
        answers[snippet] = eval(code, names)
    web.shutdown()
    engines = [answer for answer in answers.values() if not isinstance(answer, str | list)]
    assert len(answers) == 9 and len(engines) == 2
    of_one_picture = [answer for snippet, answer in answers.items() if re.search(r"picture\.png|base64", snippet)]
    assert len(of_one_picture) == 3 and len(set(of_one_picture)) == 1 and of_one_picture[0]
    batch = next(answer for answer in answers.values() if isinstance(answer, list))
    assert batch == [of_one_picture[0], names["engine"].ask("Who are you?")]  # 1.png is the same picture


@pytest.fixture(scope="module")
def address(checkout):
    """Where the README's first server is, started as it says but for the port."""
    words = shlex.split(next(command for command in commands("README.md") if command.startswith("qwenvl-ft serve")))
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


@pytest.mark.parametrize("readme", READMES)
def test_the_clients_get_the_engines_answer(readme, there, address, capsys, monkeypatch):
    import dashscope

    monkeypatch.setattr(dashscope, "api_key", None)  # put back at the end, as the address is
    monkeypatch.setattr(dashscope, "base_http_api_url", None)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    answers = []
    for client in blocks(readme, "python")[1:]:
        assert ADDRESS in client
        exec(client.replace(ADDRESS, address), {})
        answers.append(capsys.readouterr().out.strip())
    if shutil.which("curl"):
        (command,) = blocks(readme, "sh")
        done = subprocess.run(["bash", "-c", command.replace(ADDRESS, address)], text=True, capture_output=True, check=True)
        answers.append(json.loads(done.stdout)["choices"][0]["message"]["content"].strip())
    from qwenvl_ft.infer.engine import Engine

    question = [{"role": "user", "content": [{"image": "picture.png"}, "What is shown?"]}]
    assert set(answers) == {Engine.open("runs/first-merged").ask(question, 128).strip()} != {""}


@pytest.mark.parametrize("readme", READMES)
def test_the_files_that_the_readme_names_exist(readme):
    text = (ROOT / readme).read_text(encoding="utf-8")
    named = set(re.findall(r"\]\(([^)#:]+)\)", text)) | set(re.findall(r"`(?:python )?((?:configs|scripts)/[\w./-]+)", text))
    missing = [name for name in named if not (ROOT / name).exists()]
    assert len(named) > 8 and not missing


@pytest.mark.parametrize("readme", READMES)
def test_the_extras_that_the_readme_names_are_those_of_the_package(readme):
    import tomllib

    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    text = (ROOT / readme).read_text(encoding="utf-8")
    assert set(re.findall(r"pip install '\.\[(\w+)\]'", text)) <= extras
    assert extras <= set(re.findall(r"`(\w+)`", text))


def test_make_has_the_targets_of_the_readme():
    makefile = (ROOT / "Makefile").read_text()
    for command in commands("README.md"):
        if command.startswith("make"):
            assert re.search(rf"^{re.escape(command.split()[1])}:", makefile, re.MULTILINE)


def test_lora_yaml_names_every_key_with_a_comment_and_its_default():
    from qwenvl_ft.config import Config, load_config

    lines = [line for line in (ROOT / "configs/lora.yaml").read_text().splitlines() if line and not line.startswith("#")]
    assert {line.split(":")[0] for line in lines} == set(Config.model_fields) and all("#" in line for line in lines)
    config = load_config(ROOT / "configs/lora.yaml")
    for name, field in Config.model_fields.items():
        assert field.is_required() or getattr(config, name) == field.default, name


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_config_loads(path):
    from ruamel.yaml import YAML

    from qwenvl_ft.config import load_config

    if "distributed_type" in YAML(typ="safe").load(path.read_text()):
        from accelerate.commands.config.config_args import load_config_from_file

        assert load_config_from_file(str(path)).num_processes == 8
    else:
        assert load_config(path).model
