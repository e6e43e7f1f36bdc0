"""How everything is complained about: where, what, and the fix, all of it at once.

UserError            something the user can mend; the commands print its problems and exit with 1
└── NonFiniteLoss    training met a NaN or an infinity and stopped before the weights did
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

MOST_ALONE = 3  # problems of one kind that are shown one by one
PLACES = 10  # of a kind's problems that are named to a program
NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class Problem:
    """One complaint: `where` names a place the user can go to, `fix` an act that mends it.

    `kind` is the same for problems that are alike; it is needed where their texts differ by more than numbers.
    """

    where: str
    what: str
    fix: str
    kind: str = field(default="", compare=False, repr=False)

    @property
    def facts(self) -> dict[str, str]:
        """For a program."""
        return {"where": self.where, "what": self.what, "fix": self.fix}

    def __str__(self) -> str:
        return f"{self.where}: {self.what}\n  fix: {self.fix}"


@dataclass(frozen=True)
class Alike:
    """Problems of one kind: the first of them, how many they are, the first places; `differ` if the others read otherwise."""

    first: Problem
    count: int
    places: Sequence[str]
    differ: bool

    @property
    def facts(self) -> dict[str, Any]:
        """For a program: `where`, `what` and `fix` are those of the first."""
        return {**self.first.facts, "count": self.count, "places": list(self.places)}


def alike(problems: Sequence[Problem], most_alone: int = MOST_ALONE) -> list[Alike]:
    """The problems in their order, in linear time; more than `most_alone` of a kind are one, at the place of their first."""
    kinds: defaultdict[str, list[Problem]] = defaultdict(list)
    for problem in problems:
        kinds[_kind(problem)].append(problem)
    found = []
    for problem in problems:
        same = kinds[_kind(problem)]
        if len(same) <= most_alone:
            found.append(Alike(problem, 1, [problem.where], differ=False))
        elif problem is same[0]:
            differ = len({(of.what, of.fix) for of in same}) > 1
            found.append(Alike(problem, len(same), [of.where for of in same[:PLACES]], differ))
    return found


def _kind(problem: Problem) -> str:
    return problem.kind or NUMBER.sub("0", f"{problem.what}\n{problem.fix}")


class UserError(Exception):
    """Carries at least one Problem. Never holds a traceback that the user needs to read."""

    def __init__(self, *problems: Problem):
        super().__init__("\n".join(map(str, problems)))
        self.problems: Sequence[Problem] = problems

    def __reduce__(self) -> tuple[type, tuple[Problem, ...]]:
        """Between processes it goes with its problems, not as their text."""
        return type(self), tuple(self.problems)


class NonFiniteLoss(UserError):
    """The loss or the gradient is NaN or infinite; raised before the optimizer's step."""
