"""The list of passes by which exits are tuned."""

from megatron.early_exit.schedules.communication import with_communication
from megatron.early_exit.schedules.execution.pass_clock import PassClock
from megatron.early_exit.schedules.generators import Tuning
from megatron.early_exit.schedules.schedule import Schedule


class TuningPlan:
    """The plan of `ScheduledSteps` for EE-Tuning.

    Args:
        stages: of the pipeline.
        exit_stages: the stages that have exits.
    """

    def __init__(self, stages: int, exit_stages: frozenset[int]) -> None:
        self.clock: PassClock | None = None
        self._stages = stages
        # Megatron asks the last stage how many tokens count, also where it has no exit.
        self._tuned_stages = exit_stages | {stages - 1}
        self._schedules: dict[int, Schedule] = {}

    def __call__(self, num_microbatches: int) -> Schedule:
        """Forwards through the pipeline, and the exits' own backwards."""
        if num_microbatches not in self._schedules:
            tuning = Tuning(
                num_ranks=self._stages,
                num_microbatches=num_microbatches,
                exit_stages=self._tuned_stages,
            )
            self._schedules[num_microbatches] = with_communication(tuning.build())
        return self._schedules[num_microbatches]
