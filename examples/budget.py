"""How an example divides its time between training and measuring, by speeds that it measures."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median

TRAINING_ENDS = 0.6
"""Share of the time after which training, and everything before it, has to be done. Loading and
compiling the model are neither training nor measuring."""
MEASURING = 1 / 3
"""Largest share of the time that measuring takes."""

LEAST_PROMPTS = 3
"""With fewer prompts the agreement would depend on single texts."""

_STEP_MS = re.compile(r"elapsed time per iteration \(ms\): ([0-9.]+)")
_RESERVE = 0.9
"""Share of the training time that is planned for, because steps may take a little longer than those
that were timed."""


@dataclass(frozen=True, slots=True)
class Budget:
    """The time that an example may take.

    Attributes:
        seconds: the whole time.
        start: value of the clock at its start.
    """

    seconds: float
    start: float
    clock: Callable[[], float] = time.monotonic

    @classmethod
    def of_minutes(cls, minutes: float) -> Budget:
        """A budget that starts now."""
        return cls(minutes * 60, time.monotonic())

    def left_for_training(self) -> float:
        """Seconds until training has to be done; not below 0."""
        return max(0.0, self.start + TRAINING_ENDS * self.seconds - self.clock())

    def left_for_measuring(self) -> float:
        """Seconds that measuring may take from now on: the time left, but at most its share."""
        left = self.start + self.seconds - self.clock()
        return max(0.0, min(left, MEASURING * self.seconds))


@dataclass(frozen=True, slots=True)
class Trial:
    """Times of a short run of the same training.

    Attributes:
        step_seconds: time of one step.
        other_seconds: time that a run takes besides its steps: imports, data, validation, saving.
    """

    step_seconds: float
    other_seconds: float

    @classmethod
    def of(cls, log: str, wall_seconds: float) -> Trial:
        """Read the log of a run that logged every step.

        Raises:
            ValueError: the log has no steps.
        """
        steps = [float(found) / 1000 for found in _STEP_MS.findall(log)]
        if not steps:
            raise ValueError("the log of the trial run has no step times")
        # The first one pays for allocations.
        return cls(median(steps[1:] or steps), max(0.0, wall_seconds - sum(steps)))

    def steps_within(self, seconds: float, least: int, most: int | None = None) -> int:
        """The number of steps that a whole run can take in that time, within bounds.

        Args:
            seconds: from the start of the run's processes to their end.
            least: lower bound, even if that many do not fit.
            most: upper bound, beyond which more steps would not help.
        """
        steps = int((_RESERVE * seconds - self.other_seconds) / self.step_seconds)
        return max(least, steps if most is None else min(most, steps))


def guard_minutes(seconds: float) -> int:
    """The value of --exit-duration-in-mins, which takes whole minutes: that time, rounded up."""
    return max(1, math.ceil(seconds / 60))


@dataclass(frozen=True, slots=True)
class Measuring:
    """The extent of a measurement.

    Attributes:
        prompts: number of prompts.
        tokens: tokens of each answer.
        repeats: number of times that each prompt is answered; the fastest counts.
        thresholds: thresholds to measure, besides the full model.
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
        """The time that it takes.

        Args:
            token_seconds: time of a token of the full model, summed over the engines.
        """
        answers = self.prompts * self.repeats * (1 + len(self.thresholds))
        return answers * self.tokens * token_seconds

    def within(self, seconds: float, token_seconds: float) -> Measuring:
        """The largest part of it that fits into a time limit, but never less than a meaningful
        table needs: the repeats, the thresholds at both ends and some between, a few prompts.

        Args:
            seconds: time limit.
            token_seconds: see `seconds`.
        """
        choices = (self, *self._poorer())
        fitting = (one for one in choices if one.seconds(token_seconds) <= seconds)
        return next(fitting, choices[-1])

    def _poorer(self) -> list[Measuring]:
        """Smaller and smaller parts of it: what matters least for the table is left out first."""
        few = min(self.prompts, LEAST_PROMPTS)
        first = replace(self, prompts=max(few, self.prompts // 2))
        second = replace(first, thresholds=thinned(self.thresholds))
        third = replace(second, tokens=max(2, self.tokens // 2))
        return [first, second, third, replace(third, prompts=few)]


def thinned(thresholds: Sequence[float], most: int = 6) -> tuple[float, ...]:
    """At most `most` of them, including both ends; the low ones, which give speed, are kept."""
    if len(thresholds) <= most:
        return tuple(thresholds)
    return (thresholds[0], *thresholds[-(most - 1) :])
