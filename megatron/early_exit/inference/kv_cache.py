"""Keys and values of one sequence for a run of consecutive layers."""

from typing import NamedTuple

import torch
from torch import Tensor


class LayerWindow(NamedTuple):
    """One layer's view of a cache during one pass.

    ng is the number of key-value heads, hn their size, s the number of positions in the pass and t
    the number of positions up to its end.
    """

    rows: Tensor
    """[s, 2 ng, hn], to be filled with the keys, then the values, of the pass."""
    keys: Tensor
    """[1, ng, t, hn]"""
    values: Tensor
    """[1, ng, t, hn]"""


class KVCache:
    """A static buffer for up to `capacity` positions.

    Attributes:
        length: number of positions, from the first one on, whose keys and values are in place.
    """

    def __init__(
        self,
        num_layers: int,
        capacity: int,
        num_groups: int,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_layers, capacity, 2 * num_groups, head_size)
        self.data = torch.empty(shape, dtype=dtype, device=device)
        self.num_groups = num_groups
        self.length = 0

    def extend(self, end: int) -> list[LayerWindow]:
        """Views for a pass over the positions from `length` up to `end`, which become cached."""
        start, self.length = self.length, end
        rows = self.data[:, start:end].unbind()
        filled = self.data[:, None, :end].transpose(2, 3)
        keys = filled[:, :, : self.num_groups].unbind()
        values = filled[:, :, self.num_groups :].unbind()
        return list(map(LayerWindow, rows, keys, values))
