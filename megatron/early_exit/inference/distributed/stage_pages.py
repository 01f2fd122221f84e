"""The pages of all stages of a pipeline: the first stage gives them out, the others follow."""

from collections import abc
from collections.abc import Callable, Iterable

from megatron.early_exit.inference.distributed.control import Message
from megatron.early_exit.inference.engine.cache_pages import CachePages
from megatron.early_exit.inference.engine.scheduler import Scheduler
from megatron.early_exit.inference.sequence import Sequence


class StagePages:
    """Tells the stages which pages to store, and which to give up.

    Args:
        pages: counts them, see `CacheBudget.pages_of_stages`.
        scheduler: knows who runs.
        tell: has every stage follow a `pages_message`, behind all tasks that it has got so far.
    """

    def __init__(
        self, pages: CachePages, scheduler: Scheduler, tell: Callable[[Message], None]
    ) -> None:
        self._pages, self._scheduler, self._tell = pages, scheduler, tell
        self._loads: dict[int, tuple[int, ...]] = {}

    def begin(self, key: int) -> None:
        """A sequence has been admitted."""
        self._loads[key] = tuple(page.number for page in self._pages.take_prefix(key))

    def take_load(self, key: int) -> tuple[int, ...]:
        """The numbers of the pages with which a sequence begins, for its first task."""
        return self._loads.pop(key, ())

    def reserve(
        self, chosen: abc.Sequence[Sequence], ends: abc.Sequence[int], ready: Iterable[Sequence]
    ) -> set[int]:
        """Take the pages for what runs next. Where there are not enough, the youngest sequence
        whose last token is not on its way has to give back its own, until there are.

        Args:
            chosen: run next.
            ends: of their positions; of one that drafts, of all that it may draft.
            ready: others that do not wait for any stage.

        Returns:
            The keys of those that had to give back their pages.
        """
        # Behind its last token on their way, a sequence has the pages for all drafts already.
        waiting = (*chosen, *ready)
        fresh = {one.key for one in waiting if one.cached[0] < one.num_final}
        preempted: set[int] = set()
        while not self._pages.reserve(
            (one, 0, 0, end)
            for one, end in zip(chosen, ends, strict=True)
            if one.key not in preempted
        ):
            youngest = next(key for key in reversed(self._scheduler.running) if key in fresh)
            self._scheduler.preempt(youngest)
            self.leave(youngest, self._scheduler.vacated.pop())
            preempted.add(youngest)
        return preempted

    def store(self, sequence: Sequence) -> None:
        """Store the pages of a sequence whose tokens so far are final."""
        copies = self._pages.store(sequence, ())
        save = [(one.page.number, sequence.slot, one.index) for one in copies]
        if save:
            self._tell(pages_message(save=save))

    def leave(self, key: int, slot: int) -> None:
        """A sequence has left its slot."""
        self._loads.pop(key, None)
        self._tell(pages_message(release=[slot]))

    def give_up(self) -> None:
        """Give up the pages that had to go, once no task has yet to load any."""
        if self._pages.dropped and not self._loads:
            self._tell(pages_message(drop=self._pages.take_dropped()))


def pages_message(
    save: Iterable[tuple[int, int, int]] = (),
    drop: Iterable[int] = (),
    release: Iterable[int] = (),
) -> Message:
    """What the stages do about pages.

    Args:
        save: the number of each page to store, the slot where it is, and its index there.
        drop: numbers of stored pages to give up.
        release: slots whose memory nobody needs any more.
    """
    return {"kind": "pages", "save": list(save), "drop": list(drop), "release": list(release)}
