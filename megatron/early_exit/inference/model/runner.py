"""Runs segments and heads over the caches of many sequences.

Each sequence has a slot. The residual stream is kept at every cut, so a segment can be run whenever
its result is needed, over all positions that wait in front of it, as one batch.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement

import torch
from torch import Tensor

from megatron.early_exit.inference.model.cache_memory import new_cache_memory
from megatron.early_exit.inference.model.kv_cache import (
    KVCache,
    Span,
    in_pass_order,
    row_ends,
)
from megatron.early_exit.inference.model.passes import Pass, Workspace, index_of
from megatron.early_exit.inference.model.recorder import preparation
from megatron.early_exit.inference.model.segmented_model import SegmentedModel
from megatron.early_exit.inference.transfer import upload

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Run:
    """What has been run last: often the next segment is run over the same positions."""

    index: int
    spans: tuple[Span, ...]
    this: Pass
    hidden: Tensor


@dataclass(frozen=True, slots=True)
class SlotMemory:
    """Some positions of a slot.

    Attributes:
        segments: keys and values of each [attentions, positions, 2 ng, hn].
        kept: the residual stream at each exit [positions, h]; behind those that of the last layer,
            where the model has a multi-token-prediction module.
        blocks: keys and values of each exit's block [positions, 2 ng, hn], None without one; behind
            those of each depth of that module, of the rows whose last tokens are at the positions.
    """

    segments: list[Tensor]
    kept: list[Tensor]
    blocks: list[Tensor | None]


class SegmentRunner:
    """The model with room for some sequences at a time.

    Args:
        model: what is run.
        num_slots: most sequences at a time.
        capacity: most positions of each.
        piece_size: bytes of the pieces in which the caches' memory on a GPU is taken as sequences
            need it; None takes all of it at once.
    """

    def __init__(
        self, model: SegmentedModel, num_slots: int, capacity: int, piece_size: int | None = None
    ) -> None:
        self.model = model
        self.num_slots, self.capacity, self._piece_size = num_slots, capacity, piece_size
        self._cache = self._new_cache(model.segments[-1].attentions.stop)
        self._parts: dict[tuple[int, int], KVCache] = {}
        # The depths of a multi-token-prediction module are like blocks behind those of the exits.
        blocks = [*(exit_.head.block for exit_ in model.exits), *(one.block for one in model.mtp)]
        self._blocks = blocks
        self._block_caches = [None if one is None else self._new_cache(1) for one in blocks]
        self._block_lengths = [[0] * num_slots for _ in blocks]
        shape = (len(blocks), num_slots, capacity, model.architecture.hidden_size)
        self._kept_memory = new_cache_memory(shape, model.dtype, model.device, piece_size)
        self._kept = self._kept_memory.data
        """The residual stream at the cut behind each segment but the last. With a module that of
        the last one, too, with which depth 1 begins, and what each depth but the last has given.
        """
        self._workspace: Workspace | None = None
        self._last: _Run | None = None

    def _new_cache(self, num_attentions: int) -> KVCache:
        model, shape = self.model, self.model.architecture
        sizes = (self.num_slots, self.capacity, shape.num_query_groups, shape.kv_channels)
        return KVCache(num_attentions, *sizes, model.dtype, model.device, self._piece_size)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compile and capture what is to be compiled, so that no request waits for it.

        Raises:
            ValueError: the compiler does not work here.
        """
        # What is run then writes to the first place of all.
        self.commit([Span(0, 0, 1)], range(len(self.model.segments)), range(len(self._blocks)))
        fused = combinations_with_replacement(range(len(self.model.segments)), 2)
        runs = [(self.model.fused(*ends), self._part(*ends)) for ends in fused]
        for block, cache in zip(self._blocks, self._block_caches, strict=True):
            if block is not None and cache is not None:
                runs.append((block, cache))
        stretches = [(one.compiled, cache) for one, cache in runs if one.compiled is not None]
        for number, (compiled, cache) in enumerate(stretches, start=1):
            _LOG.info("preparing layers: stretch %d of %d", number, len(stretches))
            with preparation():
                compiled.warm_up(cache, self.model.architecture.hidden_size)
        self.release(0)

    def run(
        self,
        index: int,
        spans: Sequence[Span],
        tokens: Sequence[int] | None = None,
        hidden: Tensor | None = None,
        last: int | None = None,
        held: Tensor | None = None,
    ) -> Tensor:
        """Run a segment over positions that have been through the one before it.

        Args:
            index: of the segment.
            spans: sorted by `in_pass_order`.
            tokens: of the positions in the order of the spans, for the first segment.
            hidden: [r, h], what another process has in front of the first segment, instead.
            last: run all segments up to this one; nothing is kept between them, where no exit can
                be asked about those positions, nor can they wait there.
            held: [r], rows that are computed for their keys and values alone, and keep their
                residual stream; None is none. Where they need no result, `propagate` is cheaper.

        Returns:
            The residual stream [r, h] of those positions behind the segment.
        """
        spans = tuple(spans)
        last = index if last is None else last
        if self._piece_size is not None:
            self.commit(spans, range(index, last + 1))
        before, cache = self._last, self._part(index, last)
        if before is not None and before.spans == spans:
            this = before.this
            this.move_to(cache)
        else:
            this = self._pass(cache, spans)
        segment = self.model.fused(index, last)
        if index == 0 and hidden is None:
            assert tokens is not None
            if segment.takes_tokens(this):
                hidden = segment.run_tokens(tokens, this)
            else:
                hidden = segment(self.model.embedding.of_spans(tokens, spans), this)
        else:
            if index > 0:
                hidden = self._gather(index - 1, spans, this.index)
            assert hidden is not None
            if held is None:
                hidden = segment(hidden, this)
            else:
                hidden = segment.run_holding(hidden, this, held)
        self._last = _Run(last, spans, this, hidden)
        if last < len(self._kept):
            self.keep(last, spans, this.index, hidden)
        return hidden

    def keep(
        self, cut: int, spans: Sequence[Span], index: tuple[Tensor, Tensor] | None, hidden: Tensor
    ) -> None:
        """Keep hidden states [r, h] of some positions at a cut; for `index` see `index_of`."""
        if index is None:
            slot, start, end = spans[0]
            self._kept[cut, slot, start:end] = hidden
        else:
            self._kept[cut].index_put_(index, hidden)

    def propagate(self, index: int, spans: Sequence[Span], hidden: Tensor | None = None) -> None:
        """Take held positions through a segment: its attentions make keys and values of their
        states, and the states stay what they are.

        Args:
            index: of the segment.
            spans: have been through the one before it.
            hidden: [r, h], what another process has in front of the first segment.
        """
        spans = tuple(spans)
        if self._piece_size is not None:
            self.commit(spans, range(index, index + 1))
        where = index_of(spans, self.model.device)
        if hidden is None:
            hidden = self._kept_at(index - 1, spans, where)
        held = self.model.held_states(index)
        if held is not None:
            self._part(index, index).fill(spans, where, held(hidden, _positions(spans, where)))
        if index < len(self._kept):
            self.keep(index, spans, where, hidden)

    def _part(self, first: int, last: int) -> KVCache:
        """The keys and values of some segments."""
        part = self._parts.get((first, last))
        if part is None:
            part = self._cache.part(self.model.fused(first, last).attentions)
            self._parts[first, last] = part
        return part

    def _gather(
        self, cut: int, spans: tuple[Span, ...], index: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        last = self._last
        if last is not None and last.index == cut and last.spans == spans:
            return last.hidden
        return self._kept_at(cut, spans, index)

    def _kept_at(
        self, cut: int, spans: Sequence[Span], index: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        if index is not None:
            return self._kept[cut][index]
        slot, start, end = spans[0]
        return self._kept[cut, slot, start:end]

    def last_positions(self, cut: int, spans: Sequence[Span]) -> Tensor:
        """[n, h], the residual stream of the last position of each span, at the exit behind a
        segment that ran."""
        last, spans = self._last, tuple(spans)
        if last is not None and last.index == cut and last.spans == spans:
            if len(last.hidden) == len(spans):
                return last.hidden
            if len(spans) == 1:
                return last.hidden[-1:]
            return last.hidden[upload([end - 1 for end in row_ends(spans)], self.model.device)]
        ends = tuple(Span(slot, end - 1, end) for slot, _, end in spans)
        return self._gather(cut, ends, index_of(ends, self.model.device))

    def kept(self, cut: int, spans: Sequence[Span]) -> Tensor:
        """[n, h], the residual stream at the exit behind a segment, of positions that have been
        through it and not on to the next one without a stop; a span for each of them."""
        spans = tuple(spans)
        return self._gather(cut, spans, index_of(spans, self.model.device))

    def _pass(self, cache: KVCache, spans: Sequence[Span], last_only: bool = False) -> Pass:
        heads = self.model.architecture.num_attention_heads
        this = Pass(cache, spans, self.model.rotary, heads, last_only, self._workspace)
        self._workspace = this.workspace
        return this

    def exit_logits(self, index: int, spans: Sequence[Span]) -> Tensor:
        """Logits [n, v] of an exit for the last position of each span, after its segment ran."""
        return self.model.exits[index].head.project(self.last_features(index, spans))

    def last_features(self, index: int, spans: Sequence[Span]) -> Tensor:
        """What an exit projects, [n, h], for the last position of each span."""
        head, cache = self.model.exits[index].head, self._block_caches[index]
        spans = tuple(spans)
        if cache is None:
            return head.features(self.last_positions(index, spans))
        lengths = self._block_lengths[index]
        behind = tuple(Span(slot, lengths[slot], end) for slot, _, end in spans)
        order = sorted(range(len(behind)), key=lambda i: in_pass_order(behind[i]))
        ordered = tuple(behind[i] for i in order)
        this = self.block_pass(index, ordered, True)
        features = head.features(self._gather(index, ordered, this.index), this)
        for slot, _, end in behind:
            lengths[slot] = end
        if order == sorted(order):
            return features
        places = sorted(range(len(order)), key=order.__getitem__)
        return features[upload(places, features.device)]

    def exit_features(self, index: int, span: Span) -> Tensor:
        """What an exit projects, [r, h], for all positions of a span, after its segment ran. Its
        block has to have seen those before it."""
        head, cache = self.model.exits[index].head, self._block_caches[index]
        hidden = self._gather(index, (span,), None)
        if cache is None:
            return head.features(hidden)
        self._block_lengths[index][span.slot] = span.end
        return head.features(hidden, self.block_pass(index, (span,), False))

    def block_pass(self, index: int, spans: Sequence[Span], last_only: bool) -> Pass:
        """A pass over the cache of an exit's block, or of a depth of a multi-token-prediction
        module."""
        if self._piece_size is not None:
            self.commit(spans, range(0), [index])
        cache = self._block_caches[index]
        assert cache is not None
        return self._pass(cache, spans, last_only)

    def final_logits(self, hidden: Tensor) -> Tensor:
        """Logits [n, v] of the final head from the residual stream [n, h] behind the last
        segment."""
        return self.model.final_head.logits(hidden)

    def slot_memory(self, span: Span) -> "SlotMemory":
        """What is kept of some positions of a slot; as far as there is memory for them (`commit`),
        it may be written to."""
        slot, start, end = span
        blocks: list[Tensor | None] = []
        for index, cache in enumerate(self._block_caches):
            # A row has what depends on its last token, which is `depth` positions further on.
            depth = max(index + 1 - len(self.model.exits), 0)
            rows = slice(max(start - depth, 0), max(end - depth, 0))
            blocks.append(None if cache is None else cache.data[0, slot, rows])
        return SlotMemory(
            [
                self._cache.data[one.attentions.start : one.attentions.stop, slot, start:end]
                for one in self.model.segments
            ],
            list(self._kept[: len(self.model.segments), slot, start:end]),
            blocks,
        )

    def commit(self, spans: Sequence[Span], segments: range, blocks: Iterable[int] = ()) -> None:
        """Have memory for the positions up to the ends of some spans.

        Args:
            spans: of any sequences.
            segments: whose keys and values they are, and behind which the residual stream is kept.
            blocks: exits whose blocks' keys and values they are; for depths see `SlotMemory`.

        Raises:
            torch.OutOfMemoryError: there is none left.
        """
        parts = [self._part(segment, segment) for segment in segments]
        blocks = list(blocks)
        parts += [cache for index in blocks if (cache := self._block_caches[index]) is not None]
        # Behind a depth is the cut after the last segment's, and so on.
        cuts = [*segments, *(index + 1 for index in blocks if index >= len(self.model.exits))]
        kept = [range(cut, cut + 1) for cut in cuts if cut < len(self._kept)]
        for slot, _, end in spans:
            for part in parts:
                part.commit(slot, end)
            for rows in kept:
                self._kept_memory.commit(rows, slot, end)

    def extend_block(self, index: int, span: Span) -> None:
        """The block of an exit has seen a span, too, behind those that it has seen before; or a
        depth has the rows whose last tokens are there."""
        lengths = self._block_lengths[index]
        # What one depth gives the next is not stored: the last rows are computed once more.
        again = len(self._blocks) - 1 - index if index >= len(self.model.exits) else 0
        if lengths[span.slot] == max(span.start - again, 0):
            lengths[span.slot] = max(span.end - again, 0)

    def block_lengths(self, slot: int) -> list[int]:
        """For each exit, the positions of a slot that its block has cached; 0 without one. Then for
        each depth of a multi-token-prediction module, the positions whose tokens it has seen."""
        return [lengths[slot] for lengths in self._block_lengths]

    def set_block_length(self, index: int, slot: int, length: int) -> None:
        """What `block_lengths` says from now on: how many positions the block has seen."""
        self._block_lengths[index][slot] = length

    def release(self, slot: int) -> None:
        """Give back the memory of a slot whose sequence has ended."""
        for cache in self._caches:
            cache.release(slot)
        self._kept_memory.release(slot)

    @property
    def _caches(self) -> list[KVCache]:
        return [self._cache, *filter(None, self._block_caches)]

    def truncate(
        self, slot: int, length: int, first_exit: int = 0, ahead: int | None = None
    ) -> None:
        """Forget what the blocks of exits, from `first_exit` on, have cached from position `length`
        on; a new sequence starts at 0.

        Args:
            slot: of the sequence.
            length: number of positions that stay.
            first_exit: index of an exit.
            ahead: the same position of the depths of a multi-token-prediction module, which may
                have seen the tokens of positions that have not been through the model; None is
                `length`.
        """
        for index in range(first_exit, len(self._blocks)):
            end = length if ahead is None or index < len(self.model.exits) else ahead
            lengths = self._block_lengths[index]
            lengths[slot] = min(lengths[slot], end)

    def clear(self, slot: int, length: int | None = None) -> None:
        """Make a slot as good as new, after a sequence that was not finite or broke off in a pass.

        Args:
            length: positions that the sequence has had; None is all that there are.
        """
        self.truncate(slot, 0)
        self._last = None
        for cache in self._caches:
            cache.clear(slot, length)
        self._kept_memory.clear(slot, length)


def _positions(spans: Sequence[Span], index: tuple[Tensor, Tensor] | None) -> slice | Tensor:
    """Those of each row, see `index_of`."""
    return slice(*spans[0][1:]) if index is None else index[1]
