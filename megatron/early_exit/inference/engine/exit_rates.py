"""How likely it is that an exit gives a token, by what the exits have said so far."""

from collections.abc import Iterable

from megatron.early_exit.inference.engine.policy import UNLIKELY
from megatron.early_exit.inference.sequence import Sequence

_MEMORY = 20
"""How many of the last answers count, about."""
_PRIOR = 4
"""How many answers the average of all sequences counts for in a sequence's own estimate."""


class ExitRateEstimator:
    """Estimates the rate at which each of a model's exits gives tokens, in all and by sequence."""

    def __init__(self, num_exits: int) -> None:
        self._average = [0.5] * num_exits

    def start(self, sequence: Sequence, can_defer_exit: bool = True) -> None:
        """Give a sequence its first estimates for the exits that it asks."""
        sequence.can_defer_exit = can_defer_exit
        sequence.exit_rates = [
            rate if index in sequence.exits else 0.0 for index, rate in enumerate(self._average)
        ] + [1.0]

    def is_likely(self, sequence: Sequence, passed: Iterable[int]) -> bool:
        """Whether a sequence is likely to need a head before those behind `passed` have spoken."""
        stays = 1.0
        for segment in passed:
            stays *= 1 - sequence.rates[segment]
        return stays > UNLIKELY

    def learn(self, sequence: Sequence, exit_index: int, is_taken: bool) -> None:
        """Note that an exit has been asked, and whether it has given the token."""
        sequence.num_answers += 1
        self._average[exit_index] += (is_taken - self._average[exit_index]) / _MEMORY
        count = min(sequence.num_answers + _PRIOR, _MEMORY)
        rates = sequence.exit_rates
        rates[exit_index] += (is_taken - rates[exit_index]) / count
