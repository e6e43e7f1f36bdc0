"""What the server counts of itself, for Prometheus."""

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics(Collector):
    """Requests by dialect and status, tokens, seconds of whole answers; `now` says by name what is measured at each scrape."""

    def __init__(self, now: Callable[[], Mapping[str, float]]):
        self.now, self.registry = now, CollectorRegistry()
        self.requests = Counter("qwenvl_requests", "Answered requests.", ["dialect", "status"], registry=self.registry)
        self.tokens = Counter("qwenvl_tokens", "Tokens of whole answers.", ["kind"], registry=self.registry)
        self.seconds = Histogram("qwenvl_answer_seconds", "Seconds of whole answers.", buckets=SECONDS, registry=self.registry)
        self.registry.register(self)

    def count_answer(self, seconds: float, tokens_in: int, tokens_out: int) -> None:
        """An answer that was given in full."""
        self.seconds.observe(seconds)
        self.tokens.labels("input").inc(tokens_in)
        self.tokens.labels("output").inc(tokens_out)

    def collect(self) -> Iterator[Metric]:
        """As the registry asks for it."""
        for name, value in self.now().items():
            yield GaugeMetricFamily(f"qwenvl_{name}", "At this moment.", value=value)
