"""How everything is complained about: where, what, and the fix, all of it at once.

UserError            something the user can mend; the commands print its problems and exit with 1
└── NonFiniteLoss    training met a NaN or an infinity and stopped before the weights did
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One complaint: `where` names a place the user can go to, `fix` an act that mends it."""

    where: str
    what: str
    fix: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}\n  fix: {self.fix}"


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
