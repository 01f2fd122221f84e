"""The schedule of EE-Tuning (arXiv 2402.00518): forwards only, and each exit's backward at once.

The backbone is frozen, so that no gradient leaves a stage, and stages after the last exit have
nothing to do. A stage keeps one microbatch at a time.
"""

from dataclasses import dataclass

from megatron.early_exit.errors import FieldError
from megatron.early_exit.ranges import ONE_OR_MORE, Range
from megatron.early_exit.schedules.actions import Action, Microbatch
from megatron.early_exit.schedules.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """The EE-Tuning schedule.

    Attributes:
        num_ranks: pipeline-parallel size P, one stage on each rank.
        num_microbatches: of a step.
        exit_stages: the stages that have exits, counted from 0.

    Raises:
        ValueError: a number is out of its range.
    """

    num_ranks: int
    num_microbatches: int
    exit_stages: frozenset[int]

    def __post_init__(self) -> None:
        ONE_OR_MORE.check(num_ranks=self.num_ranks, num_microbatches=self.num_microbatches)
        if not self.exit_stages:
            raise FieldError("exit_stages", "there is none", "one stage or more")
        for stage in self.exit_stages:
            Range(least=0, most=self.num_ranks - 1).check(exit_stages=stage)

    def build(self) -> Schedule:
        """The schedule, without sends and receives."""
        return Schedule(tuple(tuple(self._stage(s)) for s in range(self.num_ranks)))

    def _stage(self, stage: int) -> list[Action]:
        if stage > max(self.exit_stages):
            return []
        actions = []
        for index in range(self.num_microbatches):
            actions.append(Action(stage, "F", Microbatch(index)))
            if stage in self.exit_stages:
                actions.append(Action(stage, "L", Microbatch(index)))
        return actions

    def activation_limit(self, rank: int) -> int:
        """Most activations that are alive on a rank at a time."""
        return 1 if rank <= max(self.exit_stages) else 0
