"""What a drawing of a step shows beside its computations."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron.early_exit.planner.costs.cost_model import CostModel
from megatron.early_exit.planner.simulation.memory import memory_uses
from megatron.early_exit.planner.simulation.timeline import TimedAction, Timeline


@dataclass(frozen=True, kw_only=True)
class Extras:
    """What is known of a step beside its timeline.

    Attributes:
        note: what is drawn of which whole; empty if all is.
        update_s: seconds of the update behind the last computation.
        exit_s: of each stage, the part of a backward in which its exits run; empty if unknown.
        memory: of each rank, when its memory changes, and to how many bytes; empty if unknown.
    """

    note: str = ""
    update_s: float = 0.0
    exit_s: tuple[float, ...] = ()
    memory: tuple[tuple[tuple[float, float], ...], ...] = ()

    @classmethod
    def of(
        cls, timeline: Timeline, costs: CostModel, note: str = "", update_s: float = 0.0
    ) -> "Extras":
        """What the costs say of a timeline; memory only if stages have weights."""
        num_ranks = len(timeline.ranks)
        has_memory = any(stage.static_bytes for stage in costs.stages)
        return cls(
            note=note,
            update_s=update_s,
            exit_s=tuple(stage.local_backward_s for stage in costs.stages),
            memory=tuple(
                _memory(
                    actions,
                    costs,
                    sum(stage.static_bytes for stage in costs.stages[rank::num_ranks]),
                    timeline.step_s + update_s,
                )
                for rank, actions in enumerate(timeline.ranks)
            )
            if has_memory
            else (),
        )

    def exit_part_s(self, timed: TimedAction) -> float:
        """Seconds of a computation in which exits run."""
        if timed.action.kind not in ("B", "I") or not self.exit_s:
            return 0.0
        return min(self.exit_s[timed.action.stage], timed.end_s - timed.start_s)


def _memory(
    actions: Sequence[TimedAction], costs: CostModel, static_bytes: float, end_s: float
) -> tuple[tuple[float, float], ...]:
    uses = memory_uses([timed.action for timed in actions], costs)
    found = [(0.0, static_bytes)]
    for timed, use in zip(actions, uses, strict=True):
        found.append((timed.start_s, static_bytes + use.peak_bytes))
        found.append((timed.end_s, static_bytes + use.left_bytes))
    return (*found, (end_s, found[-1][1]))
