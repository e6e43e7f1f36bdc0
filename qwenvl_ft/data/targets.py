"""What of a base is trained: its towers by the names of their modules, and the layers that `lora_targets` chooses.

Read from the headers of the base's files, so that what matches nothing is said before torch is imported.
"""

import re
from collections.abc import Collection, Set
from math import prod
from typing import Any

from qwenvl_ft.config import Config
from qwenvl_ft.data.families import family_of, layers_of, shapes_of
from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.values import Own, Tower

SEEING: Set[Tower] = {"vision", "merger"}
MERGERS = r"model\.visual\.(?:merger|deepstack_merger_list\.\d+)"
EXPERTS = r"layers\.\d+\.mlp\.experts\."
# Regular expressions over whole names of what lies in a tower, as transformers 5 has them.
INSIDE: dict[Tower, str] = {
    "experts": rf"model\.language_model\.{EXPERTS}.+",
    "language": rf"model\.language_model\.(?!{EXPERTS}).+",
    "vision": r"model\.visual\.(?!merger\.|deepstack_merger_list\.).+",
    "merger": rf"{MERGERS}\..+",
}


def tower_of(name: str) -> Tower:
    """The tower of a parameter or module of the base, which may stand behind a prefix such as PEFT's."""
    return next(tower for tower, inside in INSIDE.items() if re.fullmatch(rf"(?:.*?\.)??{inside}", name))


def tower_trains(on: Collection[Tower]) -> bool:
    """Whether anything changes what the vision tower hands over."""
    return not SEEING.isdisjoint(on)


def only_tower_trains(on: Collection[Tower]) -> bool:
    """Whether what shows no picture or video teaches nothing."""
    return {*on} <= SEEING


def find_layers(config: Config) -> list[str]:
    """Whole names of the layers that `lora_targets` chooses in the towers that get LoRA; none where it is not set.

    A list holds names, each alone or with modules before it; a text is `all-linear` or a regular expression over whole names: as
    PEFT has both. Raises UserError for what matches nothing there, or what is no linear layer, and for experts that are not there.
    """
    wanted = config.lora_targets
    if "experts" in config.lora_on and not family_of(config.model).experts:
        raise UserError(Problem("lora_on: experts", f"{config.model} is no mixture of experts", "leave experts out"))
    if wanted is None:
        return []
    on = [tower for tower in config.lora_on if tower != "experts" and not (tower in config.own and config.own[tower].full)]
    inside = "|".join(INSIDE[tower] for tower in on)
    everywhere = layers_of(config.model)
    here = {name: is_linear for name, is_linear in everywhere.items() if re.fullmatch(inside, name)}
    linear = [name for name, is_linear in here.items() if is_linear]
    if wanted == "all-linear":
        return linear  # every tower has some
    known = ", ".join(dict.fromkeys(map(_short, linear)))
    found, problems = dict[str, None](), list[Problem]()
    for one in [wanted] if isinstance(wanted, str) else wanted:
        pattern = one if isinstance(wanted, str) else _named(one)
        chosen = [name for name in here if re.fullmatch(pattern, name)]
        if others := [name for name in chosen if not here[name]]:
            problems.append(Problem(f"lora_targets: {one}", f"{others[0]} is no linear layer", f"choose among {known}"))
        elif not chosen:
            elsewhere = sorted({tower_of(name) for name in everywhere if name != "lm_head" and re.fullmatch(pattern, name)})
            fix = f"add {' and '.join(elsewhere)} to lora_on, or choose among {known}" if elsewhere else f"choose among {known}"
            if isinstance(wanted, str):
                names = [name.strip() for name in one.split(",")]
                there = all(any(re.fullmatch(_named(name), layer) for layer in everywhere) for name in names)
                listed = f"[{', '.join(names)}]" if there else "[q_proj]"
                fix = f"a text is a regular expression over whole names: for names write a list, {listed}" + f"; {fix}" * (
                    not there
                )
            problems.append(Problem(f"lora_targets: {one}", f"names no layer of {' and '.join(on)}", fix))
        found |= dict.fromkeys(chosen)
    if not problems and (idle := [tower for tower in on if not any(re.fullmatch(INSIDE[tower], name) for name in found)]):
        what, fix = f"names no layer of {' and '.join(idle)}", f"take {' and '.join(idle)} out of lora_on, or choose among {known}"
        problems.append(Problem("lora_targets", what, fix))
    if problems:
        raise UserError(*problems)
    return list(found)


def _named(name: str) -> str:
    """A regular expression of the layers of this name, alone or with modules before it."""
    return rf"(?:.*\.)?{re.escape(name)}"


def _short(name: str) -> str:
    """The end of a module's name that tells it from others: with the module before it, but for a number."""
    *_, before, last = name.split(".")
    return last if before.isdigit() else f"{before}.{last}"


def num_trained(config: Config) -> int:
    """How many weights train, but for DoRA's lengths and biases, and of experts that are stored one by one a few more; 0 where the
    base's files are not here, whose headers tell it."""
    shapes, family, named, num = shapes_of(config.model), family_of(config.model), find_layers(config), 0
    for tower in config.lora_on:
        own = config.own.get(tower, Own())
        whole = own.full or tower == "experts"  # which lora_targets does not choose among
        inside = INSIDE[tower] if named or whole else getattr(family, tower)
        for name in shapes if whole or not named else named:
            if re.fullmatch(inside, name):
                *experts, rows, columns = shapes[name] if len(shapes[name]) > 1 else (1, *shapes[name])
                num += prod(experts) * (rows * columns if own.full else (own.rank or config.lora_rank) * (rows + columns))
    return num


def said_of(config: Config) -> list[str]:
    """What trains, in words: a line for each tower."""
    lines = []
    for tower in config.lora_on:
        given: dict[str, Any] = config.own[tower].model_dump(exclude_none=True) if tower in config.own else {}
        rate = f"learning rate {given.get('learning_rate', config.learning_rate):g}"
        if given.get("full"):
            lines.append(f"{tower} in full, {rate}")
        else:
            rank, alpha = given.get("rank", config.lora_rank), given.get("alpha", config.lora_alpha)
            lines.append(f"LoRA on {tower}, rank {rank}, alpha {alpha:g}, {rate}")
    if config.quantization != "none":
        lines.append(f"the language model's attention and MLP are held in {config.quantization}")
    return lines + ([f"from the weights of {config.init_adapter} on"] if config.init_adapter else [])
