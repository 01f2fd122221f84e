"""The data of a step's microbatches, whatever the order in which a stage works on them."""

from collections.abc import Iterator, Sequence
from typing import Any

from megatron.early_exit.schedules.actions import Microbatch


class StepData:
    """Gives out each microbatch of a step when it is asked for.

    All stages draw the same microbatches from their copies of the data in the same order, so a
    microbatch is the same samples on each of them. What a stage draws before it needs it is kept.

    Args:
        data: an iterator that goes on over the steps.
        order: in which the microbatches of the step are drawn.
    """

    def __init__(self, data: Any, order: Sequence[Microbatch]) -> None:
        self._data = data
        self._order = list(order)
        self._drawn: dict[Microbatch, Any] = {}
        self._selected: Microbatch | None = None
        self._num_drawn = 0

    def select(self, microbatch: Microbatch) -> None:
        """Choose the microbatch that is asked for next."""
        self._selected = microbatch

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        """The selected microbatch, once."""
        assert self._selected is not None
        while self._selected not in self._drawn:
            self._draw()
        return self._drawn.pop(self._selected)

    def _draw(self) -> None:
        self._drawn[self._order[self._num_drawn]] = next(self._data)
        self._num_drawn += 1

    def finish(self) -> None:
        """Draw what this stage has not worked on, if it draws at all: others have."""
        while 0 < self._num_drawn < len(self._order):
            self._draw()
        self._drawn.clear()
