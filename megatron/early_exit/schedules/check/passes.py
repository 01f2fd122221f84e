"""Checks of what is computed: each microbatch's passes over the stages, and the activations that
each rank keeps meanwhile."""

from collections.abc import Sequence

from megatron.early_exit.schedules.actions import Action, Kind, Microbatch
from megatron.early_exit.schedules.check.fault import Places


def check_passes(places: Places) -> None:
    """Check on which stages each microbatch runs, and on each of them in which order.

    Raises:
        ScheduleError: with an explanation.
    """
    stages: dict[Microbatch, dict[Kind, list[int]]] = {}
    for action in sorted(places.of, key=lambda one: one.stage):
        if action.is_communication:
            continue
        stages.setdefault(action.microbatch, {}).setdefault(action.kind, []).append(action.stage)
        if action.kind != "F":
            _check_follows(places, action, "I" if action.kind == "W" else "F")
    for microbatch, kinds in stages.items():
        forward = kinds["F"]
        if forward != list(range(len(forward))):
            places.fail(
                f"microbatch {microbatch} runs forward on stages {forward}, allowed: the first "
                "ones without a gap",
                Action(forward[-1], "F", microbatch),
            )
        _check_backward(places, microbatch, kinds)
        for stage in kinds.get("I", []):
            if stage not in kinds.get("W", []):
                places.fail(
                    f"microbatch {microbatch} has no weight gradient on stage {stage}",
                    Action(stage, "I", microbatch),
                )


def _check_follows(places: Places, action: Action, kind: Kind) -> None:
    before = Action(action.stage, kind, action.microbatch)
    if before not in places.of:
        places.fail(f"{action} needs {before}, which is missing", action)
    if places.of[before] > places.of[action]:
        places.fail(f"{action} comes before {before}, whose result it needs", action, before)


def _check_backward(places: Places, microbatch: Microbatch, kinds: dict[Kind, list[int]]) -> None:
    """A backward pass covers all stages of the forward's, that of a fill neighbouring ones."""
    stages = sorted(kinds.get("B", []) + kinds.get("I", []))
    local = kinds.get("L", [])
    if local and stages:
        places.fail(
            f"microbatch {microbatch} runs backward on stages {stages} and in the exits of stages "
            f"{local}, allowed: one of both",
            Action(local[0], "L", microbatch),
        )
    if local or (microbatch.role and not stages):
        return
    allowed = kinds["F"] if not microbatch.role else list(range(stages[0], stages[-1] + 1))
    if stages != allowed:
        places.fail(
            f"microbatch {microbatch} runs backward on stages {stages}, allowed: {allowed}",
            Action((stages or allowed)[-1], "F", microbatch),
        )


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
