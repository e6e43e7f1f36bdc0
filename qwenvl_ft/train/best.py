"""The evaluations of a run: which step has the lowest loss, and whether it is so long ago that the run stops."""

from collections.abc import Sequence
from typing import Any


class Best:
    """Evaluations so far, those of a run's `lines` first; the same in every process.

    >>> best = Best([{"step": 2, "eval_loss": 1.5}, {"step": 3}, {"step": 4, "eval_loss": 1.25}], patience=2)
    >>> best.add(6, 1.25), best.step, best.over, best.add(8, 1.5), best.over
    (None, 4, False, None, True)
    """

    def __init__(self, lines: Sequence[dict[str, Any]], patience: int | None = None):
        self.losses: dict[int, float] = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
        self.patience = patience

    def add(self, step: int, loss: float) -> None:
        """One more."""
        self.losses[step] = loss

    @property
    def step(self) -> int:
        """The step with the lowest loss, of several the first; 0 before an evaluation."""
        return min(self.losses, key=lambda step: self.losses[step], default=0)

    @property
    def over(self) -> bool:
        """Whether `patience` evaluations in a row have found no lower loss."""
        since = sum(step > self.step for step in self.losses)
        return self.patience is not None and since >= self.patience
