"""Keys and values of many sequences for a run of consecutive attentions."""

import copy
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple, Self

import torch
from torch import Tensor

from megatron.early_exit.inference.model.cache_memory import new_cache_memory


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


class KVCache:
    """A static buffer: a slot for each sequence, a place in it for each position.

    Args:
        num_attentions: attentions that share the buffer, of a segment or of an exit's block.
        num_slots: sequences at a time.
        capacity: positions of each that are for use.
        num_groups: key-value heads.
        head_size: entries of a key or value.
        dtype: of keys and values.
        device: where they are.
        piece_size: see `new_cache_memory`.

    Attributes:
        first: number of the first attention.
        data: [attentions, slots, m, 2 ng, hn] with m > capacity, keys before values.
        by_slot: for each slot, and in it for each attention, [1, m, 2 ng, hn].
    """

    def __init__(
        self,
        num_attentions: int,
        num_slots: int,
        capacity: int,
        num_groups: int,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device,
        piece_size: int | None = None,
    ) -> None:
        # A place that is never used: a compiler would take all that there are for a constant.
        shape = (num_attentions, num_slots, capacity + 1, 2 * num_groups, head_size)
        # What is masked must be finite.
        self._memory = new_cache_memory(shape, dtype, device, piece_size)
        self._hold(self._memory.data)
        self.num_groups, self.capacity, self.first = num_groups, capacity, 0

    def _hold(self, data: Tensor) -> None:
        self.data = data
        self.by_attention = data.unbind()
        self.by_slot = [slot.unbind() for slot in data.split(1, dim=1)]

    def part(self, attentions: range) -> Self:
        """The same memory, for some consecutive attentions, which keep their numbers."""
        part = copy.copy(self)
        part._hold(self.data[attentions.start - self.first : attentions.stop - self.first])
        part.first = attentions.start
        return part

    def commit(self, slot: int, end: int) -> None:
        """Have memory for the positions of a slot up to `end`, see `CacheMemory`."""
        self._memory.commit(range(self.first, self.first + len(self.data)), slot, end)

    def release(self, slot: int) -> None:
        """Give back the memory of a slot."""
        self._memory.release(slot)

    def clear(self, slot: int, length: int | None) -> None:
        """Make the positions of a slot up to `length` zero; None is all that there are."""
        self._memory.clear(slot, length)

    def rows(self, slot: int, start: int, end: int) -> tuple[Tensor, ...]:
        """For each attention [end - start, 2 ng, hn], to be filled with keys and values."""
        return self.data[:, slot, start:end].unbind()

    def fill(self, spans: Sequence[Span], index: tuple[Tensor, Tensor] | None, new: Tensor) -> None:
        """Put keys and values of some positions into all attentions.

        Args:
            spans: the positions.
            index: slot and position of each; None where they are a single span.
            new: [attentions, r, 2 ng, hn]
        """
        if index is None:
            slot, start, end = spans[0]
            self.data[:, slot, start:end] = new
        else:
            self.data[:, index[0], index[1]] = new.to(self.data.dtype)

    def window(self, first: int, last: int, end: int) -> tuple[tuple[Tensor, ...], ...]:
        """The keys and the values of slots `first` up to `last`, positions up to `end`.

        Returns:
            Two tuples with [slots, ng, end, hn] for each attention.
        """
        filled = self.data[:, first:last, :end].transpose(2, 3)
        keys = filled.narrow(2, 0, self.num_groups)
        values = filled.narrow(2, self.num_groups, self.num_groups)
        return keys.unbind(), values.unbind()
