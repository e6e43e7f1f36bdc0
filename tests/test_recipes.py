"""The commands of docs/recipes are run as they stand, in a folder like the checkout; only the numbers of records and of steps are cut."""

import contextlib
import hashlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from qwenvl_ft.cli.main import main
from tests.conftest import ROOT, TINY
from tests.test_readme import BASE, PAGES, RECIPES, commands, text_of

# What is appended to a command so that it costs a second.
FEWER = {
    "make_recipe_data.py": ["--records", "8"],
    "train": ["max_steps=1", "rows_per_step=1", "row_tokens=700"],
    "eval": ["--limit", "2", "--max-new-tokens", "8"],
}


def run(command: str) -> str:
    """Runs a command in the current folder; returns its name. The 7B of the forecasts is the tiny base here."""
    words = shlex.split(command)
    if words[0] == "python":
        named = Path(words[1]).name
        subprocess.run([sys.executable, *words[1:], *FEWER[named]], check=True)
        return named
    words = ["qwenvl-ft", *words] if words[0] == "validate-meta" else words
    assert words[0] == "qwenvl-ft", command
    try:
        main([*words[1:], *FEWER.get(words[1], [])])
    except SystemExit as done:
        assert done.code in (0, None), command
    return words[1]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_runs_from_data_to_a_merged_model(recipe, tmp_path):
    page = PAGES["en"][recipe]
    for name in ("data/sample", "data/tiny", "configs", "scripts"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / BASE).parent.mkdir()
    (tmp_path / BASE).symlink_to(TINY)
    with contextlib.chdir(tmp_path):
        ran = [run(command) for command in commands(page)]
        made = [] if recipe == "recipes/charts" else ["make_recipe_data.py"]
        assert ran == [*made, "validate-meta", "plan", "eval", "train", "eval", "export", "ask", "plan"]
        named = re.findall(r"`((?:data|runs)/[\w./-]+)`", text_of(page))
        assert named and [name for name in named if not Path(name).exists()] == []


@pytest.mark.parametrize("kind", ["documents", "boxes", "films"])
def test_no_medium_is_both_trained_on_and_held_out(kind, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from make_recipe_data import records

    made = records(kind, 120, 0, tmp_path)
    assert {split: len(of) for split, of in made.items()} == {"train": 120, "eval": 30}
    train, held_out = (
        {hashlib.sha256(file.read_bytes()).hexdigest() for file in tmp_path.glob(f"{split}-*")} for split in ("train", "eval")
    )
    assert (len(train), len(held_out), train & held_out) == (120, 30, set())


@pytest.mark.parametrize("page", [PAGES[language][recipe] for language in PAGES for recipe in RECIPES])
def test_a_recipe_is_a_page(page):
    assert len(text_of(page).splitlines()) <= 60
