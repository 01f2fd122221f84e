"""How many activations each rank keeps while it runs its list."""

from collections.abc import Sequence

from megatron.early_exit.pipeline.actions import Action, Microbatch
from megatron.early_exit.pipeline.schedule import Schedule


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


def peak_activations(schedule: Schedule) -> tuple[int, ...]:
    """The most activations that are alive on each rank at a time."""
    return tuple(max(alive_activations(rank), default=0) for rank in schedule.ranks)
