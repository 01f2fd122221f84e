"""How much memory the caches may take, and for how many sequences at a time that is enough."""

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron.early_exit.errors import FieldError, out_of_range
from megatron.early_exit.hardware.resources import available_memory
from megatron.early_exit.hardware.virtual_memory import smallest_piece
from megatron.early_exit.inference.engine.cache_pages import PAGE_SIZE, CachePages
from megatron.early_exit.inference.engine.page_sizes import SlotPieces, page_bytes
from megatron.early_exit.inference.model.segmented_model import SegmentedModel
from megatron.early_exit.ranges import ONE_OR_MORE, Range

DEFAULT_GPU_MEMORY_UTILIZATION = 0.9
_WORKSPACE = 2**30
"""Bytes of a GPU that are left for what is computed."""
_SHARE_OF_A_MACHINE = 0.5
"""Most of the memory that is left on a machine with a CPU that caches take if nobody says."""
_PREFIXES = 2
"""Caches for all slots, and as much again for pages of past sequences."""
_SHARE_OF_SLOTS = 0.8
"""Of a GPU's caches, at most, where slots are taken whole; the rest is for pages of past sequences.
"""
_MOST_PIECES = 2**18
"""Of a GPU's caches: each is told to the driver at the start, which takes some microseconds."""

Agree = Callable[[int], int]
"""Takes this process's number, gives the least of all processes."""


@dataclass(frozen=True, slots=True)
class CacheBudget:
    """What an engine may use for its caches.

    Attributes:
        num_slots: sequences at a time.
        page_bytes: what a page takes in each segment.
        bytes: for all pages.
        reserved: bytes that slots take from the beginning, where they do so; `bytes` is then for
            pages of past sequences alone.
        pieces: how the memory of a GPU's slots is taken, where that is not from the beginning.
    """

    num_slots: int
    page_bytes: tuple[int, ...]
    bytes: int
    reserved: int = 0
    pieces: SlotPieces | None = None

    def pages(self, keeps_prefixes: bool) -> CachePages:
        """What gives out the pages of one process that computes all segments."""
        return CachePages(
            self.page_bytes,
            self.bytes,
            keeps_prefixes=keeps_prefixes,
            reserved=self.reserved,
            slot_page_bytes=self._slot_page_bytes,
            pages_at_once=self._pages_at_once,
        )

    def pages_of_stages(self, keeps_prefixes: bool, agree: Agree) -> CachePages:
        """What gives out the pages of several stages, each of which takes a page of its own when
        the first one does: it counts pages, not bytes."""
        size = sum(self._slot_page_bytes)
        budget, reserved = agree(self.bytes // size), agree(self.reserved // size)
        return CachePages(
            (1,),
            budget,
            keeps_prefixes=keeps_prefixes,
            reserved=reserved,
            pages_at_once=self._pages_at_once,
        )

    @property
    def _slot_page_bytes(self) -> tuple[int, ...]:
        return self.page_bytes if self.pieces is None else self.pieces.page_bytes

    @property
    def _pages_at_once(self) -> int:
        return 1 if self.pieces is None else self.pieces.pages_at_once


def plan_caches(
    model: SegmentedModel,
    max_batch_size: int,
    max_sequence_length: int,
    kv_cache_memory: int | None,
    gpu_memory_utilization: float | None,
    agree: Agree,
) -> CacheBudget:
    """Divide the memory that there is.

    Args:
        model: the model, or this process's part of it; its weights take their memory already.
        max_batch_size: sequences at a time, where there is memory for so many.
        max_sequence_length: most positions of a sequence.
        kv_cache_memory: bytes for the caches of this process; None is what the device has left.
        gpu_memory_utilization: share of a GPU's memory that this process may use in all; None is
            `DEFAULT_GPU_MEMORY_UTILIZATION`.
        agree: what all processes of the engine can do.

    Raises:
        FieldError: a number is out of range or has no effect here, or there is not enough memory
            for one sequence.
    """
    Range(least=0, most=1, excludes_least=True).check(gpu_memory_utilization=gpu_memory_utilization)
    ONE_OR_MORE.check(kv_cache_memory=kv_cache_memory)
    sizes = page_bytes(model)
    slot = sum(sizes) * -(-max_sequence_length // PAGE_SIZE)
    is_on_cpu = model.device.type == "cpu"
    if gpu_memory_utilization is not None and (is_on_cpu or kv_cache_memory is not None):
        where = "on a CPU" if is_on_cpu else "beside kv_cache_memory"
        problem = f"has no effect {where}"
        raise FieldError("gpu_memory_utilization", problem, value=gpu_memory_utilization)
    if kv_cache_memory is not None:
        size = kv_cache_memory
        if not is_on_cpu and size > (free := agree(_left_on_gpu(model.device, 1.0))):
            raise out_of_range("kv_cache_memory", size, f"up to {free} bytes, which are left")
    elif is_on_cpu:
        # torchrun says how many processes share the machine.
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        most = int(available_memory() * _SHARE_OF_A_MACHINE / ranks)
        # Memory of a CPU is taken when it is written to, so one sequence may always try.
        size = max(min(_PREFIXES * max_batch_size * slot, most), slot)
    else:
        share = gpu_memory_utilization or DEFAULT_GPU_MEMORY_UTILIZATION
        size = _left_on_gpu(model.device, share)
    size = agree(size)
    pieces = None
    if not is_on_cpu:
        pieces = _slot_pieces(model, max_batch_size, max_sequence_length, agree)
    if pieces is not None:
        at_once = pieces.num_positions
        slot = sum(pieces.page_bytes) * pieces.pages_at_once * -(-max_sequence_length // at_once)
    slot = -agree(-slot)
    if size < slot:
        raise _too_small(size, slot, max_sequence_length, kv_cache_memory is not None)
    if is_on_cpu or pieces is not None:
        return CacheBudget(max_batch_size, sizes, size, pieces=pieces)
    num_slots = min(max_batch_size, max(int(size * _SHARE_OF_SLOTS) // slot, 1))
    slots = num_slots * slot
    return CacheBudget(num_slots, sizes, size - slots, slots)


def _slot_pieces(
    model: SegmentedModel, num_slots: int, length: int, agree: Agree
) -> SlotPieces | None:
    """Those of the caches on a GPU; None where it is better, or not possible otherwise, to take
    slots whole. It is the same in all processes."""
    smallest = agree(smallest_piece(model.device) or 0)
    if not smallest:
        return None
    pieces = SlotPieces.of(model, smallest)
    if length < 2 * pieces.num_positions:
        # Pieces would take more than they save.
        return None
    whole = num_slots * length * sum(page_bytes(model)) // PAGE_SIZE
    while -agree(-(whole // pieces.size)) > _MOST_PIECES:
        pieces = SlotPieces.of(model, 2 * pieces.size)
    return pieces


def _left_on_gpu(device: torch.device, utilization: float) -> int:
    free, total = torch.cuda.mem_get_info(device)
    return int(utilization * total) - (total - free) - _WORKSPACE


def _too_small(size: int, slot: int, length: int, is_asked: bool) -> FieldError:
    if is_asked:
        allowed = f"{slot} bytes or more, which one sequence of {length} tokens takes"
        return out_of_range("kv_cache_memory", size, allowed)
    most = max(size, 0) * length // slot
    return FieldError(
        "max_sequence_length",
        f"is not possible: one sequence takes {slot / 1e9:.1f} GB of the caches, and "
        f"gpu_memory_utilization leaves {max(size, 0) / 1e9:.1f} GB",
        f"up to {most}",
        value=length,
    )
