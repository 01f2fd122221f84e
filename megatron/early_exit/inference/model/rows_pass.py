"""What the attentions of compiled layers share, in operations that a compiler sees through.

Shapes: r rows, each a position of some sequence; np query heads, ng key-value heads, hn head size,
t positions that are looked at.
"""

import torch
from torch import Tensor

from megatron.early_exit.checkpoint.architecture import Architecture

Rows = tuple[Tensor | None, Tensor, Tensor, Tensor | None]
"""Slots [r] or None, positions [r], all positions [t] that are looked at, and the rotary turns."""


class RowsPass:
    """The counterpart of `Pass` that a compiler can trace.

    Args:
        cache: [slots, positions, 2 ng, hn], of the attention.
        architecture: shape of the model.
        slots: [r], of the rows; None where there is one row and one slot.
        positions: [r], of the rows.
        seen: [t], the positions that are looked at, up to the last row's or further.
        turns: see `RotaryTable.real_turns`.
    """

    results: Tensor | None = None

    def __init__(
        self,
        cache: Tensor,
        architecture: Architecture,
        slots: Tensor | None,
        positions: Tensor,
        seen: Tensor,
        turns: Tensor | None,
    ) -> None:
        self._cache, self._seen = cache, seen
        self._slots, self._positions = slots, positions
        self._turns = None if turns is None else turns[positions]
        self._num_heads = architecture.num_attention_heads
        self._num_groups = architecture.num_query_groups

    def attend(self, attention: int, qkv: Tensor, scale: float | None) -> Tensor:
        """See `Pass`."""
        size, groups = self._cache.shape[-1], self._num_groups
        heads = qkv.view(qkv.shape[0], -1, size)
        turned, values = heads.split((self._num_heads + groups, groups), dim=1)
        if self._turns is not None:
            turned = self._turn(turned, self._turns)
        queries, keys = turned.split((self._num_heads, groups), dim=1)
        window = self._keep(torch.cat((keys, values), dim=1))
        all_keys, all_values = window.transpose(1, 2).float().split(groups, dim=1)
        # [r, ng, np / ng, 1, hn] and [r, ng, 1, t, hn]: a sum over entries, one over positions.
        grouped = queries.float().unflatten(1, (groups, -1)).unsqueeze(3)
        scale = size**-0.5 if scale is None else scale
        scores = (grouped * all_keys.unsqueeze(2)).sum(dim=-1) * scale
        unseen = self._seen > self._positions[:, None]
        scores = scores.masked_fill(unseen[:, None, None], -torch.inf)
        weights = torch.softmax(scores, dim=-1).unsqueeze(-1)
        attended = (weights * all_values.unsqueeze(2)).sum(dim=3)
        return attended.flatten(1).to(qkv.dtype)

    def _keep(self, new: Tensor) -> Tensor:
        """Put keys and values [r, 2 ng, hn] into the cache; returns what they attend to,
        [r, t, 2 ng, hn]."""
        if self._slots is None:
            self._cache[:, self._positions] = new
            return self._cache[:, : self._seen.shape[0]]
        self._cache[self._slots, self._positions] = new
        # By slots alone: positions that are looked up one by one are read one by one.
        return self._cache[:, : self._seen.shape[0]][self._slots]

    @staticmethod
    def _turn(heads: Tensor, turns: Tensor) -> Tensor:
        """[r, heads, hn], pairs of neighbours turned like complex numbers."""
        even, odd = heads.float().unflatten(2, (-1, 2)).unbind(-1)
        real, imaginary = turns.unbind(-1)
        turned = torch.stack((even * real - odd * imaginary, even * imaginary + odd * real), dim=-1)
        return turned.flatten(2).to(heads.dtype)
