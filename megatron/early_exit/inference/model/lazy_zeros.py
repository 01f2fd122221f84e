"""Memory of a CPU that is there when it is written to, and goes when it is no longer needed."""

import math
import mmap
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

_NO_RESERVE = 0x4000 if sys.platform == "linux" else 0
"""Linux's MAP_NORESERVE, which Python does not name: more than there is may be asked for."""
_KEPT_PLACES = 256
"""Places of a slot whose memory is not given back: the next sequence needs it at once."""


class LazyZeros:
    """Long sequences have room, and short ones do not pay for it. See `CacheMemory`.

    Args:
        shape: rows, slots, places of a slot, and what is in a place; none of them is 0.
        dtype: of its elements.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
        self._map = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=flags)
        self.data = torch.frombuffer(self._map, dtype=dtype).view(*shape)

    def commit(self, rows: range, slot: int, end: int) -> None:
        """Does nothing: memory is there when it is written to."""

    def release(self, slot: int) -> None:
        """Give back the memory behind the first places of a slot, which is zero then, but for bytes
        at its ends that share a page of the processor with others."""
        for row in self.data:
            self._release(row[slot, _KEPT_PLACES:])

    def clear(self, slot: int, length: int | None) -> None:
        """Overwrite the places of the first `length` positions of a slot with zeros, see
        `CacheMemory`."""
        self.data[:, slot, :length].zero_()

    def _release(self, part: Tensor) -> None:
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        start = part.data_ptr() - self.data.data_ptr()
        end = (start + part.numel() * part.itemsize) // mmap.PAGESIZE * mmap.PAGESIZE
        start = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        if end > start:
            self._map.madvise(mmap.MADV_DONTNEED, start, end - start)
