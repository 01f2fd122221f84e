"""Caches on a GPU whose memory is taken when sequences fill them."""

import math
from collections.abc import Sequence

import torch

from megatron.early_exit.hardware.virtual_memory import VirtualMemory


class MappedZeros:
    """Each slot of each row is filled from its beginning on, piece by piece. See `CacheMemory`.

    Args:
        shape: rows, slots, places of a slot, and what is in a place.
        dtype: of its elements.
        device: a GPU.
        piece_size: bytes of a piece.
    """

    def __init__(
        self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, piece_size: int
    ) -> None:
        rows, slots, places, *inner = shape
        self._place = math.prod(inner) * dtype.itemsize
        self._piece = piece_size
        # A slot begins with a piece, and the next one a whole number of places behind it: kernels
        # find slots by counting places. Addresses cost nothing.
        step = piece_size // math.gcd(piece_size, self._place)
        places = -(-places // step) * step
        self._pieces_per_slot = places * self._place // piece_size
        self._num_slots, self._rows = slots, range(rows)
        self._memory = VirtualMemory(rows * slots * self._pieces_per_slot, piece_size, device)
        self.data = self._memory.bytes.view(dtype).view(rows, slots, places, *inner)
        self._filled: dict[tuple[int, int], list[range]] = {}
        """By row and slot, the pieces that were filled together, one behind the other."""

    def commit(self, rows: range, slot: int, end: int) -> None:
        """Fill what is not filled yet, see `CacheMemory`."""
        needed = -(-end * self._place // self._piece)
        if not rows or self._num_filled(rows[0], slot) >= needed:
            return
        # The first row tells of all of them, so it is the last one, in case one cannot be filled.
        for row in reversed(rows):
            first = (row * self._num_slots + slot) * self._pieces_per_slot
            pieces = range(first + self._num_filled(row, slot), first + needed)
            if pieces:
                self._memory.fill(pieces)
                self._filled.setdefault((row, slot), []).append(pieces)

    def release(self, slot: int) -> None:
        """Give back all pieces of a slot, which is zero then."""
        for row in self._rows:
            for pieces in self._filled.pop((row, slot), ()):
                self._memory.empty(pieces)

    def clear(self, slot: int, length: int | None) -> None:
        """Give back all pieces, however many positions `length` says: they come back as zeros."""
        self.release(slot)

    def _num_filled(self, row: int, slot: int) -> int:
        filled = self._filled.get((row, slot))
        if filled is None:
            return 0
        return filled[-1].stop - filled[0].start
