"""A schedule in time: when each computation runs, what it waited for, and what memory it takes."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from megatron.early_exit.schedules.actions import Action


@dataclass(frozen=True, slots=True)
class TimedAction:
    """A computation in time.

    Attributes:
        action: what is computed.
        start_s: seconds from the start of the step.
        end_s: seconds from the start of the step.
        waited_for: the computation whose end (or the transfer of whose result) let this one
            start; None for those that waited for nothing.
    """

    action: Action
    start_s: float
    end_s: float
    waited_for: Action | None


@dataclass(frozen=True)
class Timeline:
    """How a schedule runs on a cost model.

    Attributes:
        ranks: the computations of each rank in their order.
        peak_bytes: the most memory that each rank takes.
        kept_bytes: the part of it that activations take which wait for their backward.
    """

    ranks: tuple[tuple[TimedAction, ...], ...]
    peak_bytes: tuple[float, ...]
    kept_bytes: tuple[float, ...]

    @cached_property
    def step_s(self) -> float:
        """Seconds of the step, from the first computation to the end of the last."""
        return max((timed.end_s for timed in self._all()), default=0.0)

    @cached_property
    def busy_s(self) -> tuple[float, ...]:
        """Seconds in which each rank computes."""
        return tuple(sum(timed.end_s - timed.start_s for timed in rank) for rank in self.ranks)

    @cached_property
    def idle_s(self) -> tuple[float, ...]:
        """Seconds in which each rank does not."""
        return tuple(self.step_s - busy for busy in self.busy_s)

    @cached_property
    def bubble_fraction(self) -> float:
        """Idle time over all time, of all ranks together."""
        return sum(self.idle_s) / (self.step_s * len(self.ranks)) if self.step_s else 0.0

    @cached_property
    def critical_path(self) -> tuple[Action, ...]:
        """A chain of computations, each waiting for the one before, that takes the whole step."""
        timed = {one.action: one for one in self._all()}
        last = max(timed.values(), key=lambda one: one.end_s, default=None)
        path = []
        while last is not None:
            path.append(last.action)
            last = timed[last.waited_for] if last.waited_for is not None else None
        return tuple(reversed(path))

    def _all(self) -> Iterable[TimedAction]:
        return (timed for rank in self.ranks for timed in rank)
