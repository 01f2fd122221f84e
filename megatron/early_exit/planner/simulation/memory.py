"""What memory the computations of a rank take, one after the other."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from megatron.early_exit.planner.costs.cost_model import CostModel
from megatron.early_exit.schedules.actions import Action, Microbatch


class MemoryUse(NamedTuple):
    """Memory that a rank takes beside its weights, gradients and optimizer states.

    Attributes:
        kept_bytes: activations of all microbatches in flight, while a computation runs.
        extra_bytes: what this computation needs beside them.
        left_bytes: activations that are kept when it has ended.
    """

    kept_bytes: float
    extra_bytes: float
    left_bytes: float

    @property
    def peak_bytes(self) -> float:
        """All that is taken while it runs."""
        return self.kept_bytes + self.extra_bytes


def memory_uses(actions: Sequence[Action], costs: CostModel) -> Iterator[MemoryUse]:
    """What each of a rank's computations takes, in their order.

    Args:
        actions: computations of a rank.
        costs: of the stages.
    """
    going_back = {(a.stage, a.microbatch) for a in actions if a.kind in ("B", "I", "L")}
    alive = 0.0
    kept: dict[tuple[int, Microbatch], float] = {}
    for action in actions:
        cost = costs.stages[action.stage]
        key = action.stage, action.microbatch
        extra = cost.forward_extra_bytes if action.kind == "F" else cost.backward_extra_bytes
        if action.kind == "F":
            kept[key] = cost.activation_bytes
            alive += kept[key]
        running = alive
        if action.kind == "I":
            left = cost.weight_gradient_bytes
        else:
            left = kept[key] if action.kind == "F" and key in going_back else 0.0
        alive -= kept[key] - left
        kept[key] = left
        yield MemoryUse(running, extra if action.kind != "W" else 0.0, alive)
