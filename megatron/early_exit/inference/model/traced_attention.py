"""Attention of single positions in operations that a compiler sees through.

On a CPU it makes one loop of them, over as many positions as the longest row has.

Shapes: r rows; np query heads, ng key-value heads, hn head size; t positions that are looked at.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class TracedPlaces(NamedTuple):
    """Where rows are in the caches, see `Places`.

    Attributes:
        slots: [r], of each row; None where there is one row and one slot.
        positions: [r], of each row in its slot.
        seen: [t], the positions that are looked at, up to the last row's or further.
    """

    slots: Tensor | None
    positions: Tensor
    seen: Tensor

    def open_sizes(self, has_fixed_rows: bool) -> list[Tensor]:
        """The positions that are looked at [t], and where the number of rows is open their
        positions and slots [r]; see `Places`."""
        if has_fixed_rows:
            return [self.seen]
        return [self.seen, self.positions, *([] if self.slots is None else [self.slots])]

    def attend(self, cache: Tensor, queries: Tensor, new: Tensor, scale: float) -> Tensor:
        """Attend to the positions that are looked at, masked for each row: a cache
        [slots, places, 2 ng, hn], queries [r, np, hn] and new keys and values [r, 2 ng, hn] ->
        [r, np, hn]; see `Places`."""
        groups = new.shape[1] // 2
        window = self._keep(cache, new)
        all_keys, all_values = window.transpose(1, 2).float().split(groups, dim=1)
        # [r, ng, np / ng, 1, hn] and [r, ng, 1, t, hn]: a sum over entries, one over positions.
        grouped = queries.float().unflatten(1, (groups, -1)).unsqueeze(3)
        scores = (grouped * all_keys.unsqueeze(2)).sum(dim=-1) * scale
        unseen = self.seen > self.positions[:, None]
        scores = scores.masked_fill(unseen[:, None, None], -torch.inf)
        weights = torch.softmax(scores, dim=-1).unsqueeze(-1)
        attended = (weights * all_values.unsqueeze(2)).sum(dim=3)
        return attended.flatten(1, 2).to(queries.dtype)

    def _keep(self, cache: Tensor, new: Tensor) -> Tensor:
        """Put keys and values [r, 2 ng, hn] into the cache; returns what they attend to,
        [r, t, 2 ng, hn]."""
        if self.slots is None:
            cache[:, self.positions] = new
            return cache[:, : self.seen.shape[0]]
        cache[self.slots, self.positions] = new
        # By slots alone: positions that are looked up one by one are read one by one.
        return cache[:, : self.seen.shape[0]][self.slots]
