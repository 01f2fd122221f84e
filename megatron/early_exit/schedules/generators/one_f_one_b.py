"""1F1B: one forward, one backward (PipeDream-Flush, arXiv 2006.09503; Megatron's default).

Stage s of P runs P - 1 - s forwards to warm up, then a forward and a backward in turn, then the
backwards that are left.
"""

from dataclasses import dataclass

from megatron.early_exit.schedules.actions import Action, Microbatch
from megatron.early_exit.schedules.generators.base import StageByStage


@dataclass(frozen=True, kw_only=True)
class OneFOneB(StageByStage):
    """The 1F1B schedule."""

    def actions(self, stage: int) -> list[Action]:
        """The computations of one stage in their order."""
        microbatches = [Microbatch(i) for i in range(self.num_microbatches)]
        return one_f_one_b(stage, self.num_ranks, microbatches)

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
