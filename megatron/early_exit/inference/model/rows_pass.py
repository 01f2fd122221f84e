"""What the attentions of compiled layers share.

Shapes: r rows, each a position of some sequence; np query heads, ng key-value heads, hn head size.
"""

from typing import Protocol

import torch
from torch import Tensor

from megatron.early_exit.checkpoint.architecture import Architecture


class Places(Protocol):
    """Where rows are in the caches of a model's layers, and how they attend to those."""

    @property
    def slots(self) -> Tensor | None:
        """[r], of each row; None where there is one row and one slot."""

    @property
    def positions(self) -> Tensor:
        """[r], of each row in its slot."""

    def open_sizes(self, has_fixed_rows: bool) -> list[Tensor]:
        """Those of its tensors whose first size differs between calls of the same compiled layers:
        where the number of rows may differ, the positions [r] are among them."""

    def attend(self, cache: Tensor, queries: Tensor, new: Tensor, scale: float) -> Tensor:
        """Put keys and values into a cache, and attend to it: all rows see what the others have
        put.

        Args:
            cache: [slots, places, 2 ng, hn], keys before values.
            queries: [r, np, hn]
            new: [r, 2 ng, hn]
            scale: of the scores.

        Returns:
            [r, np, hn]
        """


class RowsPass:
    """The counterpart of `Pass` that a compiler can trace.

    Args:
        cache: [slots, places, 2 ng, hn], of the attention.
        architecture: shape of the model.
        places: of the rows.
        turns: see `RotaryTable.real_turns`.
    """

    results: Tensor | None = None

    def __init__(
        self, cache: Tensor, architecture: Architecture, places: Places, turns: Tensor | None
    ) -> None:
        self._cache, self._places = cache, places
        self._turns = None if turns is None else turns[places.positions]
        self._num_heads = architecture.num_attention_heads
        self._num_groups = architecture.num_query_groups

    def attend(self, attention: int, qkv: Tensor, scale: float | None) -> Tensor:
        """[r, (np + 2 ng) hn] -> [r, np hn], see `Pass`."""
        size, groups = self._cache.shape[-1], self._num_groups
        heads = qkv.view(qkv.shape[0], -1, size)
        turned, values = heads.split((self._num_heads + groups, groups), dim=1)
        if self._turns is not None:
            turned = self._turn(turned, self._turns)
        queries, keys = turned.split((self._num_heads, groups), dim=1)
        new = torch.cat((keys, values), dim=1)
        scale = size**-0.5 if scale is None else scale
        return self._places.attend(self._cache, queries, new, scale).flatten(1)

    @staticmethod
    def _turn(heads: Tensor, turns: Tensor) -> Tensor:
        """[r, heads, hn], pairs of neighbours turned like complex numbers."""
        even, odd = heads.float().unflatten(2, (-1, 2)).unbind(-1)
        real, imaginary = turns.unbind(-1)
        turned = torch.stack((even * real - odd * imaginary, even * imaginary + odd * real), dim=-1)
        return turned.flatten(2).to(heads.dtype)
