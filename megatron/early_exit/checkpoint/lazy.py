"""Tensors that are read only when they are needed.

A conversion has one tensor in memory at a time: a source offers its tensors by name, functions may
transform them, and the writer reads one after the other.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """A tensor that is read when it is needed.

    Attributes:
        shape: its size.
        dtype: of its entries.
        read: reads it from its source on every call and returns it on the CPU; raises ValueError if
            that is not possible.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        """Size in memory."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


LazyWeights = Mapping[str, LazyTensor]
"""The tensors of a model by the names of `weight_shapes`, without padding of the vocabulary."""


def content_hash(tensor: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes, for any shape: the same whatever file or layout
    it is stored in."""
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
