"""A line of progress."""

import time
from collections.abc import Callable
from datetime import timedelta

from megatron.training.utils import print_rank_last


class Progress:
    """Prints how far the run is, how fast it goes, and when it will be done.

    Args:
        iterations: iterations of the whole run.
        interval: iterations between lines.
        tokens_per_iteration: current number of tokens in a global batch.
    """

    def __init__(
        self, iterations: int, interval: int, tokens_per_iteration: Callable[[], int]
    ) -> None:
        self.iterations = iterations
        self.interval = interval
        self.tokens_per_iteration = tokens_per_iteration
        self._last: tuple[int, float] | None = None

    def report(self, iteration: int) -> None:
        """Called after each iteration; prints every `interval` of them, on the last rank."""
        now = time.monotonic()
        if self._last is None:
            # The first iteration pays for allocations and compilation: measure from its end.
            self._last = (iteration, now)
            return
        if iteration % self.interval != 0:
            return
        steps, seconds = iteration - self._last[0], now - self._last[1]
        self._last = (iteration, now)
        if steps <= 0:
            return
        left = timedelta(seconds=round((self.iterations - iteration) * seconds / steps))
        tokens = steps * self.tokens_per_iteration() / seconds
        share = iteration / self.iterations
        print_rank_last(
            f" progress: {share:4.0%} ({iteration}/{self.iterations}) | "
            f"{tokens:,.0f} tokens/s | time left {left}"
        )
