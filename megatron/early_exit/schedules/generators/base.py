"""What every generator of schedules offers."""

from collections.abc import Hashable
from typing import Protocol

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
