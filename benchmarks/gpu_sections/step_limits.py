"""The least time of a step of decoding: the bytes that it reads, by the memory's bandwidth."""

from time import perf_counter

import torch

from gpu_sections.models import wait_for
from megatron.early_exit.checkpoint.architecture import Architecture

_COPIES = 10


def weight_bytes(shape: Architecture, layers: int, itemsize: int) -> int:
    """Bytes of the matrices of the first layers, and of one head."""
    return itemsize * (layers * shape.layer_weights + shape.vocab_size * shape.hidden_size)


def cache_bytes(shape: Architecture, layers: int, itemsize: int, positions: float) -> float:
    """Bytes of the keys and values of some positions in the first layers."""
    return positions * itemsize * layers * 2 * shape.num_query_groups * shape.kv_channels


def step_bytes(
    shape: Architecture, layers: int, itemsize: int, batch: int, context: float
) -> float:
    """Bytes that a step has to read, in which each sequence of a batch gets a token.

    Args:
        layers: that the tokens pass.
        itemsize: bytes of a number.
        context: positions of each sequence.
    """
    cache = cache_bytes(shape, layers, itemsize, batch * context)
    return weight_bytes(shape, layers, itemsize) + cache


def copy_bandwidth(device: torch.device, size: int) -> float:
    """Bytes per second of reading and writing memory, by the fastest of some copies.

    Args:
        size: bytes to copy.
    """
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(_COPIES):
        wait_for(device)
        start = perf_counter()
        target.copy_(source)
        wait_for(device)
        seconds.append(perf_counter() - start)
    return 2 * size / min(seconds)
