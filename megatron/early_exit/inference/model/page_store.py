"""Pages of keys and values that are kept when their sequences have left their slots."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor

from megatron.early_exit.inference.model.kv_cache import Span
from megatron.early_exit.inference.model.runner import SegmentRunner


@dataclass(slots=True)
class _Content:
    """What is kept of a page.

    Attributes:
        segments: of each that has seen it [attentions, positions, 2 ng, hn].
        kept: by exit, the residual stream there [positions, h], where positions may wait behind it.
        blocks: by exit, of those whose blocks have seen it [positions, 2 ng, hn].
    """

    segments: list[Tensor] = field(default_factory=list)
    kept: dict[int, Tensor] = field(default_factory=dict)
    blocks: dict[int, Tensor] = field(default_factory=dict)


class PageStore:
    """Copies pages out of the slots of a runner, and into them.

    Args:
        runner: whose slots they are.
        page_size: positions of a page.
        keeps_for_blocks: the residual stream is kept for the blocks of exits that have not seen a
            page yet.
    """

    def __init__(
        self, runner: SegmentRunner, page_size: int, keeps_for_blocks: bool = False
    ) -> None:
        self._runner, self._page_size = runner, page_size
        self._keeps_for_blocks = keeps_for_blocks
        self._pages: dict[int, _Content] = {}

    def __len__(self) -> int:
        return len(self._pages)

    def block_lengths(self, slot: int) -> list[int]:
        """What `SegmentRunner.block_lengths` says, as far as pages may hold it: of a
        multi-token-prediction module where all of its depths have come. A depth that came back
        alone would leave the next one without what it goes on from."""
        lengths = self._runner.block_lengths(slot)
        first = len(self._runner.model.exits)
        depths = lengths[first:]
        return lengths[:first] + [min(depths)] * len(depths) if depths else lengths

    def save(
        self, number: int, slot: int, index: int, depth: int, blocks: Iterable[int] = ()
    ) -> None:
        """Keep a page of a slot, or more of it than has been kept so far.

        Args:
            number: names the page.
            slot: where it is.
            index: of the page in the slot.
            depth: segments that have seen it.
            blocks: exits whose blocks have seen it.
        """
        content = self._pages.setdefault(number, _Content())
        memory = self._runner.slot_memory(self._span(slot, index))
        if depth > len(content.segments):
            missing = range(len(content.segments), depth)
            content.segments.extend(memory.segments[segment].clone() for segment in missing)
            content.kept = {
                exit_index: kept.clone()
                for exit_index, kept in enumerate(memory.kept)
                if exit_index == depth - 1
                or (self._keeps_for_blocks and memory.blocks[exit_index] is not None)
            }
        for exit_index in blocks:
            block = memory.blocks[exit_index]
            if block is not None and exit_index not in content.blocks:
                content.blocks[exit_index] = block.clone()

    def load(self, number: int, slot: int, index: int) -> None:
        """Put a page into a slot."""
        content = self._pages[number]
        span = self._span(slot, index)
        self._runner.commit([span], range(len(content.segments)), content.blocks)
        memory = self._runner.slot_memory(span)
        for target, source in zip(memory.segments, content.segments, strict=False):
            target.copy_(source)
        for exit_index, kept in content.kept.items():
            memory.kept[exit_index].copy_(kept)
        for exit_index, source in content.blocks.items():
            block = memory.blocks[exit_index]
            assert block is not None
            block.copy_(source)
            self._runner.extend_block(exit_index, span)

    def drop(self, numbers: Iterable[int]) -> None:
        """Give up pages; nothing happens for those that are not kept."""
        for number in numbers:
            self._pages.pop(number, None)

    def _span(self, slot: int, index: int) -> Span:
        return Span(slot, index * self._page_size, (index + 1) * self._page_size)
