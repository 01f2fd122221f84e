"""Checks of what is computed: each microbatch's passes over the stages."""

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
