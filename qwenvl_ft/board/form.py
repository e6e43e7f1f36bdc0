"""A config as a form: its keys in the order of configs/lora.yaml, each with what is said of it there; and back to YAML.

write({"model": "data/tiny", "train_meta_file": "data/train.json", "output_dir": "runs/first", "seed": "42"})
# model: data/tiny ... without seed, whose default is 42
"""

import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from ruamel.yaml import YAML

from qwenvl_ft.board.effects import CHINESE_EFFECTS
from qwenvl_ft.board.render import yaml
from qwenvl_ft.config import NOT_YAML, Config, load_config
from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.folders.runs import check_output_dir
from qwenvl_ft.folders.shipped import SHIPPED

KEY = re.compile(r"(\w+): .*?#\s*(.*)")
SECTION = re.compile(r"# --- (.*?)(?: \(.*\))? ---")
RUN_NAME = re.compile(r"[A-Za-z0-9_][\w.-]{0,99}", re.ASCII)
LATER = ("resume",)  # the button that goes on has it


@dataclass(frozen=True)
class Field:
    """A key: what it does, its default as YAML (None: it must be given), and what may be chosen, where that is a list."""

    key: str
    effect: str
    default: str | None
    choices: tuple[str, ...]


@lru_cache(maxsize=1)
def sections() -> list[tuple[str, list[Field]]]:
    """(title, its fields) in the order of configs/lora.yaml."""
    text = (SHIPPED / "configs" / "lora.yaml").read_text(encoding="utf-8")
    found: list[tuple[str, list[Field]]] = []
    for line in text.splitlines():
        if title := SECTION.match(line):
            found.append((title[1], []))
        elif (said := KEY.match(line)) and said[1] in Config.model_fields and said[1] not in LATER:
            of = Config.model_fields[said[1]]
            default = None if of.is_required() else "" if of.default is None else yaml(of.default)
            choices = get_args(of.annotation) if get_origin(of.annotation) is Literal else ("true", "false") * (
                isinstance(of.default, bool) and of.annotation is bool)  # fmt: skip
            found[-1][1].append(Field(said[1], said[2], default, tuple(map(str, choices))))
    return found


def shown() -> dict[str, Any]:
    """What the page of the form shows of every key, in either language."""
    return {"sections": sections(), "effects": CHINESE_EFFECTS}


def filled(settings: Mapping[str, Any]) -> dict[str, str]:
    """A run's settings as the texts of the form; those with their default are left empty."""
    fields = {of.key: of for _, many in sections() for of in many}
    texts = {key: yaml(value) for key, value in settings.items() if key in fields and value is not None}
    return {key: text for key, text in texts.items() if text != fields[key].default}


def write(given: Mapping[str, str]) -> str:
    """The YAML of what a form says: its keys in their order, but for those that are empty or have their default.

    Raises UserError for a text that is not one value of YAML on one line.
    """
    lines, problems = [], []
    for of in (of for _, many in sections() for of in many):
        text = given.get(of.key, "").strip()
        if not text or text == of.default:
            continue
        try:
            value = YAML(typ="safe").load(f"{of.key}: {text}\n")
            if list(value) != [of.key] or len(text.splitlines()) > 1:
                raise ValueError("more than one value")
            lines.append(f"{of.key}: {text}\n")
        except NOT_YAML:
            problems.append(Problem(of.key, "its value is not YAML", "write one value, and quote what has a colon or a #"))
    if problems:
        raise UserError(*problems)
    return "".join(lines)


@dataclass(frozen=True)
class Draft:
    """What a form comes to: the run's name, its YAML, where that goes."""

    name: str
    yaml: str
    path: Path


def draft(given: Mapping[str, str], root: Path) -> Draft:
    """Raises UserError with all that load_config finds, and where the run would not lie in `root`, or has begun."""
    text = write(given)
    with tempfile.TemporaryDirectory() as folder:
        aside = Path(folder) / "config.yaml"
        aside.write_text(text, encoding="utf-8")
        try:
            config = load_config(aside)
        except UserError as error:
            keys = [line.partition(":")[0] for line in text.splitlines()]
            raise UserError(*(_of_the_form(problem, str(aside), keys) for problem in error.problems)) from None
    out = config.output_dir
    if out.resolve().parent != root.resolve() or not RUN_NAME.fullmatch(out.name):
        raise UserError(Problem("output_dir", f"{out} is no name in {root}", f"write {root / 'NAME'}"))
    check_output_dir(out)
    if (out / "config.yaml").exists():
        raise UserError(Problem("output_dir", f"{out} has a run", "give another name, or go on with it on its page"))
    return Draft(out.name, text, root / f"{out.name}.yaml")


def _of_the_form(problem: Problem, path: str, keys: list[str]) -> Problem:
    """The same, where the form has it: of a line the key."""
    line = re.fullmatch(re.escape(path) + r":(\d+)(?::\d+)?", problem.where)
    missing = re.fullmatch(r"has no key (\w+)", problem.what)
    if missing:
        return Problem(missing[1], "is needed", "fill it in")
    return replace(problem, where=keys[int(line[1]) - 1] if line else problem.where.replace(path, "the form"))


def save(draft: Draft) -> None:
    """Writes the YAML, beside the run's folder. Raises UserError where another is there."""
    try:
        with draft.path.open("x", encoding="utf-8") as file:
            file.write(draft.yaml)
    except FileExistsError:
        if draft.path.read_text(encoding="utf-8", errors="replace") != draft.yaml:
            raise UserError(Problem(str(draft.path), "is there and says otherwise", "give output_dir another name")) from None
    except OSError as error:
        raise UserError(Problem(str(draft.path), f"cannot be written ({error.strerror})", "mend that")) from None
