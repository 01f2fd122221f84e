"""What the attentions of compiled layers share.

Shapes: r rows, each a position of some sequence; np query heads, ng key-value heads, hn head size,
t positions that are looked at.
"""

from typing import Protocol

import torch
from torch import Tensor

from megatron.early_exit.checkpoint.architecture import Architecture
from megatron.early_exit.inference.model.rows_attention import attend_rows, row_places

Rows = tuple[Tensor | None, Tensor, Tensor | None, Tensor | None]
"""Slots [r] or None, positions [r], all positions [t] that are looked at, or None where each row
looks at its own, and the rotary turns."""


class RowsPass(Protocol):
    """The counterpart of `Pass` that a compiler can trace."""

    results: Tensor | None

    def attend(self, attention: int, qkv: Tensor, scale: float | None) -> Tensor:
        """See `Pass`."""


class RowsPassMaker(Protocol):
    """Makes what the attention of one layer needs."""

    def __call__(self, cache: Tensor, architecture: Architecture, rows: Rows) -> RowsPass:
        """For the cache [slots, positions, 2 ng, hn] of the attention."""


class _Turned:
    """Queries, keys and values of rows, turned by their positions."""

    results: Tensor | None = None

    def __init__(self, cache: Tensor, architecture: Architecture, rows: Rows) -> None:
        self._cache = cache
        self._slots, self._positions, self._seen, turns = rows
        self._turns = None if turns is None else turns[self._positions]
        self._num_heads = architecture.num_attention_heads
        self._num_groups = architecture.num_query_groups

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor]:
        """[r, (np + 2 ng) hn] -> queries [r, np, hn], keys and values [r, 2 ng, hn]"""
        groups = self._num_groups
        heads = qkv.view(qkv.shape[0], -1, self._cache.shape[-1])
        turned, values = heads.split((self._num_heads + groups, groups), dim=1)
        if self._turns is not None:
            turned = self._turn(turned, self._turns)
        queries, keys = turned.split((self._num_heads, groups), dim=1)
        return queries, torch.cat((keys, values), dim=1)

    def _scale(self, scale: float | None) -> float:
        return float(self._cache.shape[-1] ** -0.5) if scale is None else scale

    @staticmethod
    def _turn(heads: Tensor, turns: Tensor) -> Tensor:
        """[r, heads, hn], pairs of neighbours turned like complex numbers."""
        even, odd = heads.float().unflatten(2, (-1, 2)).unbind(-1)
        real, imaginary = turns.unbind(-1)
        turned = torch.stack((even * real - odd * imaginary, even * imaginary + odd * real), dim=-1)
        return turned.flatten(2).to(heads.dtype)


class TracedRows(_Turned):
    """Attention in operations that a compiler sees through: on a CPU it makes one loop of them,
    over as many positions as the longest row has."""

    def attend(self, attention: int, qkv: Tensor, scale: float | None) -> Tensor:
        """See `Pass`."""
        assert self._seen is not None
        queries, new = self._split(qkv)
        window = self._keep(new, self._seen.shape[0])
        all_keys, all_values = window.transpose(1, 2).float().split(self._num_groups, dim=1)
        # [r, ng, np / ng, 1, hn] and [r, ng, 1, t, hn]: a sum over entries, one over positions.
        grouped = queries.float().unflatten(1, (self._num_groups, -1)).unsqueeze(3)
        scores = (grouped * all_keys.unsqueeze(2)).sum(dim=-1) * self._scale(scale)
        unseen = self._seen > self._positions[:, None]
        scores = scores.masked_fill(unseen[:, None, None], -torch.inf)
        weights = torch.softmax(scores, dim=-1).unsqueeze(-1)
        attended = (weights * all_values.unsqueeze(2)).sum(dim=3)
        return attended.flatten(1).to(qkv.dtype)

    def _keep(self, new: Tensor, count: int) -> Tensor:
        """Put keys and values [r, 2 ng, hn] into the cache; returns what they attend to,
        [r, t, 2 ng, hn]."""
        if self._slots is None:
            self._cache[:, self._positions] = new
            return self._cache[:, :count]
        self._cache[self._slots, self._positions] = new
        # By slots alone: positions that are looked up one by one are read one by one.
        return self._cache[:, :count][self._slots]


class OperatorRows(_Turned):
    """Attention as one operator, see `attend_rows`: as on a GPU."""

    def attend(self, attention: int, qkv: Tensor, scale: float | None) -> Tensor:
        """See `Pass`."""
        assert self._slots is not None
        queries, new = self._split(qkv)
        places = row_places(self._slots, self._positions, self._cache.shape[1])
        attended = attend_rows(self._cache, queries, new, *places, self._scale(scale))
        return attended.flatten(1)
