"""How likely it is that an exit gives a token, by what the exits have said so far."""

from collections.abc import Iterable

from megatron.early_exit.inference.decoding.policy import UNLIKELY
from megatron.early_exit.inference.decoding.progress import Progress

_MEMORY = 20
"""Answers that count, about."""
_PRIOR = 4
"""Answers for which a sequence takes what is usual at an exit."""


class Expectations:
    """What is usual at each exit, and with each sequence.

    Args:
        num_exits: of the model.
    """

    def __init__(self, num_exits: int) -> None:
        self._usual = [0.5] * num_exits
        """How likely an exit that is asked gives the token."""

    def start(self, progress: Progress, exits: Iterable[int], runs_on: bool = True) -> None:
        """Take down which exits a sequence asks.

        Args:
            exits: their indices.
            runs_on: see `Progress`.
        """
        progress.chances = [0.0] * len(self._usual) + [1.0]
        progress.exits = frozenset(exits)
        for index in progress.exits:
            progress.chances[index] = self._usual[index]
        progress.runs_on = runs_on

    def is_likely(self, progress: Progress, passed: Iterable[int]) -> bool:
        """Whether a head is worth a question before those behind segments passed have spoken."""
        stays = 1.0
        for segment in passed:
            stays *= 1 - progress.chances[segment]
        return stays > UNLIKELY

    def learn(self, progress: Progress, exit_index: int, left: bool) -> None:
        """An exit has been asked, and it has given the token or not."""
        progress.answers += 1
        self._usual[exit_index] += (left - self._usual[exit_index]) / _MEMORY
        count = min(progress.answers + _PRIOR, _MEMORY)
        progress.chances[exit_index] += (left - progress.chances[exit_index]) / count
