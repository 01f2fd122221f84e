"""Counts generated tokens as they come, at next to no cost for the engine's thread."""

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector


class TokenTally(Collector):
    """Tokens, and the layers that gave them; written by one thread, read by any.

    Args:
        prefix: of the names for Prometheus.
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._by_layer: dict[int, int] = {}

    def add(self, layer: int) -> None:
        """Count a token."""
        self._by_layer[layer] = self._by_layer.get(layer, 0) + 1

    def collect(self) -> Iterator[CounterMetricFamily]:
        """What Prometheus is told."""
        by_layer = dict(self._by_layer)
        name = f"{self._prefix}generation_tokens"
        yield CounterMetricFamily(name, "Generated tokens.", sum(by_layer.values()))
        exits = CounterMetricFamily(
            f"{self._prefix}exit_tokens",
            "Generated tokens by the layer that gave them.",
            labels=["layer"],
        )
        for layer, count in sorted(by_layer.items()):
            exits.add_metric([str(layer)], count)
        yield exits
