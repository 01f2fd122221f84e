"""Interleaved 1F1B: several chunks of the model on each rank (Megatron-LM, arXiv 2104.04473).

The chunks of a rank take turns, for as many microbatches as there are ranks. That divides the
bubble of 1F1B by the number of chunks, for as many times more transfers and more activations.
"""

from dataclasses import dataclass

from megatron.early_exit.errors import out_of_range
from megatron.early_exit.ranges import ONE_OR_MORE, Range
from megatron.early_exit.schedules.actions import Action, Microbatch
from megatron.early_exit.schedules.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class Interleaved:
    """The interleaved 1F1B schedule.

    Attributes:
        num_ranks: pipeline-parallel size P, 2 or more.
        num_microbatches: of a step, a multiple of num_ranks (as Megatron requires).
        num_chunks: chunks on each rank, Megatron's virtual pipeline size.

    Raises:
        ValueError: a number is out of its range.
    """

    num_ranks: int
    num_microbatches: int
    num_chunks: int

    def __post_init__(self) -> None:
        ONE_OR_MORE.check(num_microbatches=self.num_microbatches, num_chunks=self.num_chunks)
        Range(least=2).check(num_ranks=self.num_ranks)
        if self.num_microbatches % self.num_ranks:
            allowed = f"multiples of the {self.num_ranks} ranks"
            raise out_of_range("num_microbatches", self.num_microbatches, allowed)

    def build(self) -> Schedule:
        """The schedule, without sends and receives."""
        return Schedule(tuple(tuple(self._rank(rank)) for rank in range(self.num_ranks)))

    def _rank(self, rank: int) -> list[Action]:
        passes = [
            (chunk, Microbatch(first + i))
            for first in range(0, self.num_microbatches, self.num_ranks)
            for chunk in range(self.num_chunks)
            for i in range(self.num_ranks)
        ]
        forwards = [Action(c * self.num_ranks + rank, "F", m) for c, m in passes]
        last = self.num_chunks - 1
        backwards = [Action((last - c) * self.num_ranks + rank, "B", m) for c, m in passes]
        num_warmup = self._num_warmup(rank)
        actions = forwards[:num_warmup]
        for forward, backward in zip(forwards[num_warmup:], backwards, strict=False):
            actions += [forward, backward]
        return actions + backwards[len(forwards) - num_warmup :]

    def _num_warmup(self, rank: int) -> int:
        most = 2 * (self.num_ranks - 1 - rank) + (self.num_chunks - 1) * self.num_ranks
        return min(most, self.num_microbatches * self.num_chunks)

    def activation_limit(self, rank: int) -> int:
        """Most activations that are alive on a rank at a time, of one chunk each."""
        return min(self._num_warmup(rank) + 1, self.num_microbatches * self.num_chunks)
