"""Which computation needs the result of which, and an order in which all can run."""

from collections import deque

from megatron.early_exit.schedules.actions import Action
from megatron.early_exit.schedules.schedule import Schedule


def data_source(action: Action, actions: frozenset[Action]) -> Action | None:
    """The computation on a neighbouring stage whose result `action` needs.

    A forward needs the hidden state of the stage before it. A backward needs the gradient of the
    stage after it, if the microbatch's backward runs there: that of a fill may begin earlier, with
    the losses of exits only.

    Args:
        action: a computation.
        actions: all actions of the schedule.
    """
    stage, microbatch = action.stage, action.microbatch
    if action.kind == "F":
        return Action(stage - 1, "F", microbatch) if stage > 0 else None
    if action.kind in ("B", "I"):
        for kind in ("B", "I"):
            source = Action(stage + 1, kind, microbatch)
            if source in actions:
                return source
    return None


def execution_order(schedule: Schedule) -> tuple[list[Action], list[Action]]:
    """Run the computations of all ranks, each as soon as its list and its data allow.

    Returns:
        The computations in an order in which they can run, and the next one of each rank that
        waits for ever for a neighbour's result.
    """
    lists = schedule.computations.ranks
    actions = schedule.computations.actions
    position = [0] * schedule.num_ranks
    done: set[Action] = set()
    waiting: dict[Action, int] = {}
    order: list[Action] = []
    runnable = deque(range(schedule.num_ranks))
    while runnable:
        rank = runnable.popleft()
        for action in lists[rank][position[rank] :]:
            source = data_source(action, actions)
            if source is not None and source not in done:
                waiting[source] = rank
                break
            position[rank] += 1
            done.add(action)
            order.append(action)
            if action in waiting:
                runnable.append(waiting.pop(action))
    stuck = [acts[at] for acts, at in zip(lists, position, strict=True) if at < len(acts)]
    return order, stuck
