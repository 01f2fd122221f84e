"""Colours and names of computations, the same in every picture of a timeline."""

from megatron.early_exit.schedules.actions import Action, Kind

NAMES: dict[Kind, str] = {
    "F": "forward",
    "B": "backward",
    "I": "input gradient",
    "W": "weight gradient",
    "L": "exits only",
}
"""What the kinds of computations are called, in the order of a legend."""

CRITICAL_COLOR = "#c0392b"
"""The colour that outlines computations on the critical path."""

EXIT_COLOR = "#8e44ad"
"""The colour of the part of a backward in which exits run."""

UPDATE_COLOR = "#9aa0a6"
"""The colour of the update behind the computations."""

MEMORY_COLOR = "#5b7fb5"
"""The colour of memory."""

_COLORS: dict[Kind, str] = {
    "F": "#7fb2e5",
    "B": "#8fcb8f",
    "I": "#8fcb8f",
    "W": "#cfe8b5",
    "L": "#d9b3e6",
}
_FILLS: dict[Kind, str] = {"F": "#ffd27f", "B": "#f2a65a"}


def name_of(action: Action) -> str:
    """What a computation is called in a legend."""
    return NAMES[action.kind] + (" of a fill" if action.microbatch.role else "")


def color_of(action: Action) -> str:
    """The colour of a computation; fills have colours of their own."""
    return _FILLS[action.kind] if action.microbatch.role else _COLORS[action.kind]


def legend_of(actions: list[Action]) -> dict[str, str]:
    """Names and colours of the kinds that are there, fills last."""
    order = list(NAMES)
    one_each = {name_of(action): action for action in actions}.values()
    ordered = sorted(one_each, key=lambda one: (bool(one.microbatch.role), order.index(one.kind)))
    return {name_of(action): color_of(action) for action in ordered}
