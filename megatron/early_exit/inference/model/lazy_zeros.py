"""Memory of a CPU that is there when it is written to, and goes when it is no longer needed."""

import math
import mmap
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

_NO_RESERVE = 0x4000 if sys.platform == "linux" else 0
"""Linux's MAP_NORESERVE, which Python does not name: more than there is may be asked for."""


class LazyZeros:
    """A tensor of zeros. On a CPU it takes no memory before it is written to: long sequences have
    room, and short ones do not pay for it.

    Args:
        shape: of the tensor.
        dtype: of its elements.
        device: where it is; elsewhere than on a CPU all of it takes memory from the beginning.

    Attributes:
        data: the tensor.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        self._map: mmap.mmap | None = None
        size = math.prod(shape) * dtype.itemsize
        if device.type != "cpu" or size == 0:
            self.data = torch.zeros(*shape, dtype=dtype, device=device)
            return
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
        self._map = mmap.mmap(-1, size, flags=flags)
        self.data = torch.frombuffer(self._map, dtype=dtype).view(*shape)

    def release(self, part: Tensor) -> None:
        """Give back the memory of a part, which is zero then, but for bytes at its ends that share
        a page of the processor with others, and but for other devices: what is there stays.

        Args:
            part: of `data`, contiguous.
        """
        if self._map is None or not hasattr(mmap, "MADV_DONTNEED"):
            return
        start = part.data_ptr() - self.data.data_ptr()
        end = (start + part.numel() * part.itemsize) // mmap.PAGESIZE * mmap.PAGESIZE
        start = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        if end > start:
            self._map.madvise(mmap.MADV_DONTNEED, start, end - start)
