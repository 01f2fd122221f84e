"""Addresses of a GPU behind which there is memory only where somebody has asked for it.

CUDA gives out addresses and memory apart from each other. Caches that are kept so (vAttention,
arXiv 2405.04437) are contiguous to every kernel, and take memory as they fill.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_LOG = logging.getLogger(__name__)


class VirtualMemory:
    """Bytes on a GPU, in pieces; those without memory of their own read as zeros.

    All pieces without memory show the same zeros, so nothing may be written there.

    Args:
        num_pieces: how many there are.
        piece_size: bytes of each, a multiple of `smallest_piece`.
        device: the GPU.

    Attributes:
        bytes: [num_pieces * piece_size] in uint8.

    Raises:
        torch.OutOfMemoryError: there is no memory left.
        RuntimeError: CUDA refuses something else.
    """

    def __init__(self, num_pieces: int, piece_size: int, device: torch.device) -> None:
        self._device, self._piece_size = device, piece_size
        # Also makes the device this thread's own, which the driver asks for.
        self._wait()
        self._addresses = _Addresses(_cuda(), num_pieces * piece_size, piece_size, device)
        self._addresses.show_zeros(range(num_pieces))
        self.bytes = _tensor(self._addresses, device)
        # Nobody has said that new memory is zero. All pieces show the same.
        self.bytes[:piece_size].zero_()

    def fill(self, pieces: range) -> None:
        """Put memory behind consecutive pieces that have none; it is zero.

        Raises:
            torch.OutOfMemoryError: there is no memory left; nothing has changed.
        """
        self._wait()
        self._addresses.fill(pieces)
        self.bytes[pieces.start * self._piece_size : pieces.stop * self._piece_size].zero_()

    def empty(self, pieces: range) -> None:
        """Give back the memory behind pieces that have been filled together."""
        self._wait()
        self._addresses.empty(pieces)

    def _wait(self) -> None:
        # What still runs may read zeros, or what was there.
        torch.cuda.current_stream(self._device).synchronize()


def smallest_piece(device: torch.device) -> int | None:
    """Bytes of the smallest pieces that `VirtualMemory` can have on a GPU; None where that is not
    possible, which a line says. It is tried, not assumed."""
    try:
        cuda = _cuda()
        minimum = cuda.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        size = int(_checked(cuda, cuda.cuMemGetAllocationGranularity(_kind(cuda, device), minimum)))
        memory = VirtualMemory(3, size, device)
        memory.fill(range(1, 2))
        memory.bytes[size : 2 * size].fill_(1)
        sums = memory.bytes.view(3, size).sum(dim=1).tolist()
        memory.empty(range(1, 2))
        if sums != [0, size, 0] or memory.bytes.any():
            raise RuntimeError(f"pieces have the sums {sums}")
    except Exception as error:
        # It can fail in many ways: drivers, versions, virtual machines. Slots can be taken whole.
        _LOG.info("memory of caches is taken whole: %s: %s", type(error).__name__, str(error))
        return None
    return size


class _Addresses:
    """What CUDA knows of the pieces. It lives as long as a tensor over them."""

    def __init__(self, cuda: ModuleType, size: int, piece_size: int, device: torch.device) -> None:
        self._cuda, self._device, self._size, self._piece = cuda, device, size, piece_size
        self._kind = _kind(cuda, device)
        self._access = cuda.CUmemAccessDesc()
        self._access.location.type = cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        self._access.location.id = device.index
        self._access.flags = cuda.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        self._first = int(_checked(cuda, cuda.cuMemAddressReserve(size, 0, 0, 0)))
        try:
            self._zeros = self._create(piece_size)
        except Exception:
            cuda.cuMemAddressFree(self._first, size)
            raise
        self._mapped: dict[int, int] = {}
        """Bytes of each mapping by its address."""
        arguments = (cuda, self._first, size, self._mapped, self._zeros, device)
        weakref.finalize(self, _give_back, *arguments).atexit = False

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": (self._size,),
            "typestr": "|u1",
            "data": (self._first, False),
            "strides": None,
            "version": 3,
        }

    def show_zeros(self, pieces: range) -> None:
        """Map pieces, behind which there is nothing, to the zeros that all share."""
        for piece in pieces:
            self._map(self._address(piece), self._piece, self._zeros)
        self._allow(pieces)

    def fill(self, pieces: range) -> None:
        """Map pieces to memory of their own instead of the zeros."""
        size = len(pieces) * self._piece
        try:
            memory = self._create(size)
        except torch.OutOfMemoryError:
            # PyTorch keeps what it does not need at the moment.
            torch.cuda.empty_cache()
            memory = self._create(size)
        for piece in pieces:
            self._unmap(self._address(piece))
        self._map(self._address(pieces.start), size, memory)
        self._allow(pieces)
        # It goes when it is no longer mapped.
        _checked(self._cuda, self._cuda.cuMemRelease(memory))

    def empty(self, pieces: range) -> None:
        """Map pieces to the zeros again."""
        self._unmap(self._address(pieces.start))
        self.show_zeros(pieces)

    def _address(self, piece: int) -> int:
        return self._first + piece * self._piece

    def _create(self, size: int) -> Any:
        return _checked(self._cuda, self._cuda.cuMemCreate(size, self._kind, 0))

    def _map(self, address: int, size: int, memory: Any) -> None:
        _checked(self._cuda, self._cuda.cuMemMap(address, size, 0, memory, 0))
        self._mapped[address] = size

    def _unmap(self, address: int) -> None:
        _checked(self._cuda, self._cuda.cuMemUnmap(address, self._mapped.pop(address)))

    def _allow(self, pieces: range) -> None:
        size = len(pieces) * self._piece
        if size:
            address = self._address(pieces.start)
            _checked(self._cuda, self._cuda.cuMemSetAccess(address, size, [self._access], 1))


def _give_back(
    cuda: ModuleType,
    first: int,
    size: int,
    mapped: dict[int, int],
    zeros: Any,
    device: torch.device,
) -> None:
    torch.cuda.current_stream(device).synchronize()
    for address, length in mapped.items():
        cuda.cuMemUnmap(address, length)
    cuda.cuMemRelease(zeros)
    cuda.cuMemAddressFree(first, size)


def _cuda() -> ModuleType:
    """CUDA's driver, from the package that comes with PyTorch for CUDA."""
    from cuda.bindings import driver

    module: ModuleType = driver
    return module


def _kind(cuda: ModuleType, device: torch.device) -> Any:
    """Ordinary memory of a GPU, as CUDA asks for it."""
    kind = cuda.CUmemAllocationProp()
    kind.type = cuda.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    kind.location.type = cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    kind.location.id = device.index
    return kind


def _checked(cuda: ModuleType, result: Iterable[Any]) -> Any:
    """What a function of CUDA gives behind its status."""
    status, *values = result
    if status == cuda.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
        raise torch.OutOfMemoryError("CUDA out of memory: no piece of a cache can be had")
    if status != cuda.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"CUDA says {status.name}")
    return values[0] if values else None


def _tensor(addresses: _Addresses, device: torch.device) -> Tensor:
    """The bytes behind the addresses; PyTorch keeps these as long as the tensor."""
    return torch.as_tensor(addresses, device=device)
