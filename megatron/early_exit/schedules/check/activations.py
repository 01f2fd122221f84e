"""How many activations each rank keeps while it runs its list."""

from collections.abc import Sequence

from megatron.early_exit.schedules.actions import Action, Microbatch
from megatron.early_exit.schedules.check.fault import Places


def alive_activations(actions: Sequence[Action]) -> list[int]:
    """Activations alive while each action of a rank runs, of one microbatch on one stage each.

    A forward's activations live until the last backward of its microbatch on the stage ends (a
    weight gradient where there is one), and until its own end if there is none.
    """
    last_use: dict[tuple[int, Microbatch], int] = {}
    for position, action in enumerate(actions):
        if not action.is_communication:
            last_use[action.stage, action.microbatch] = position
    alive, profile = 0, []
    for position, action in enumerate(actions):
        alive += action.kind == "F"
        profile.append(alive)
        alive -= last_use.get((action.stage, action.microbatch)) == position
    return profile


def check_activations(places: Places, limits: Sequence[int]) -> None:
    """Check that no rank keeps more activations than it may.

    Args:
        places: of the schedule.
        limits: for each rank the most activations that may be alive.

    Raises:
        ScheduleError: one does.
    """
    for rank, (actions, limit) in enumerate(zip(places.schedule.ranks, limits, strict=True)):
        for at, alive in enumerate(alive_activations(actions)):
            if alive > limit:
                reason = f"rank {rank} keeps {alive} activations, allowed: {limit}"
                places.fail_at(reason, [(rank, at)])
