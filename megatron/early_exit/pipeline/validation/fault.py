"""Where each action of a schedule is, and how a fault in it is explained."""

from collections.abc import Iterable
from typing import NoReturn

from megatron.early_exit.pipeline.actions import Action
from megatron.early_exit.pipeline.grid import draw_grid
from megatron.early_exit.pipeline.schedule import Schedule

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
        """Explain a fault, with these places marked."""
        picture = draw_grid(self.schedule, frozenset(marks), margin=_MARGIN)
        raise ScheduleError(f"{reason}:\n{picture}")
