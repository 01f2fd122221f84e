"""1F1B: one forward, one backward (PipeDream-Flush, arXiv 2006.09503; Megatron's default).

Stage s of P runs P - 1 - s forwards to warm up, then a forward and a backward in turn, then the
backwards that are left.
"""

from dataclasses import dataclass

from megatron.early_exit.ranges import ONE_OR_MORE
from megatron.early_exit.schedules.actions import Action, Microbatch
from megatron.early_exit.schedules.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class OneFOneB:
    """The 1F1B schedule.

    Attributes:
        num_ranks: pipeline-parallel size P, one stage on each rank.
        num_microbatches: of a step.

    Raises:
        ValueError: a number is below 1.
    """

    num_ranks: int
    num_microbatches: int

    def __post_init__(self) -> None:
        ONE_OR_MORE.check(num_ranks=self.num_ranks, num_microbatches=self.num_microbatches)

    def build(self) -> Schedule:
        """The schedule, without sends and receives."""
        microbatches = [Microbatch(i) for i in range(self.num_microbatches)]
        stages = range(self.num_ranks)
        return Schedule(tuple(tuple(one_f_one_b(s, self.num_ranks, microbatches)) for s in stages))

    def activation_limit(self, rank: int) -> int:
        """Most activations that are alive on a rank at a time."""
        return min(self.num_ranks - rank, self.num_microbatches)


def one_f_one_b(stage: int, num_stages: int, microbatches: list[Microbatch]) -> list[Action]:
    """The actions of one stage for the microbatches in their order."""
    num_warmup = num_stages - 1 - stage
    actions = []
    for index, microbatch in enumerate(microbatches):
        actions.append(Action(stage, "F", microbatch))
        if index >= num_warmup:
            actions.append(Action(stage, "B", microbatches[index - num_warmup]))
    num_done = max(len(microbatches) - num_warmup, 0)
    return actions + [Action(stage, "B", microbatch) for microbatch in microbatches[num_done:]]
