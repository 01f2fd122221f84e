"""A histogram that costs the engine's thread next to nothing."""

from bisect import bisect_left
from collections.abc import Iterator

from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

_BOUNDS_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
)


class SecondsHistogram(Collector):
    """Counts durations; written by one thread, read by any.

    The client library's own takes a lock and walks through its buckets, for every token of every
    sequence.

    Args:
        name: for Prometheus.
        text: what it counts.
    """

    def __init__(self, name: str, text: str) -> None:
        self._name, self._text = name, text
        self._counts = [0] * (len(_BOUNDS_S) + 1)
        self._sum = 0.0

    def observe(self, seconds: float) -> None:
        """Count a duration."""
        self._counts[bisect_left(_BOUNDS_S, seconds)] += 1
        self._sum += seconds

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """The figures for Prometheus."""
        reached, buckets = 0, []
        for bound, count in zip((*map(str, _BOUNDS_S), "+Inf"), self._counts, strict=True):
            reached += count
            buckets.append((bound, reached))
        yield HistogramMetricFamily(self._name, self._text, buckets, self._sum)
