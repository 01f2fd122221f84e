"""A schedule: for each rank the list of its actions, readable and writable as CSV."""

import csv
from dataclasses import dataclass
from functools import cached_property
from io import StringIO

from megatron.early_exit.schedules.actions import Action


@dataclass(frozen=True)
class Schedule:
    """What each rank of a pipeline does in a step.

    Without sends and receives these are implied by the computations; `with_communication` makes
    them explicit.

    Attributes:
        ranks: the actions of each rank, in the order in which it runs them.
    """

    ranks: tuple[tuple[Action, ...], ...]

    @property
    def num_ranks(self) -> int:
        """Ranks of the pipeline, also those that have nothing to do."""
        return len(self.ranks)

    @property
    def num_stages(self) -> int:
        """Stages of the pipeline: as many for each rank."""
        highest = max((action.stage for rank in self.ranks for action in rank), default=0)
        return (highest // self.num_ranks + 1) * self.num_ranks

    @cached_property
    def computations(self) -> "Schedule":
        """The same without sends and receives."""
        return Schedule(
            tuple(tuple(a for a in rank if not a.is_communication) for rank in self.ranks)
        )

    @cached_property
    def actions(self) -> frozenset[Action]:
        """The actions of all ranks."""
        return frozenset(action for rank in self.ranks for action in rank)

    def rank_of(self, stage: int) -> int:
        """The rank that a stage lies on."""
        return stage % self.num_ranks

    def to_csv(self) -> str:
        """One line for each rank, one cell for each action."""
        text = StringIO()
        csv.writer(text, lineterminator="\n").writerows(map(str, rank) for rank in self.ranks)
        return text.getvalue()

    @classmethod
    def from_csv(cls, text: str) -> "Schedule":
        """Read what `to_csv` writes.

        Raises:
            ValueError: a cell is not an action, or there is no line.
        """
        ranks = []
        for number, row in enumerate(csv.reader(StringIO(text)), start=1):
            try:
                ranks.append(tuple(Action.parse(cell.strip()) for cell in row))
            except ValueError as error:
                raise ValueError(f"line {number} of the schedule: {error}") from None
        if not ranks:
            raise ValueError("the schedule is empty, allowed: a line for each rank, one or more")
        return cls(tuple(ranks))
