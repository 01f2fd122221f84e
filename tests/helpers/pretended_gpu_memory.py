"""Stand-in for the part of CUDA's driver that gives out addresses and memory apart.

Linux can do the same: memory is a file without a name, which may be seen at many addresses, and
addresses behind which there is nothing end the process when they are touched. The rules of CUDA are
kept: whatever breaks one is refused.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from cuda.bindings import driver as real
from torch import Tensor

from megatron.early_exit.hardware import virtual_memory

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
)
_LIBC.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_LIBC.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_FIXED, _NO_RESERVE = 0x10, 0x4000
_NONE = 0
_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
_OK = real.CUresult.CUDA_SUCCESS
_INVALID = real.CUresult.CUDA_ERROR_INVALID_VALUE


class PretendedDriver:
    """Types and numbers are those of the real driver.

    Args:
        piece: bytes of the smallest piece.
        limit: bytes of memory that there are.

    Attributes:
        limit: bytes of memory that there are.
        taken: bytes of memory that exist.
        most_taken: most of them at any time.
        reserved: bytes of addresses.
        num_waits: how often the host has waited for the device.
    """

    def __init__(self, piece: int = mmap.PAGESIZE, limit: int = 2**33) -> None:
        self.piece, self.limit = piece, limit
        self.taken = self.most_taken = self.reserved = self.num_waits = 0
        self._sizes: dict[int, int] = {}
        self._uses: dict[int, int] = {}
        self._mapped: dict[int, tuple[int, int]] = {}
        self._pieces: set[int] = set()
        self._has_waited = False

    def __getattr__(self, name: str) -> Any:
        return getattr(real, name)

    def wait(self) -> None:
        """Wait until everything has run that was queued."""
        self.num_waits += 1
        self._has_waited = True

    def zeros_are_zero(self) -> bool:
        """Whether nobody has written to memory that is seen at several addresses."""
        seen = Counter(memory for memory, _ in self._mapped.values())
        shared = [memory for memory, count in seen.items() if count > 1]
        return bool(shared) and all(
            not any(os.pread(memory, self._sizes[memory], 0)) for memory in shared
        )

    def cuMemGetAllocationGranularity(self, kind: Any, option: Any) -> tuple[Any, int]:
        assert kind.location.type == real.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        return _OK, self.piece

    def cuMemAddressReserve(self, size: int, *rest: int) -> tuple[Any, Any]:
        if size % self.piece:
            return _INVALID, None
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
        self.reserved += size
        return _OK, real.CUdeviceptr(_LIBC.mmap(None, size, _NONE, flags, -1, 0))

    def cuMemAddressFree(self, address: int, size: int) -> tuple[Any]:
        if not self._pieces.isdisjoint(self._between(address, size)):
            return (_INVALID,)
        _LIBC.munmap(address, size)
        self.reserved -= size
        return (_OK,)

    def cuMemCreate(self, size: int, kind: Any, flags: int) -> tuple[Any, Any]:
        if size % self.piece or flags:
            return _INVALID, None
        if self.taken + size > self.limit:
            return real.CUresult.CUDA_ERROR_OUT_OF_MEMORY, None
        memory = os.memfd_create("memory of a pretended GPU")
        # Nobody has said that it is zero; as floating-point numbers it is none.
        os.write(memory, b"\xff" * size)
        self.taken += size
        self.most_taken = max(self.most_taken, self.taken)
        self._sizes[memory], self._uses[memory] = size, 1
        return _OK, memory

    def cuMemRelease(self, memory: int) -> tuple[Any]:
        if memory not in self._uses:
            return (_INVALID,)
        self._drop(memory)
        return (_OK,)

    def cuMemMap(self, address: int, size: int, offset: int, memory: int, flags: int) -> tuple[Any]:
        pieces = self._between(address, size)
        if not self._pieces.isdisjoint(pieces) or size != self._sizes[memory] or offset or flags:
            return (_INVALID,)
        _LIBC.mmap(address, size, _NONE, mmap.MAP_SHARED | _FIXED, memory, 0)
        self._mapped[address] = (memory, size)
        self._pieces.update(pieces)
        self._uses[memory] += 1
        return (_OK,)

    def cuMemUnmap(self, address: int, size: int) -> tuple[Any]:
        memory, whole = self._mapped.get(address, (-1, -1))
        # Nothing that has been queued may still see what was there.
        if whole != size or not self._has_waited:
            return (_INVALID,)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE | _FIXED
        _LIBC.mmap(address, size, _NONE, flags, -1, 0)
        del self._mapped[address]
        self._pieces.difference_update(self._between(address, size))
        self._drop(memory)
        return (_OK,)

    def cuMemSetAccess(self, address: int, size: int, allowed: list[Any], count: int) -> tuple[Any]:
        if not self._pieces.issuperset(self._between(address, size)) or count != len(allowed):
            return (_INVALID,)
        _LIBC.mprotect(address, size, _READ_WRITE)
        return (_OK,)

    def queue(self) -> None:
        """Something is queued that may see all memory."""
        self._has_waited = False

    def _between(self, address: int, size: int) -> range:
        return range(address, address + size, self.piece)

    def _drop(self, memory: int) -> None:
        self._uses[memory] -= 1
        if not self._uses[memory]:
            os.close(memory)
            self.taken -= self._sizes.pop(memory)
            del self._uses[memory]


@contextmanager
def pretended_gpu_memory(
    piece: int = mmap.PAGESIZE, limit: int = 2**33, tensor: type[Tensor] = Tensor
) -> Iterator[PretendedDriver]:
    """Lets `VirtualMemory` give out memory of the host.

    Args:
        piece: bytes of the smallest piece.
        limit: bytes that there are.
        tensor: class of the tensors.
    """
    driver = PretendedDriver(piece, limit)

    def view(addresses: Any, device: torch.device) -> Tensor:
        interface = addresses.__cuda_array_interface__
        (size,) = interface["shape"]
        buffer = (ctypes.c_uint8 * size).from_address(interface["data"][0])
        # As PyTorch does, what is seen lives as long as the tensor.
        buffer._addresses = addresses  # type: ignore[attr-defined]
        return torch.frombuffer(buffer, dtype=torch.uint8).as_subclass(tensor)

    stream = SimpleNamespace(synchronize=driver.wait)
    with (
        patch.object(virtual_memory, "_cuda", lambda: driver),
        patch.object(virtual_memory, "_tensor", view),
        patch("torch.cuda.current_stream", lambda device: stream),
        patch("torch.cuda.empty_cache"),
    ):
        yield driver
