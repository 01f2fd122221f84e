"""What a run does after each iteration that has been logged: a line of progress, and its events put
on disk.

TensorBoard's writer keeps events in memory for up to two minutes, so a run that is killed would
leave a hole before the checkpoint that the next one starts from. What it logged beyond the
checkpoint is logged again, with the same values.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from megatron.training.utils import print_rank_last


@dataclass
class Progress:
    """Prints how far the run is, how fast it goes, and when it will be done.

    Attributes:
        iterations: iterations of the whole run.
        interval: iterations between lines.
        tokens_per_iteration: current number of tokens in a global batch.
        writer: Megatron's `SummaryWriter`, or None on ranks that have none.
        save_intervals: iterations between checkpoints, of each kind.
    """

    iterations: int
    interval: int
    tokens_per_iteration: Callable[[], int]
    writer: Any = None
    save_intervals: tuple[int, ...] = ()
    _last: tuple[int, float] | None = field(default=None, init=False)

    def report(self, iteration: int) -> None:
        """Called after each iteration has been logged and before it is saved.

        Prints every `interval` of them, on the last rank; all events are on disk before a
        checkpoint of the same iteration is.
        """
        self._print(iteration)
        if any(iteration % interval == 0 for interval in self.save_intervals):
            self.flush()

    def flush(self) -> None:
        """Put the events so far where they outlive the process."""
        if self.writer is not None:
            self.writer.flush()

    def _print(self, iteration: int) -> None:
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
