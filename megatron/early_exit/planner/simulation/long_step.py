"""Times steps of many microbatches by simulating few of them, exactly.

After a while a pipeline repeats itself: what it does for one group of microbatches takes as long,
on every rank, as for the group before. When a computation can start depends on nothing but when
those shortly before it have ended, so that it goes on repeating itself for as long as the lists do.
A step of more microbatches is longer by the time of so many groups, and peaks at the same memory.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from megatron.early_exit.planner.costs.cost_model import CostModel
from megatron.early_exit.planner.simulation.simulator import simulate
from megatron.early_exit.planner.simulation.timeline import TimedAction, Timeline
from megatron.early_exit.schedules.schedule import Schedule

# Of the step's time: what sums of so many numbers are exact to.
_ROUNDING = 1e-12


@dataclass(frozen=True, kw_only=True)
class RankTime:
    """One rank's part of a step.

    Attributes:
        start_s: when its first computation starts.
        end_s: when its last one ends.
        busy_s: seconds in which it computes.
        peak_bytes: the most memory that it takes.
        kept_bytes: the part of it that activations take which wait for their backward.
    """

    start_s: float
    end_s: float
    busy_s: float
    peak_bytes: float
    kept_bytes: float


@dataclass(frozen=True)
class StepTime:
    """A step without its single computations, by the ranks of the pipeline."""

    ranks: tuple[RankTime, ...]

    @classmethod
    def of(cls, timeline: Timeline) -> "StepTime":
        """Sum up a timeline; a rank that has nothing to do starts and ends at once."""
        return cls(
            tuple(
                RankTime(
                    start_s=actions[0].start_s if actions else 0.0,
                    end_s=actions[-1].end_s if actions else 0.0,
                    busy_s=busy_s,
                    peak_bytes=peak_bytes,
                    kept_bytes=kept_bytes,
                )
                for actions, busy_s, peak_bytes, kept_bytes in zip(
                    timeline.ranks,
                    timeline.busy_s,
                    timeline.peak_bytes,
                    timeline.kept_bytes,
                    strict=True,
                )
            )
        )

    @cached_property
    def step_s(self) -> float:
        """Seconds of the step."""
        return max(rank.end_s for rank in self.ranks)

    @property
    def peak_bytes(self) -> tuple[float, ...]:
        """The most memory that each rank takes."""
        return tuple(rank.peak_bytes for rank in self.ranks)

    @cached_property
    def bubble_fraction(self) -> float:
        """Idle time over all time, of all ranks together."""
        busy_s = sum(rank.busy_s for rank in self.ranks)
        return max(1 - busy_s / (self.step_s * len(self.ranks)), 0.0) if self.step_s else 0.0


@dataclass(frozen=True)
class _Period:
    """What repeats itself: so many microbatches, their time, and what each rank computes in it."""

    num_microbatches: int
    seconds: float
    busy_s: tuple[float, ...]


def time_long_step(
    build: Callable[[int], Schedule], num_microbatches: int, costs: CostModel, group: int = 1
) -> StepTime:
    """Time the step that `simulate` would time, to nine digits.

    Args:
        build: the schedule of a number of microbatches.
        num_microbatches: full ones of the step.
        costs: of its stages.
        group: build takes multiples of so many microbatches, and so has num_microbatches to be.

    Raises:
        ValueError: see `simulate`.
    """
    number = 6 * group if group > 1 else 4 * len(costs.stages)
    while number < num_microbatches:
        timeline = simulate(build(number), costs)
        period = _find_period(timeline, number, group)
        if period is not None:
            rest = (num_microbatches - number) % period.num_microbatches
            if rest:
                timeline = simulate(build(number + rest), costs)
            times = (num_microbatches - number - rest) // period.num_microbatches
            return _longer(StepTime.of(timeline), period, times)
        number *= 2
    return StepTime.of(simulate(build(num_microbatches), costs))


def _longer(step: StepTime, period: _Period, times: int) -> StepTime:
    ranks = []
    for rank, busy_s in zip(step.ranks, period.busy_s, strict=True):
        longer_s = times * period.seconds if busy_s else 0.0
        ranks.append(
            replace(rank, end_s=rank.end_s + longer_s, busy_s=rank.busy_s + times * busy_s)
        )
    return StepTime(tuple(ranks))


def _find_period(timeline: Timeline, num_microbatches: int, group: int) -> _Period | None:
    """The period of the last microbatches before the pipeline runs empty."""
    steady = [_until_last_forward(rank) for rank in timeline.ranks]
    for length in range(group, num_microbatches // 4 + 1, group):
        shifts: list[float] = []
        busy_s = []
        for rank, until in zip(timeline.ranks, steady, strict=True):
            full = sum(not timed.action.microbatch.role for timed in rank)
            window = full // num_microbatches * length
            rank_shifts = _shifts(until, window, length)
            if rank_shifts is None:
                break
            shifts += rank_shifts
            busy_s.append(sum(one.end_s - one.start_s for one in until[len(until) - window :]))
        else:
            if shifts and max(shifts) - min(shifts) <= _ROUNDING * timeline.step_s:
                return _Period(length, shifts[0], tuple(busy_s))
    return None


def _until_last_forward(rank: Sequence[TimedAction]) -> Sequence[TimedAction]:
    last = max(
        (
            position
            for position, timed in enumerate(rank)
            if timed.action.kind == "F" and not timed.action.microbatch.role
        ),
        default=-1,
    )
    return rank[: last + 1]


def _shifts(actions: Sequence[TimedAction], window: int, length: int) -> list[float] | None:
    """How much later each of the last computations is than the same one of the period before.

    Two windows are compared with those before them, because what a computation of an interleaved
    schedule waits for may be almost a window away in its own rank's list.

    Returns:
        None where the lists themselves do not repeat.
    """
    shifts = []
    first = len(actions) - 2 * window
    if first < window:
        return None if actions else []
    for position in range(len(actions) - 1, first - 1, -1):
        now, before = actions[position], actions[position - window]
        microbatch, earlier = now.action.microbatch, before.action.microbatch
        if (
            (now.action.stage, now.action.kind) != (before.action.stage, before.action.kind)
            or microbatch.role
            or earlier.role
            or microbatch.index - earlier.index != length
        ):
            return None
        shifts.append(now.start_s - before.start_s)
    return shifts
