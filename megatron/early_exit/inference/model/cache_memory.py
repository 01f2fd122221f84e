"""The memory of caches: as much of it as sequences fill, where that is possible."""

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from megatron.early_exit.inference.model.lazy_zeros import LazyZeros
from megatron.early_exit.inference.model.mapped_zeros import MappedZeros


class CacheMemory(Protocol):
    """Zeros with a slot for each sequence.

    Attributes:
        data: [rows, slots, places, ...]; there may be more places than were asked for.
    """

    data: Tensor

    def commit(self, rows: range, slot: int, end: int) -> None:
        """Have memory behind the places of a slot up to `end`, in rows for which it has always been
        asked together. Nothing else may be written to.

        Raises:
            torch.OutOfMemoryError: there is none left.
        """

    def release(self, slot: int) -> None:
        """Give back the memory of a slot: what was in it is of no further use, but finite."""

    def clear(self, slot: int, length: int | None) -> None:
        """Make the first places of a slot zero, as many positions as `length` says; None is all of
        them."""


class WholeZeros:
    """Memory that is taken from the beginning, and kept. See `CacheMemory`."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        self.data = torch.zeros(*shape, dtype=dtype, device=device)

    def commit(self, rows: range, slot: int, end: int) -> None:
        """Does nothing: all memory is there."""

    def release(self, slot: int) -> None:
        """Does nothing: the next sequence writes over what is there."""

    def clear(self, slot: int, length: int | None) -> None:
        """Overwrite the places of the first `length` positions of a slot with zeros."""
        self.data[:, slot, :length].zero_()


def new_cache_memory(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, piece_size: int | None
) -> CacheMemory:
    """Memory of a cache.

    Args:
        shape: rows, slots, places of a slot, and whatever is in a place.
        dtype: of its elements.
        device: where it is.
        piece_size: bytes of the pieces in which a GPU's memory is taken; None takes all at once.
    """
    if math.prod(shape) == 0 or (device.type != "cpu" and piece_size is None):
        return WholeZeros(shape, dtype, device)
    if piece_size is None:
        return LazyZeros(shape, dtype)
    return MappedZeros(shape, dtype, device, piece_size)
