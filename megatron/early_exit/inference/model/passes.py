"""One pass of a batch through a segment: which positions of which sequences, and their attention.

Shapes: r rows of the batch (one for each position of each sequence in it), np query heads, ng
key-value heads, hn head size, t positions up to the end of the longest sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from megatron.early_exit.inference.model.kv_cache import KVCache, Span, row_ends
from megatron.early_exit.inference.model.rotary import RotaryTable
from megatron.early_exit.inference.transfer import upload

_ROWS_OF_A_CALL = 8
"""Rows of attention that take as long as a call of its own."""


@dataclass(slots=True)
class _Call:
    """Rows that attend in one call of the kernel, over the slots that they are in."""

    queries: slice
    """Rows of the queries."""
    first: int
    """The first slot."""
    num_slots: int
    num_rows: int
    """For each slot; fewer may be in use."""
    end: int
    """Positions, t."""
    mask: Tensor | None
    """[slots, 1, 1 or rows * np / ng, t], added to the scores; None where none is needed."""
    causal: bool = False
    """The rows are all positions of a sequence from the first on."""
    places: tuple[Tensor, Tensor] | None = None
    """Slot and row of each query, where they are not simply in order."""
    spread: Tensor | None = None
    """[slots, rows, ng, np / ng, hn], where the queries go then; what is not in use is zero."""
    keys: tuple[Tensor, ...] = ()
    """[slots, ng, t, hn] for each attention."""
    values: tuple[Tensor, ...] = ()


class Workspace:
    """Where attentions turn the queries, keys and values of r rows, one after the other.

    Views are made once instead of in every layer.

    Args:
        count: rows, r.
        num_heads: query heads.
        cache: of the keys and values.
        turns: there are rotary embeddings.

    Attributes:
        space: [r, (np + 2 ng) hn], what is projected goes here.
        turned: [r, np + ng, hn / 2], queries and keys in there as complex numbers.
        unconverted: [r, np + 2 ng, hn], the same space.
        converted: the same in the dtype of the cache, where it has another one.
        queries: [r, ng, np / ng, hn]
        new: [r, 2 ng, hn], the keys and values.
    """

    def __init__(self, count: int, num_heads: int, cache: KVCache, turns: bool) -> None:
        groups, data = cache.num_groups, cache.data
        self.count = count
        heads, size = num_heads + 2 * groups, data.shape[-1]
        # Turned in fp32, whatever the dtype: there are no complex numbers in others.
        dtype = torch.float32 if turns else data.dtype
        self.space = torch.empty(count, heads * size, dtype=dtype, device=data.device)
        self.unconverted = rows = self.space.view(count, heads, size)
        self.turned: Tensor | None = None
        if turns:
            pairs = rows.narrow(1, 0, num_heads + groups).unflatten(2, (-1, 2))
            self.turned = torch.view_as_complex(pairs)
        self.converted: Tensor | None = None
        if dtype != data.dtype:
            self.converted = rows = torch.empty_like(rows, dtype=data.dtype)
        self.new = rows.narrow(1, num_heads, 2 * groups)
        self.queries = rows.narrow(1, 0, num_heads).unflatten(1, (groups, -1))


class Pass:
    """What the attentions of one pass share.

    Rows are in the order of the spans. Short spans attend in one call over the slots from the first
    to the last of them: rows and slots of that rectangle that are not in use cost some arithmetic,
    which is less than a call for each span would.

    Args:
        cache: of the segment, or of an exit's block.
        spans: what is computed, sorted by `in_pass_order`.
        rotary: the rotary table, if the model has rotary embeddings.
        num_heads: query heads.
        last_only: only the last position of each span needs a result.
        workspace: of an earlier pass; of use where it has as many rows.

    Attributes:
        cache: where it is now, see `move_to`.
        count: number of rows, r.
        index: slot and position of each row; None where the rows are a single span.
        results: the rows that need a result; None is all of them.
    """

    def __init__(
        self,
        cache: KVCache,
        spans: Sequence[Span],
        rotary: RotaryTable | None,
        num_heads: int,
        last_only: bool = False,
        workspace: Workspace | None = None,
    ) -> None:
        self.cache = cache
        self._per_group = num_heads // cache.num_groups
        self.spans = spans
        device = cache.data.device
        self.index = index_of(spans, device)
        self.count = count = sum([end - start for _, start, end in spans])
        if workspace is None or workspace.count != count:
            workspace = Workspace(count, num_heads, cache, rotary is not None)
        self.workspace = workspace
        self._rotary = rotary
        self._turns: Tensor | None = None
        self.results: Tensor | None = None
        if last_only and count > len(spans):
            self.results = upload([end - 1 for end in row_ends(spans)], device)
            spans = [Span(slot, end - 1, end) for slot, _, end in spans]
        self._asking = spans
        self._calls: list[_Call] = []
        self._targets: tuple[Tensor, ...] = ()

    def move_to(self, cache: KVCache) -> None:
        """Go on with the same positions in the cache of another segment."""
        self.cache = cache
        self._targets = ()

    def _prepare(self) -> None:
        """Build the plan of the attentions on first use: not all passes have any."""
        cache = self.cache
        self._targets = cache.rows(*self.spans[0]) if self.index is None else cache.by_attention
        if self._rotary is not None and self._turns is None:
            positions = slice(*self.spans[0][1:]) if self.index is None else self.index[1]
            self._turns = self._rotary.turns[positions]
        self._calls = self._calls or self._plan(self._asking)
        for call in self._calls:
            last = call.first + call.num_slots
            call.keys, call.values = cache.window(call.first, last, call.end)

    def _plan(self, spans: Sequence[Span]) -> list[_Call]:
        together = _best_together(spans)
        calls = [self._one_call(0, spans[:together])] if together else []
        row = sum(span.length for span in spans[:together])
        for span in spans[together:]:
            calls.append(self._one_call(row, [span]))
            row += span.length
        return calls

    def _one_call(self, row: int, spans: Sequence[Span]) -> _Call:
        """The rows of `spans`, from `row` on."""
        slots = [span.slot for span in spans]
        first, last, end = min(slots), max(slots) + 1, max(span.end for span in spans)
        num_slots, num_rows = last - first, spans[-1].length
        count = sum(span.length for span in spans)
        queries = slice(row, row + count)
        if num_slots == 1 and spans[0].start == 0:
            return _Call(queries, first, 1, num_rows, end, None, causal=num_rows > 1)
        # Rows that are not in use attend to the first position.
        seen = [[1] * num_rows for _ in range(num_slots)]
        places = []
        for slot, start, stop in spans:
            for i in range(stop - start):
                seen[slot - first][i] = start + i + 1
                places.append((slot - first, i))
        mask = self._mask(seen, end) if min(map(min, seen)) < end else None
        if count == num_slots * num_rows and slots == sorted(slots):
            return _Call(queries, first, num_slots, num_rows, end, mask)
        device = self.cache.data.device
        where = upload(places, device).unbind(1)
        shape = (num_slots, num_rows, self.cache.num_groups, self._per_group)
        spread = self.cache.data.new_zeros(*shape, self.cache.data.shape[-1])
        in_use = (where[0], where[1])
        return _Call(queries, first, num_slots, num_rows, end, mask, False, in_use, spread)

    def _mask(self, seen: list[list[int]], end: int) -> Tensor:
        data = self.cache.data
        limits = upload(seen, data.device)[:, :, None]
        unseen = torch.arange(end, device=data.device) >= limits
        mask = torch.zeros(unseen.shape, dtype=data.dtype, device=data.device)
        mask.masked_fill_(unseen, -torch.inf)
        if mask.shape[1] > 1:
            mask = mask.repeat_interleave(self._per_group, dim=1)
        return mask.unsqueeze(1)

    def attend(self, attention: int, qkv: Tensor, scale: float | None) -> Tensor:
        """Put keys and values into the cache, and attend to it.

        Args:
            attention: its number.
            qkv: [r, (np + 2 ng) hn], what it projects its input to.

        Returns:
            [rows that need a result, np hn]
        """
        if not self._targets:
            self._prepare()
        attention -= self.cache.first
        work = self.workspace
        work.space.copy_(qkv)
        if work.turned is not None and self._turns is not None:
            work.turned.mul_(self._turns)
        if work.converted is not None:
            work.converted.copy_(work.unconverted)
        if self.index is None:
            self._targets[attention].copy_(work.new)
        else:
            self._targets[attention].index_put_(self.index, work.new)
        queries = work.queries if self.results is None else work.queries[self.results]
        if len(self._calls) == 1:
            return self._run(self._calls[0], attention, queries, scale)
        parts = [self._run(call, attention, queries[call.queries], scale) for call in self._calls]
        return torch.cat(parts)

    def _run(self, call: _Call, attention: int, queries: Tensor, scale: float | None) -> Tensor:
        """[rows, ng, np / ng, hn] -> [rows, np hn]"""
        keys, values = call.keys[attention], call.values[attention]
        kernel = functional.scaled_dot_product_attention
        if call.num_rows == 1 and call.places is None:
            attended = kernel(queries, keys, values, attn_mask=call.mask, scale=scale)
            return attended.reshape(call.num_slots, -1)
        count = queries.shape[0]
        if call.causal:
            attended = kernel(
                queries.flatten(1, 2).transpose(0, 1).unsqueeze(0),
                keys,
                values,
                is_causal=True,
                scale=scale,
                enable_gqa=self._per_group > 1,
            )
            return attended[0].transpose(0, 1).reshape(count, -1)
        # The queries of a group stand in for positions: no key is copied for them.
        if call.places is None:
            spread = queries.unflatten(0, (call.num_slots, call.num_rows))
        else:
            assert call.spread is not None
            spread = call.spread.index_put_(call.places, queries)
        grouped = spread.transpose(1, 2).flatten(2, 3)
        attended = kernel(grouped, keys, values, attn_mask=call.mask, scale=scale)
        by_row = attended.unflatten(2, (call.num_rows, -1)).transpose(1, 2)
        if call.places is None:
            return by_row.reshape(count, -1)
        return by_row[call.places].reshape(count, -1)


def index_of(spans: Sequence[Span], device: torch.device) -> tuple[Tensor, Tensor] | None:
    """Slot and position of each row of a pass, [rows] each; None where it is a single span."""
    if len(spans) == 1:
        return None
    slots = [slot for slot, start, end in spans for _ in range(start, end)]
    positions = [position for _, start, end in spans for position in range(start, end)]
    both = upload((slots, positions), device)
    return both[0], both[1]


def _best_together(spans: Sequence[Span]) -> int:
    """How many of the spans attend in one call, the rest each in one of its own."""
    best, least = 0, len(spans) * _ROWS_OF_A_CALL
    first, last = spans[0].slot, spans[0].slot
    for index, span in enumerate(spans):
        first, last = min(first, span.slot), max(last, span.slot)
        alone = len(spans) - index - 1
        cost = (last - first + 1) * span.length + alone * _ROWS_OF_A_CALL
        if cost < least:
            best, least = index + 1, cost
    return best
