"""Which list of passes a step runs where bubbles are filled, and the measured ratio behind it."""

from argparse import Namespace
from dataclasses import dataclass, field

import torch
from megatron.training.utils import print_rank_last

from megatron.early_exit.schedules.communication import with_communication
from megatron.early_exit.schedules.execution.pass_clock import PassClock
from megatron.early_exit.schedules.generators import OneFOneB
from megatron.early_exit.schedules.schedule import Schedule
from megatron.early_exit.training.loop.filling_options import MEASURED_RATIO, FillingOptions

_SKIPPED_STEPS = 1
"""The first step pays for allocations and compilation."""

_MEASURED_STEPS = 3


@dataclass
class FilledBubbles:
    """The plan of `ScheduledSteps` for filled bubbles.

    Attributes:
        options: how they are filled.
        stages: of the pipeline.
        exit_stages: the stages that have exits.
        args: Megatron's arguments. A ratio that has been measured is kept there: a run that goes on
            from a checkpoint fills as the one that saved it.
    """

    options: FillingOptions
    stages: int
    exit_stages: frozenset[int]
    args: Namespace
    clock: PassClock | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._steps = 0
        self._ratio = None if self.options.is_measured else self.options.assumed_ratio
        self._schedules: dict[tuple[int, float | None], Schedule] = {}

    def __call__(self, num_microbatches: int) -> Schedule:
        """The schedule of the next step; a collective call where the ratio is measured."""
        if self._ratio is None:
            self._ratio = getattr(self.args, MEASURED_RATIO, None)
        if self._ratio is None:
            self._measure()
        key = num_microbatches, self._ratio
        if key not in self._schedules:
            if self._ratio is None:
                plain = OneFOneB(num_ranks=self.stages, num_microbatches=num_microbatches)
                self._schedules[key] = with_communication(plain.build())
            else:
                filled = self.options.generator(
                    self.stages, num_microbatches, self.exit_stages, self._ratio
                )
                self._schedules[key] = with_communication(filled.build())
                print_rank_last(
                    f" bubble filling: {filled.num_warmup_fills} microbatches in the warm-up and "
                    f"{filled.num_cooldown_fills} in the cool-down of {num_microbatches}, a "
                    f"backward takes {self._ratio:g} forwards"
                )
        return self._schedules[key]

    def _measure(self) -> None:
        """Time some steps, then share the ratio; called before each step until it is known."""
        if self._steps == _SKIPPED_STEPS:
            self.clock = PassClock()
        if self._steps == _SKIPPED_STEPS + _MEASURED_STEPS:
            assert self.clock is not None
            seconds = torch.tensor(self.clock.total_s(), dtype=torch.float64, device="cuda")
            self.clock = None
            torch.distributed.all_reduce(seconds)
            forward_s, backward_s = seconds.tolist()
            self._ratio = min(max(round(backward_s / forward_s, 2), 0.01), 100.0)
            setattr(self.args, MEASURED_RATIO, self._ratio)
        self._steps += 1
