"""The evaluations of a run: which step is the best, by loss or by a metric, and whether it is so long ago that the run stops."""

from collections.abc import Sequence
from typing import Any

from qwenvl_ft.evaluate.metrics import METRICS


class Best:
    """Evaluations so far, those of a run's `lines` first; the same in every process.

    >>> best = Best([{"step": 2, "eval_loss": 1.5}, {"step": 3}, {"step": 4, "eval_loss": 1.25}], patience=2)
    >>> best.add(6, 1.25), best.step, best.over, best.add(8, 1.5), best.over
    (None, 4, False, None, True)
    """

    def __init__(self, lines: Sequence[dict[str, Any]], patience: int | None = None, metric: str = "loss"):
        self.key, self.patience = f"eval_{metric}", patience
        self.values: dict[int, float] = {line["step"]: line[self.key] for line in lines if self.key in line}
        self.lower_is_better = metric == "loss" or METRICS[metric].is_error

    def add(self, step: int, value: float) -> None:
        """One more."""
        self.values[step] = value

    @property
    def step(self) -> int:
        """The step with the best value, of several the first; 0 before an evaluation."""
        sign = 1 if self.lower_is_better else -1
        return min(self.values, key=lambda step: sign * self.values[step], default=0)

    @property
    def over(self) -> bool:
        """Whether `patience` evaluations in a row have found no better value."""
        since = sum(step > self.step for step in self.values)
        return self.patience is not None and since >= self.patience
