"""Times a schedule on a cost model.

A computation starts when the one before it in its rank's list has ended and the results it needs
have arrived. Sends end at once and transfers run beside computations, as with Megatron's
overlapped communication; what a rank spends waiting in an exchange that is not overlapped is not
counted.
"""

from collections.abc import Sequence

from megatron.early_exit.planner.costs.cost_model import CostModel
from megatron.early_exit.planner.simulation.memory import MemoryUse, memory_uses
from megatron.early_exit.planner.simulation.timeline import TimedAction, Timeline
from megatron.early_exit.schedules.actions import Action
from megatron.early_exit.schedules.data_flow import data_source, execution_order
from megatron.early_exit.schedules.schedule import Schedule

_ROUNDING = 1e-9


def simulate(schedule: Schedule, costs: CostModel) -> Timeline:
    """Run a schedule on a cost model.

    Args:
        schedule: one that `check` passes, with or without its sends and receives.
        costs: of its stages.

    Raises:
        ValueError: the schedule has other stages than the cost model, or waits for ever.
    """
    actions = schedule.computations.actions
    highest = max((action.stage for action in actions), default=0)
    if highest >= len(costs.stages) or len(costs.stages) % schedule.num_ranks:
        raise ValueError(
            f"costs of {len(costs.stages)} stages for a schedule of {highest + 1} stages on "
            f"{schedule.num_ranks} ranks, allowed: a cost for each stage, as many for each rank"
        )
    order, stuck = execution_order(schedule)
    if stuck:
        raise ValueError(f"{stuck[0]} waits for ever, see `check` for an explanation")
    timed: dict[Action, TimedAction] = {}
    before: dict[int, TimedAction] = {}
    for action in order:
        rank = schedule.rank_of(action.stage)
        start, waited_for = 0.0, None
        if rank in before:
            start, waited_for = before[rank].end_s, before[rank].action
        source = data_source(action, actions)
        if source is not None:
            boundary = min(source.stage, action.stage)
            arrival = timed[source].end_s + costs.transfer_s[boundary]
            # Where both come at once, but for rounding, the critical path stays on its rank.
            if arrival > start * (1 + _ROUNDING):
                waited_for = source
            start = max(start, arrival)
        end = start + costs.stages[action.stage].seconds(action.kind)
        timed[action] = before[rank] = TimedAction(action, start, end, waited_for)
    lists = schedule.computations.ranks
    peaks = [_peak(actions_of_rank, costs) for actions_of_rank in lists]
    return Timeline(
        ranks=tuple(tuple(timed[action] for action in rank) for rank in lists),
        peak_bytes=tuple(
            sum(stage.static_bytes for stage in costs.stages[rank :: schedule.num_ranks])
            + peak.peak_bytes
            for rank, peak in enumerate(peaks)
        ),
        kept_bytes=tuple(peak.kept_bytes for peak in peaks),
    )


def _peak(actions: Sequence[Action], costs: CostModel) -> MemoryUse:
    """What a rank's computations take beside weights when that is the most."""
    uses = memory_uses(actions, costs)
    return max(uses, key=lambda use: use.peak_bytes, default=MemoryUse(0.0, 0.0, 0.0))
