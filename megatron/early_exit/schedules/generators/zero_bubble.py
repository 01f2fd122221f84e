"""ZB-H1, the zero-bubble schedule within the memory of 1F1B (arXiv 2401.10241, section 2.1).

The backward is divided into the gradient of the input, which the stage before waits for, and that
of the weights, which nobody waits for. Stage s puts the latter off by s microbatches, so that each
stage holds as many microbatches as the first one does under 1F1B.
"""

from dataclasses import dataclass

from megatron.early_exit.schedules.actions import Action, Microbatch
from megatron.early_exit.schedules.generators.base import StageByStage
from megatron.early_exit.schedules.generators.one_f_one_b import one_f_one_b


@dataclass(frozen=True, kw_only=True)
class ZeroBubbleH1(StageByStage):
    """The ZB-H1 schedule."""

    def actions(self, stage: int) -> list[Action]:
        """The computations of one stage in their order."""
        microbatches = [Microbatch(i) for i in range(self.num_microbatches)]
        waiting: list[Action] = []
        actions = []
        for action in one_f_one_b(stage, self.num_ranks, microbatches):
            if action.kind == "F":
                actions.append(action)
                continue
            actions.append(Action(stage, "I", action.microbatch))
            waiting.append(Action(stage, "W", action.microbatch))
            if len(waiting) > stage:
                actions.append(waiting.pop(0))
        return actions + waiting

    def activation_limit(self, rank: int) -> int:
        """Most activations that are alive on a rank at a time, until their weight gradients."""
        del rank
        return min(self.num_ranks, self.num_microbatches)
