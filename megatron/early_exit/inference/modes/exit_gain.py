"""Whether exits pay: what leaving early saves, against what asking costs.

In contrast to drafts, exits change the text, and so does a pause of them. So everything here
depends on the sequence's own tokens and on constants. What the other sequences of a batch do, with
which it shares the reading of weights, is taken to be what it does itself on average.
"""

from collections.abc import Collection
from dataclasses import dataclass

from megatron.early_exit.inference.modes.pauses import Pauses

_MEMORY = 20
"""Tokens over which rates are averaged, about."""
_PRIOR = 4
"""Tokens for which the rates of the beginning count."""


@dataclass(frozen=True, slots=True)
class ExitCosts:
    """What a model's parts take, in weights that are read.

    Attributes:
        segments: those in front of each exit, and behind the last one.
        head: the final head.
        exit_head: an exit's, with all that belongs to the exit.
        held: the share of a layer's arithmetic that a position takes that is held behind an exit.
        rows: as many rows take as long to compute as the weights do to read.
        step: what each step takes besides.
    """

    segments: tuple[float, ...]
    head: float
    exit_head: float
    held: float
    rows: float
    step: float


class ExitGain:
    """Keeps the account of one sequence's exits.

    Each exit that a token comes to is a step of its own. Of weights that several sequences need,
    the time of reading is divided among them, but there has to be somebody who needs them; each row
    is computed for itself. What a token leaves undone is owed: later tokens attend to it.

    Args:
        costs: of the model.
        exits: the indices of those that are asked.
        company: sequences that run together.
        is_gated: gates are asked first, which cost nothing that counts.
        is_held: what leaves is held, so that it owes no more than keys and values.
    """

    def __init__(
        self,
        costs: ExitCosts,
        exits: Collection[int],
        company: int,
        *,
        is_gated: bool = False,
        is_held: bool = False,
    ) -> None:
        self._costs, self._company, self._is_gated = costs, company, is_gated
        self._last = len(costs.segments) - 1
        self._stops = (*sorted(exits), self._last)
        self._owed = costs.held if is_held else 1.0
        # How often tokens come to a segment, and how often the head behind it gives them.
        self._comes = [0.5] * len(costs.segments)
        self._gives = [0.5] * len(costs.segments)
        self._count = 0
        self._pauses = Pauses()

    def add(self, segment: int) -> int:
        """Add a token, which the head behind a segment has given.

        Returns:
            Tokens to go on without exits; 0 where they pay, as far as is known.
        """
        gain = 1 - self._time(segment) / self._full_time
        self._count += 1
        weight = 1 / min(self._count + _PRIOR, _MEMORY)
        for one in range(self._last + 1):
            self._comes[one] += weight * ((one <= segment) - self._comes[one])
            self._gives[one] += weight * ((one == segment) - self._gives[one])
        return self._pauses.add(gain)

    @property
    def _full_time(self) -> float:
        costs, company = self._costs, self._company
        weights = sum(costs.segments) + costs.head
        return costs.step / company + weights * (1 / company + 1 / costs.rows)

    def _time(self, segment: int) -> float:
        """The time of a token that the head behind a segment has given."""
        costs, time = self._costs, 0.0
        for one, weights in enumerate(costs.segments):
            comes = one <= segment
            arithmetic = 1.0 if comes else self._owed
            time += weights * (self._share(comes, self._comes[one]) + arithmetic / costs.rows)
        for stop in self._stops:
            comes, rate = stop <= segment, self._comes[stop]
            time += costs.step * self._share(comes, rate)
            if self._is_gated:
                comes, rate = stop == segment, self._gives[stop]
            head = costs.head if stop == self._last else costs.exit_head
            time += head * (self._share(comes, rate) + comes / costs.rows)
        return time

    def _share(self, needs: bool, rate: float) -> float:
        """One sequence's share of what is done once for all, if any of them needs it.

        Args:
            needs: this one does.
            rate: how often it does on average.
        """
        nobody = (1 - needs) * (1 - rate) ** (self._company - 1)
        return (1 - nobody) / self._company
