"""How an example divides its time between training and measuring, by speeds that it measures."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median

TRAINING_ENDS = 0.6
"""Share of the time by which training and all before it are done; loading a model and compiling it
is neither training nor measuring."""
MEASURING = 1 / 3
"""Most of the time that measuring takes."""

LEAST_PROMPTS = 3
"""With fewer prompts the agreement would depend on single texts."""

_STEP_MS = re.compile(r"elapsed time per iteration \(ms\): ([0-9.]+)")
_RESERVE = 0.9
"""Of the time for training: steps may take a little longer than those that were timed."""


@dataclass(frozen=True, slots=True)
class Budget:
    """The time that an example may take.

    Attributes:
        seconds: from `start` to the end.
        start: by the clock.
    """

    seconds: float
    start: float
    clock: Callable[[], float] = time.monotonic

    @classmethod
    def of_minutes(cls, minutes: float) -> Budget:
        """A budget that starts now."""
        return cls(minutes * 60, time.monotonic())

    def left_for_training(self) -> float:
        """Seconds until training is to be done; not below 0."""
        return max(0.0, self.start + TRAINING_ENDS * self.seconds - self.clock())

    def left_for_measuring(self) -> float:
        """Seconds that measuring may take from now on: what is left, but at most its share."""
        left = self.start + self.seconds - self.clock()
        return max(0.0, min(left, MEASURING * self.seconds))


@dataclass(frozen=True, slots=True)
class Trial:
    """What a short run of the same training has told.

    Attributes:
        step_seconds: of one step.
        other_seconds: what a run takes beside its steps: imports, data, validation, saving.
    """

    step_seconds: float
    other_seconds: float

    @classmethod
    def of(cls, log: str, wall_seconds: float) -> Trial:
        """Read the log of a run that logged every step.

        Raises:
            ValueError: it has no steps.
        """
        steps = [float(found) / 1000 for found in _STEP_MS.findall(log)]
        if not steps:
            raise ValueError("the log of the trial tells no times of steps")
        # The first one pays for allocations.
        return cls(median(steps[1:] or steps), max(0.0, wall_seconds - sum(steps)))

    def steps_within(self, seconds: float, least: int, most: int | None = None) -> int:
        """How many steps a whole run can take in that time, within bounds.

        Args:
            seconds: from the start of the run's processes to their end.
            least: even where they do not fit.
            most: beyond, more would not help.
        """
        steps = int((_RESERVE * seconds - self.other_seconds) / self.step_seconds)
        return max(least, steps if most is None else min(most, steps))


def guard_minutes(seconds: float) -> int:
    """For --exit-duration-in-mins, which knows whole minutes: the first one behind that time."""
    return max(1, math.ceil(seconds / 60))


@dataclass(frozen=True, slots=True)
class Measuring:
    """How much is measured.

    Attributes:
        prompts: that are answered.
        tokens: of each answer.
        repeats: of each answer; the fastest counts.
        thresholds: beside the full model.
    """

    prompts: int
    tokens: int
    repeats: int
    thresholds: tuple[float, ...]

    def describe(self) -> str:
        """Return what will be measured, for the line that is printed."""
        return (
            f"{self.prompts} prompts, {self.tokens} tokens, {self.repeats} times, "
            f"{len(self.thresholds)} thresholds"
        )

    def seconds(self, token_seconds: float) -> float:
        """What it takes.

        Args:
            token_seconds: of a token of the full model, summed over the engines.
        """
        answers = self.prompts * self.repeats * (1 + len(self.thresholds))
        return answers * self.tokens * token_seconds

    def within(self, seconds: float, token_seconds: float) -> Measuring:
        """As much of it as fits into a time, but never less than an honest table needs: two times
        of each answer, the thresholds at both ends and some between, a few prompts.

        Args:
            seconds: that it may take.
            token_seconds: see `seconds`.
        """
        choices = (self, *self._poorer())
        fitting = (one for one in choices if one.seconds(token_seconds) <= seconds)
        return next(fitting, choices[-1])

    def _poorer(self) -> list[Measuring]:
        """The same with less and less, from what costs the table least to what costs it most."""
        few = min(self.prompts, LEAST_PROMPTS)
        first = replace(self, prompts=max(few, self.prompts // 2))
        second = replace(first, thresholds=thinned(self.thresholds))
        third = replace(second, tokens=max(2, self.tokens // 2))
        return [first, second, third, replace(third, prompts=few)]


def thinned(thresholds: Sequence[float], most: int = 6) -> tuple[float, ...]:
    """At most so many of them, both ends among them; lower ones, where speed is gained, rather than
    higher ones."""
    if len(thresholds) <= most:
        return tuple(thresholds)
    return (thresholds[0], *thresholds[-(most - 1) :])
