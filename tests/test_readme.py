"""The README's commands are run as they stand, with the sample and the tiny base in place of the reader's data and model."""

import re
import shlex
from pathlib import Path

import pytest

from qwenvl_ft.cli import main
from tests.conftest import ROOT
from tests.runs import few_records

SETTINGS = """
model: data/tiny
train_meta_file: {few}
train_data_dir: data/sample/images
output_dir: {out}
row_tokens: 700
max_steps: 1
dataloader_num_workers: 0
"""


def commands(readme: Path) -> list[str]:
    """The lines of the bash blocks without their comments."""
    blocks = re.findall(r"```bash\n(.*?)```", readme.read_text(encoding="utf-8"), re.DOTALL)
    lines = [re.sub(r"\s+#.*", "", line) for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def test_every_command_of_the_readme_runs(tmp_path, capsys):
    few, out, settings = few_records(tmp_path, 3), tmp_path / "run", tmp_path / "settings.yaml"
    settings.write_text(SETTINGS.format(few=few, out=out))
    mine = {
        "models/Qwen2-VL-7B-Instruct": "data/tiny", "data/train.json": str(few), "data/eval.json": str(few),
        "data/images": "data/sample/images", "configs/lora.yaml": str(settings), "runs/first-merged": f"{out}-merged",
        "runs/first": str(out), "picture.png": "data/sample/images/two_col_2954.png",
    }  # fmt: skip
    ran = []
    for command in commands(ROOT / "README.md"):
        words = [mine.get(word, word) for word in shlex.split(command)]
        if words[0] == "accelerate":
            words = ["qwenvl-ft", "train", *words[words.index("train.py") + 1 :]]
        if words[1] in ("serve", "download"):  # have tests of their own; here their options must exist
            words = [*words[:2], "--help"]
        if words[0] in ("validate-meta", "qwenvl-ft"):
            try:
                main(["validate-meta", *words[1:]] if words[0] == "validate-meta" else words[1:])
            except SystemExit as done:
                assert done.code in (0, None), f"{command}: {capsys.readouterr()}"
            ran.append(words[1] if words[0] == "qwenvl-ft" else "validate-meta")
    assert ran == ["validate-meta", "show", "plan", "train", "eval", "export", "ask", "serve", "download", "doctor"]


def test_the_chinese_readme_has_the_same_commands():
    assert commands(ROOT / "README_zh.md") == commands(ROOT / "README.md")


@pytest.mark.parametrize("readme", ["README.md", "README_zh.md"])
def test_the_files_that_the_readme_names_exist(readme):
    text = (ROOT / readme).read_text(encoding="utf-8")
    named = set(re.findall(r"\]\(([^)#:]+)\)", text)) | set(re.findall(r"`((?:configs|scripts|data)/[\w./-]+)`", text))
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing


def test_make_has_the_targets_of_the_readme():
    makefile = (ROOT / "Makefile").read_text()
    for command in commands(ROOT / "README.md"):
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
