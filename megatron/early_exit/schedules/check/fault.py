"""Where each action of a schedule is, and how a fault in it is explained: by a grid of text with a
row for each rank and a column for each step of the lists."""

from collections.abc import Iterable
from typing import NoReturn

from megatron.early_exit.schedules.actions import Action
from megatron.early_exit.schedules.schedule import Schedule

_MARGIN = 6


class ScheduleError(ValueError):
    """A schedule cannot run, or not as promised; the message draws the faulty step."""


class Places:
    """The place of each action, found once.

    Args:
        schedule: what is looked at.

    Raises:
        ScheduleError: an action is on another rank than its stage, or happens twice.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.of: dict[Action, tuple[int, int]] = {}
        for rank, actions in enumerate(schedule.ranks):
            for at, action in enumerate(actions):
                home = schedule.rank_of(action.stage)
                if rank != home:
                    self.fail_at(f"{action} is on rank {rank}, allowed: rank {home}", [(rank, at)])
                if action in self.of:
                    marks = [(rank, at), self.of[action]]
                    self.fail_at(f"{action} happens twice, allowed: once", marks)
                self.of[action] = rank, at

    def fail(self, reason: str, *actions: Action) -> NoReturn:
        """Explain a fault, with these actions marked."""
        self.fail_at(reason, [self.of[action] for action in actions])

    def fail_at(self, reason: str, marks: Iterable[tuple[int, int]]) -> NoReturn:
        """Explain a fault, with these places marked.

        Raises:
            ScheduleError: always.
        """
        picture = draw_grid(self.schedule, frozenset(marks), margin=_MARGIN)
        raise ScheduleError(f"{reason}:\n{picture}")


def draw_grid(
    schedule: Schedule, marks: frozenset[tuple[int, int]] = frozenset(), margin: int | None = None
) -> str:
    """Draw the lists, with marked steps between angle brackets.

    Args:
        schedule: what to draw.
        marks: (rank, position in its list) of each marked step.
        margin: draw so many steps left and right of the marked ones; None for all steps.
    """
    longest = max(len(rank) for rank in schedule.ranks)
    first, end = 0, longest
    if margin is not None and marks:
        first = max(min(at for _, at in marks) - margin, 0)
        end = min(max(at for _, at in marks) + margin + 1, longest)
    rows = [["step", *(f"{at} " for at in range(first, end))]]
    for rank, actions in enumerate(schedule.ranks):
        row = [f"rank {rank}"]
        for at in range(first, end):
            cell = str(actions[at]) if at < len(actions) else ""
            row.append(f">{cell}<" if (rank, at) in marks else f"{cell} ")
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        " ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
