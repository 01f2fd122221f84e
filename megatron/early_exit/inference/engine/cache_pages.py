"""How much of the caches' memory each sequence takes, in pages. Holds numbers, no tensors.

A page is a few consecutive positions of one sequence in one segment of the model. A sequence takes
pages of a segment as its positions come there: one that always leaves at an exit never takes any of
the segments behind. Pages of past sequences are kept as long as nobody needs their memory, for new
ones that begin with the same tokens.
"""

import math
from collections import abc
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate

from megatron.early_exit.inference.engine.prefix_tree import PrefixTree, StoredPage
from megatron.early_exit.inference.sequence import Sequence

PAGE_SIZE = 16
"""Positions of a page."""


@dataclass(frozen=True, slots=True)
class PageCopy:
    """What the store has to take from the slot of a sequence.

    Attributes:
        page: where it goes.
        index: of the page in the sequence.
        depth: segments whose keys and values it is to have.
        blocks: exits of whose blocks it is to have them.
    """

    page: StoredPage
    index: int
    depth: int
    blocks: frozenset[int]


@dataclass(slots=True)
class CacheCounts:
    """How the caches have been used since the engine began.

    Attributes:
        prompt_tokens: positions of prompts of admitted sequences.
        cached_tokens: those of them that were not computed, since pages of them were stored.
        preemptions: sequences that had to give back their pages and compute them again later.
        evictions: stored pages that had to go.
        taken: for each segment, pages that sequences have taken in all.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    evictions: int = 0
    taken: list[int] = field(default_factory=list)


class CachePages:
    """Gives pages to sequences within a budget of memory, and keeps those of past ones.

    Args:
        page_bytes: what a page takes in each segment.
        budget: bytes for all; None is no limit.
        page_size: positions of a page.
        keeps_prefixes: pages of past sequences are kept.
        reserved: bytes that slots have from the beginning; the budget is then for pages of past
            sequences alone.
        slot_page_bytes: what a page of a running sequence takes in each segment, where that is more
            than one that is stored takes.
        pages_at_once: running sequences take so many pages at a time.

    Attributes:
        counts: how the caches have been used.
        dropped: numbers of stored pages that went since somebody last took note of it.
    """

    def __init__(
        self,
        page_bytes: abc.Sequence[int],
        budget: int | None = None,
        page_size: int = PAGE_SIZE,
        keeps_prefixes: bool = True,
        reserved: int = 0,
        slot_page_bytes: abc.Sequence[int] | None = None,
        pages_at_once: int = 1,
    ) -> None:
        self.page_size, self.budget = page_size, budget
        self.keeps_prefixes, self._reserved = keeps_prefixes, reserved
        self._pages_at_once = pages_at_once
        self._page_bytes = tuple(page_bytes if slot_page_bytes is None else slot_page_bytes)
        """Bytes of a page of a running sequence, for each segment."""
        self._to_depth = tuple(accumulate(page_bytes, initial=0))
        """Bytes of a stored page that the first segments have seen, by how many those are."""
        self._tree = PrefixTree(page_size)
        self._held: dict[int, list[int]] = {}
        self._prefixes: dict[int, list[StoredPage]] = {}
        self._bytes_held = self._bytes_stored = 0
        self.counts = CacheCounts(taken=[0] * len(self._page_bytes))
        self.dropped: list[int] = []

    @property
    def bytes_held(self) -> int:
        """What running sequences take."""
        return self._bytes_held

    @property
    def bytes_stored(self) -> int:
        """What pages of past sequences take."""
        return self._bytes_stored

    @property
    def usage(self) -> float:
        """Share of the memory for running sequences that they take; 0 without a limit."""
        limit = self._reserved or self.budget
        return self._bytes_held / limit if limit else 0.0

    @property
    def num_stored(self) -> int:
        """Pages of past sequences."""
        return len(self._tree)

    def admit(self, sequence: Sequence, blocks: Iterable[int] = ()) -> bool:
        """Let a sequence begin, if there is memory for it: it has the stored pages with which it
        begins, which `take_prefix` gives.

        One that may leave at exits needs memory in front of the first of them only; if more turns
        out to be too much, it has to wait the next time until there is enough for all segments.

        Args:
            sequence: has no pages.
            blocks: exits with a block that it asks.
        """
        depth = len(self._page_bytes)
        if sequence.exits and not sequence.num_admissions:
            depth = min(min(sequence.exits) + 1, depth)
        needed = self._pages(sequence.length)
        if not self._fits(sum(self._page_bytes[:depth]) * needed):
            # Who waits for memory is looked at in every step, so nothing is searched for it.
            return False
        # The final head is asked about the last positions, so they are computed in any case.
        most = min(sequence.length - sequence.num_verified, sequence.num_exact)
        known = sequence.token_ids(0, most)
        prefix = self._tree.match(known, frozenset(blocks)) if self.keeps_prefixes else []
        if not self._has_room(self._bytes_at_first(prefix, needed, depth)):
            return False
        prefix = [page for page in prefix if page.is_stored]
        counts = self._counts(prefix)
        self._prefixes[sequence.key] = prefix
        self._held[sequence.key] = [0] * len(counts)
        for segment, pages in enumerate(self._taken_at_first(counts, needed, depth)):
            self._take(sequence.key, segment, pages)
        sequence.begin([self.page_size * pages for pages in counts])
        if not sequence.num_admissions:
            sequence.num_cached = sequence.cached[0]
            self.counts.prompt_tokens += len(sequence.prompt)
            self.counts.cached_tokens += sequence.num_cached
        return True

    def take_prefix(self, key: int) -> list[StoredPage]:
        """The stored pages with which an admitted sequence begins, once."""
        return self._prefixes.pop(key, [])

    def is_worth_waiting(
        self, sequence: Sequence, other: Sequence, blocks: Iterable[int] = ()
    ) -> bool:
        """Whether another sequence computes most of what this one would have to; for `blocks` see
        `admit`, the other one has to ask them, too."""
        if not self.keeps_prefixes:
            return False
        known = sequence.prompt[:-1]
        common = min(common_length(known, other.prompt), other.num_exact) // self.page_size
        has = len(self._tree.match(known, frozenset(blocks))) if common else 0
        gain = self.page_size * (common - has)
        return gain > (len(sequence.prompt) - self.page_size * has) / 2

    def reserve(self, needs: Iterable[tuple[Sequence, int, int, int]]) -> bool:
        """Take the pages for what runs next, or none of them where there is no memory for all.

        Args:
            needs: sequences, the first and the last segment through which they go, and the end of
                their positions.
        """
        wanted = [
            (sequence.key, segment, pages)
            for sequence, first, last, end in needs
            if (pages := self._pages(end)) > self._held[sequence.key][last]
            for segment in range(first, last + 1)
            if pages > self._held[sequence.key][segment]
        ]
        if not wanted:
            return True
        size = sum(
            (pages - self._held[key][segment]) * self._page_bytes[segment]
            for key, segment, pages in wanted
        )
        if not self._has_room(size):
            return False
        for key, segment, pages in wanted:
            self._take(key, segment, pages - self._held[key][segment])
        return True

    def release(self, key: int) -> None:
        """Take back the pages of a sequence, if it has any."""
        self._prefixes.pop(key, None)
        for segment, pages in enumerate(self._held.pop(key, ())):
            self._bytes_held -= pages * self._page_bytes[segment]

    def store(self, sequence: Sequence, block_lengths: abc.Sequence[int]) -> list[PageCopy]:
        """Keep the pages of a sequence, as far as there is memory for them.

        Args:
            sequence: runs, and all it has is finite.
            block_lengths: for each exit, the positions that its block has seen; 0 without one.

        Returns:
            What has to be copied before anything else runs.
        """
        sequence.is_stored = True
        if not self.keeps_prefixes:
            return []
        # The last token has no place yet; where it has, that of a draft that was refused.
        num_known = min(sequence.cached[0], sequence.num_exact)
        known = [*sequence.prompt, *sequence.generated][:-1][:num_known]
        stored = self._tree.match(known)
        free = math.inf
        if self.budget is not None:
            own = sum(self._to_depth[page.depth] for page in stored)
            free = self.budget - self._bytes_counted - own
        copies: list[tuple[int, int, frozenset[int]]] = []
        size = num_pages = 0
        for index in range(len(known) // self.page_size):
            end = (index + 1) * self.page_size
            depth = sum(cached >= end for cached in sequence.cached)
            blocks = frozenset(i for i, length in enumerate(block_lengths) if length >= end)
            before = stored[index] if index < len(stored) else None
            if before is not None:
                depth, blocks = max(depth, before.depth), blocks | before.blocks
            more = self._to_depth[depth] - (self._to_depth[before.depth] if before else 0)
            if size + more > free:
                break
            size, num_pages = size + more, index + 1
            if before is None or (depth, blocks) != (before.depth, before.blocks):
                copies.append((index, depth, blocks))
        self._make_room(size)
        self._bytes_stored += size
        pages = self._tree.add(known[: num_pages * self.page_size])
        for index, depth, blocks in copies:
            pages[index].depth, pages[index].blocks = depth, blocks
        return [PageCopy(pages[index], index, depth, blocks) for index, depth, blocks in copies]

    def clear(self) -> None:
        """Give up all stored pages."""
        while (page := self._tree.oldest()) is not None:
            self._give_up(page)

    def take_dropped(self) -> list[int]:
        """The numbers of the stored pages that went since the last call."""
        dropped, self.dropped = self.dropped, []
        return dropped

    def _pages(self, num_positions: int) -> int:
        """What a running sequence takes."""
        at_once = self._pages_at_once
        return -(-num_positions // (self.page_size * at_once)) * at_once

    def _counts(self, prefix: abc.Sequence[StoredPage]) -> list[int]:
        """For each segment, the pages that have seen it."""
        return [sum(page.depth > i for page in prefix) for i in range(len(self._page_bytes))]

    def _taken_at_first(self, counts: abc.Sequence[int], needed: int, depth: int) -> list[int]:
        """For each segment, what a sequence takes that needs some pages down to a depth, and behind
        it those that it has already."""
        return [
            needed if segment < depth else self._pages(count * self.page_size)
            for segment, count in enumerate(counts)
        ]

    def _bytes_at_first(self, prefix: abc.Sequence[StoredPage], needed: int, depth: int) -> int:
        taken = self._taken_at_first(self._counts(prefix), needed, depth)
        return sum(size * pages for size, pages in zip(self._page_bytes, taken, strict=True))

    def _take(self, key: int, segment: int, pages: int) -> None:
        self._held[key][segment] += pages
        self._bytes_held += pages * self._page_bytes[segment]
        self.counts.taken[segment] += pages

    @property
    def _bytes_counted(self) -> int:
        return 0 if self._reserved else self._bytes_held

    def _has_room(self, size: int) -> bool:
        """Whether running sequences can have so many bytes more, after what is stored had to go for
        them."""
        if not self._fits(size):
            return False
        if not self._reserved:
            self._make_room(size)
        return True

    def _fits(self, size: int) -> bool:
        """Whether there would be so many bytes if nothing were stored."""
        if self._reserved or self.budget is None:
            return True
        return self._bytes_held + size <= self.budget

    def _make_room(self, size: int) -> None:
        """Give up stored pages until so many bytes are free."""
        if self.budget is None:
            return
        while self._bytes_counted + self._bytes_stored + size > self.budget:
            page = self._tree.oldest()
            assert page is not None
            self._give_up(page)

    def _give_up(self, page: StoredPage) -> None:
        self._tree.remove(page)
        self._bytes_stored -= self._to_depth[page.depth]
        self.counts.evictions += 1
        self.dropped.append(page.number)


def common_length(one: abc.Sequence[int], other: abc.Sequence[int]) -> int:
    """How many tokens two texts have in common from their beginnings on."""
    least, most = 0, min(len(one), len(other))
    while least < most:
        middle = (least + most + 1) // 2
        if one[least:middle] == other[least:middle]:
            least = middle
        else:
            most = middle - 1
    return least
