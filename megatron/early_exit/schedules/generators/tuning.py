"""The schedule of EE-Tuning (arXiv 2402.00518): forwards only, and each exit's backward at once.

The backbone is frozen, so that no gradient leaves a stage, and stages after the last exit have
nothing to do. A stage keeps one microbatch at a time.

Where exits learn what the end of the pipeline says of a microbatch, each stage goes so many
forwards ahead that the last one has run the microbatch by then, and keeps what its exits have seen
of those.
"""

from dataclasses import dataclass

from megatron.early_exit.errors import FieldError
from megatron.early_exit.ranges import Range
from megatron.early_exit.schedules.actions import Action, Microbatch
from megatron.early_exit.schedules.generators.base import StageByStage


@dataclass(frozen=True, kw_only=True)
class Tuning(StageByStage):
    """The EE-Tuning schedule.

    Attributes:
        exit_stages: the stages that have exits, counted from 0.
        learns_from_last: exits learn of a microbatch what the last of these stages says of it.

    Raises:
        ValueError: a number is out of its range.
    """

    exit_stages: frozenset[int]
    learns_from_last: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.exit_stages:
            raise FieldError("exit_stages", "there is none", "one stage or more")
        for stage in self.exit_stages:
            Range(least=0, most=self.num_ranks - 1).check(exit_stages=stage)

    def actions(self, stage: int) -> list[Action]:
        """The computations of one stage in their order."""
        if stage > max(self.exit_stages):
            return []
        actions, ahead = [], self._forwards_ahead(stage)
        for index in range(self.num_microbatches + ahead):
            if index < self.num_microbatches:
                actions.append(Action(stage, "F", Microbatch(index)))
            if stage in self.exit_stages and index >= ahead:
                actions.append(Action(stage, "L", Microbatch(index - ahead)))
        return actions

    def _forwards_ahead(self, stage: int) -> int:
        return max(self.exit_stages) - stage if self.learns_from_last else 0

    def activation_limit(self, rank: int) -> int:
        """Most activations that are alive on a rank at a time."""
        if rank not in self.exit_stages:
            return 1 if rank < max(self.exit_stages) else 0
        return 1 + min(self._forwards_ahead(rank), self.num_microbatches - 1)
