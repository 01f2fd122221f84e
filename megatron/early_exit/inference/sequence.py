"""One sequence on its way through the segments.

Each segment knows how many positions of the sequence it has cached; the residual stream is kept at
every cut, so a segment can be run whenever its result is needed, over all positions that wait in
front of it, as one batch.
"""

import torch
from torch import Tensor

from megatron.early_exit.inference.kv_cache import KVCache
from megatron.early_exit.inference.layers import Pass
from megatron.early_exit.inference.segments import SegmentedModel


class Sequence:
    """Tokens, caches and kept hidden states of one sequence.

    Args:
        model: what the sequence runs through.
        capacity: the most positions that will ever be run.
    """

    def __init__(self, model: SegmentedModel, capacity: int) -> None:
        self.model = model
        self.tokens: list[int] = []
        self.caches = [self._cache(s.num_attentions, capacity) for s in model.segments]
        self.block_caches = [
            None if exit_.head.block is None else self._cache(1, capacity) for exit_ in model.exits
        ]
        shape = (len(model.exits), capacity, model.architecture.hidden_size)
        self.kept = torch.empty(shape, dtype=model.dtype, device=model.device)
        """The residual stream at the cut behind each segment but the last, by position."""
        self.last = self.kept.new_empty(0)
        """[1, h], the residual stream of the last position behind the segment run last."""

    def _cache(self, num_layers: int, capacity: int) -> KVCache:
        shape = self.model.architecture
        return KVCache(
            num_layers,
            capacity,
            shape.num_query_groups,
            shape.kv_channels,
            self.model.dtype,
            self.model.device,
        )

    @property
    def num_pending(self) -> int:
        """Positions that the first segment has seen and the last one has not."""
        return self.caches[0].length - self.caches[-1].length

    def run_segment(self, index: int) -> Tensor:
        """Run a segment over all positions in front of it.

        Returns:
            The residual stream [s, h] of those positions behind the segment.
        """
        cache = self.caches[index]
        start = cache.length
        end = len(self.tokens) if index == 0 else self.caches[index - 1].length
        assert start < end, "the segment has seen every position in front of it"
        hidden = self._embed(start, end) if index == 0 else self.kept[index - 1, start:end]
        hidden = self.model.segments[index](hidden, self._pass(cache, end))
        if index < len(self.kept):
            self.kept[index, start:end].copy_(hidden)
        self.last = hidden[-1:]
        return hidden

    def exit_logits(self, index: int) -> Tensor:
        """Logits [1, v] of an exit for the last position, after `run_segment(index)`."""
        head, cache = self.model.exits[index].head, self.block_caches[index]
        if cache is None:
            return head.logits(self.last)
        start, end = cache.length, self.caches[index].length
        return head.logits(self.kept[index, start:end], self._pass(cache, end, last_only=True))

    def final_logits(self) -> Tensor:
        """Logits [1, v] of the final head for the last position, after the last segment."""
        return self.model.final_head.logits(self.last)

    def _embed(self, start: int, end: int) -> Tensor:
        tokens = torch.tensor(self.tokens[start:end], device=self.model.device)
        hidden = self.model.word_embeddings[tokens]
        if self.model.position_embeddings is not None:
            hidden += self.model.position_embeddings[start:end]
        return hidden

    def _pass(self, cache: KVCache, end: int, last_only: bool = False) -> Pass:
        start = cache.length
        cos = sin = mask = None
        if self.model.rotary is not None:
            cos = self.model.rotary.cos[start:end]
            sin = self.model.rotary.sin[start:end]
        if 0 < start < end - 1 and not last_only:
            mask = self._mask(start, end)
        return Pass(cache.extend(end), cos, sin, start == 0, mask, last_only)

    def _mask(self, start: int, end: int) -> Tensor:
        """[s * np / ng, t]: which of the positions up to `end` those from `start` on may see."""
        shape = self.model.architecture
        per_group = shape.num_attention_heads // shape.num_query_groups
        seen = torch.ones(end - start, end, dtype=torch.bool, device=self.model.device)
        return seen.tril(start).repeat_interleave(per_group, dim=0)
