"""What the server counts of itself, written as Prometheus reads it."""

from collections import Counter
from collections.abc import Mapping

SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Gauges:
    """Requests by dialect and status, their seconds, tokens in and out."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        self.tokens: Counter[str] = Counter()
        self.within: Counter[float] = Counter()  # answers that took at most so many seconds
        self.answers, self.seconds = 0, 0.0

    def count_answer(self, seconds: float, tokens_in: int, tokens_out: int) -> None:
        """An answer that was given in full."""
        self.answers, self.seconds = self.answers + 1, self.seconds + seconds
        self.within.update(bound for bound in SECONDS if seconds <= bound)
        self.tokens.update({"input": tokens_in, "output": tokens_out})

    def write(self, now: Mapping[str, float]) -> str:
        """The text of /metrics; `now` holds what is measured at this moment, by name."""
        lines = ["# TYPE qwenvl_requests_total counter"]
        lines += [
            f'qwenvl_requests_total{{dialect="{dialect}",status="{status}"}} {number}'
            for (dialect, status), number in sorted(self.requests.items())
        ]
        lines += ["# TYPE qwenvl_tokens_total counter"]
        lines += [f'qwenvl_tokens_total{{kind="{kind}"}} {self.tokens[kind]}' for kind in ("input", "output")]
        lines += ["# TYPE qwenvl_answer_seconds histogram"]
        lines += [f'qwenvl_answer_seconds_bucket{{le="{bound}"}} {self.within[bound]}' for bound in SECONDS]
        lines += [f'qwenvl_answer_seconds_bucket{{le="+Inf"}} {self.answers}']
        lines += [f"qwenvl_answer_seconds_sum {self.seconds:.3f}", f"qwenvl_answer_seconds_count {self.answers}"]
        for name, value in now.items():
            lines += [f"# TYPE qwenvl_{name} gauge", f"qwenvl_{name} {value:g}"]
        return "\n".join(lines) + "\n"
