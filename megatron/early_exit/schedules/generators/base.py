"""What every generator of schedules offers."""

from collections.abc import Hashable
from typing import Protocol

from megatron.early_exit.errors import FieldError
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


def require_positive(**values: int) -> None:
    """Check numbers of things that there must be.

    Raises:
        FieldError: a number is below 1.
    """
    for name, value in values.items():
        if value < 1:
            raise FieldError(name, "is out of range", "1 or more", value=value)
