"""Runs of positions, the unit in which sequences come forward. Holds numbers, no tensors."""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple


class Span(NamedTuple):
    """Consecutive positions of one sequence."""

    slot: int
    start: int
    end: int

    @property
    def length(self) -> int:
        """Number of positions."""
        return self.end - self.start


def in_pass_order(span: Span) -> tuple[int, int]:
    """Sort key of the spans of a pass: the shortest first, those of a length by their slots."""
    return span.end - span.start, span.slot


def row_ends(spans: Sequence[Span]) -> list[int]:
    """The row behind the last one of each span."""
    return list(accumulate([end - start for _, start, end in spans]))
