"""What every generator of schedules offers, and what those with one stage on each rank share."""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron.early_exit.ranges import ONE_OR_MORE
from megatron.early_exit.schedules.actions import Action
from megatron.early_exit.schedules.schedule import Schedule


class Generator(Hashable, Protocol):
    """Makes a schedule and promises how many activations each rank keeps at most."""

    @property
    def num_ranks(self) -> int:
        """Ranks of the pipeline."""

    def build(self) -> Schedule:
        """The schedule, without sends and receives."""

    def activation_limit(self, rank: int) -> int:
        """Most activations that are alive on a rank at a time, each of one microbatch on one of
        the rank's stages."""


@dataclass(frozen=True, kw_only=True)
class StageByStage(ABC):
    """A schedule with one stage on each rank.

    Attributes:
        num_ranks: pipeline-parallel size P.
        num_microbatches: of a step, those that are no fills.

    Raises:
        ValueError: a number is below 1.
    """

    num_ranks: int
    num_microbatches: int

    def __post_init__(self) -> None:
        ONE_OR_MORE.check(num_ranks=self.num_ranks, num_microbatches=self.num_microbatches)

    def build(self) -> Schedule:
        """The schedule, without sends and receives."""
        return Schedule(tuple(tuple(self.actions(stage)) for stage in range(self.num_ranks)))

    @abstractmethod
    def actions(self, stage: int) -> Sequence[Action]:
        """The computations of one stage in their order."""
