"""One pass of a batch through a segment: which positions of which sequences, and their attention.

Shapes: r rows of the batch (one for each position of each sequence in it), np query heads, ng
key-value heads, hn head size, t positions up to the end of the longest sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from megatron.early_exit.inference.kv_cache import KVCache
from megatron.early_exit.inference.rotary import RotaryTable


class Span(NamedTuple):
    """Consecutive positions of one sequence."""

    slot: int
    start: int
    end: int


def in_pass_order(span: Span) -> tuple[bool, int]:
    """Sort key of the spans of a pass: single positions first, each kind by its slots."""
    return span.end - span.start > 1, span.slot


@dataclass(frozen=True, slots=True)
class _Group:
    """Rows that attend in one call of the kernel, over the slots that they are in."""

    rows: slice
    """Of the queries."""
    keys: tuple[Tensor, ...]
    """[slots, ng, t, hn] for each attention."""
    values: tuple[Tensor, ...]
    mask: Tensor | None
    """[slots, 1, 1, t] or [s * np / ng, t], added to the scores; None where none is needed."""
    causal: bool = False
    """The rows are all positions of a sequence from the first on."""
    places: Tensor | None = None
    """Which of the slots each row is in, where slots in between have no row."""


class Pass:
    """What the attentions of one pass share.

    Rows are in the order of the spans. Those that are alone in their sequence attend in one call
    over the slots from the first to the last of them: slots in between that have no row cost a
    little arithmetic, which is less than gathering the keys and values of the others would.

    Args:
        cache: of the segment, or of an exit's block.
        spans: what is computed, sorted by `in_pass_order`.
        rotary: the rotary table, if the model has rotary embeddings.
        num_heads: query heads.
        last_only: only the last position of each span needs a result.

    Attributes:
        cos, sin: rows of the rotary table [r, 1, 2, hn / 2]; None without rotary embeddings.
        results: the rows that need a result; None is all of them.
    """

    def __init__(
        self,
        cache: KVCache,
        spans: Sequence[Span],
        rotary: RotaryTable | None,
        num_heads: int,
        last_only: bool = False,
    ) -> None:
        self.cache = cache
        self._per_group = num_heads // cache.num_groups
        self._singles = sum(span.end - span.start == 1 for span in spans)
        self._spans = spans
        self._index: tuple[Tensor, Tensor] | None = None
        device = cache.data.device
        if len(spans) > 1 and self._singles:
            alone = spans[: self._singles]
            slots = torch.tensor([span.slot for span in alone], device=device)
            self._index = (slots, torch.tensor([span.start for span in alone], device=device))
        self._targets = self._slices()
        self.cos: Tensor | None = None
        self.sin: Tensor | None = None
        if rotary is not None:
            rows = self._positions(device)
            self.cos, self.sin = rotary.cos[rows], rotary.sin[rows]
        self.results: Tensor | None = None
        if last_only and self._singles < len(spans):
            ends = torch.tensor([span.end - span.start for span in spans], device=device)
            self.results = ends.cumsum(0) - 1
            self._groups = [self._one_call(spans)]
        else:
            self._groups = self._calls()

    def _positions(self, device: torch.device) -> slice | Tensor:
        if len(self._spans) == 1:
            return slice(self._spans[0].start, self._spans[0].end)
        if self._index is not None and self._singles == len(self._spans):
            return self._index[1]
        ranges = [torch.arange(span.start, span.end, device=device) for span in self._spans]
        return torch.cat(ranges)

    def _slices(self) -> list[tuple[slice, tuple[Tensor, ...]]]:
        """Rows, and where the keys and values of each attention go, of spans written by slices."""
        by_index = self._singles if self._index is not None else 0
        targets, row = [], by_index
        for span in self._spans[by_index:]:
            rows = slice(row, row + span.end - span.start)
            targets.append((rows, self.cache.rows(*span)))
            row = rows.stop
        return targets

    def _calls(self) -> list[_Group]:
        groups = []
        if self._singles:
            groups.append(self._one_call(self._spans[: self._singles]))
        row = self._singles
        for span in self._spans[self._singles :]:
            rows = slice(row, row + span.end - span.start)
            keys, values = self.cache.window(span.slot, span.slot + 1, span.end)
            causal = span.start == 0
            mask = None if causal else self._mask_of_span(span)
            groups.append(_Group(rows, keys, values, mask, causal))
            row = rows.stop
        return groups

    def _one_call(self, spans: Sequence[Span]) -> _Group:
        """The last positions of `spans`."""
        slots, ends = [span.slot for span in spans], [span.end for span in spans]
        first, last, end = min(slots), max(slots) + 1, max(ends)
        keys, values = self.cache.window(first, last, end)
        rows = slice(0, len(spans))
        # A slot that has no row attends to its first position, and the result is not used.
        seen = [1] * (last - first)
        for slot, own in zip(slots, ends, strict=True):
            seen[slot - first] = own
        device = self.cache.data.device
        mask = places = None
        if min(seen) < end:
            hidden = torch.arange(end, device=device) >= torch.tensor(seen, device=device)[:, None]
            mask = self.cache.data.new_zeros(last - first, 1, 1, end)
            mask.masked_fill_(hidden[:, None, None], -torch.inf)
        if last - first > len(spans) or slots != sorted(slots):
            places = torch.tensor(slots, device=device) - first
        return _Group(rows, keys, values, mask, places=places)

    def _mask_of_span(self, span: Span) -> Tensor:
        """[s * np / ng, t], added to the scores of a span behind the first position."""
        count, data = span.end - span.start, self.cache.data
        mask = data.new_full((count, span.end), -torch.inf).triu_(span.start + 1)
        return mask.repeat_interleave(self._per_group, dim=0)

    def write(self, attention: int, new: Tensor) -> None:
        """Put keys and values [r, 2 ng, hn] into the cache."""
        if self._index is not None:
            self.cache.by_attention[attention][self._index] = new.narrow(0, 0, self._singles)
        for rows, targets in self._targets:
            targets[attention].copy_(new[rows])

    def attend(self, attention: int, queries: Tensor, scale: float | None) -> Tensor:
        """Attention of `queries` over the cache.

        Args:
            queries: [rows that need a result, np, hn]

        Returns:
            [rows that need a result, np * hn]
        """
        if len(self._groups) == 1:
            return self._attend(self._groups[0], attention, queries, scale)
        parts = [
            self._attend(group, attention, queries[group.rows], scale) for group in self._groups
        ]
        return torch.cat(parts)

    def _attend(
        self, group: _Group, attention: int, queries: Tensor, scale: float | None
    ) -> Tensor:
        keys, values = group.keys[attention], group.values[attention]
        kernel = functional.scaled_dot_product_attention
        count, size = queries.shape[0], queries.shape[2]
        groups = self.cache.num_groups
        if group.causal:
            attended = kernel(
                queries.transpose(0, 1).unsqueeze(0),
                keys,
                values,
                is_causal=True,
                scale=scale,
                enable_gqa=self._per_group > 1,
            )
            return attended[0].transpose(0, 1).reshape(count, -1)
        # The queries of a group stand in for positions: no key is copied for them.
        if keys.shape[0] == 1 and count > 1:
            grouped = queries.unflatten(1, (groups, -1)).transpose(0, 1).flatten(1, 2).unsqueeze(0)
            attended = kernel(grouped, keys, values, attn_mask=group.mask, scale=scale)
            return attended[0].unflatten(1, (count, -1)).transpose(0, 1).reshape(count, -1)
        grouped = queries.view(count, groups, self._per_group, size)
        if group.places is None:
            attended = kernel(grouped, keys, values, attn_mask=group.mask, scale=scale)
            return attended.reshape(count, -1)
        spread = grouped.new_zeros(keys.shape[0], *grouped.shape[1:])
        spread[group.places] = grouped
        attended = kernel(spread, keys, values, attn_mask=group.mask, scale=scale)
        return attended[group.places].reshape(count, -1)
