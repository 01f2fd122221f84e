"""Which sequences run through which segment next. Holds numbers, no tensors.

The unit of work is (sequence, positions, segment). A sequence waits in front of one segment at a
time; those in front of the same segment are run as one batch, and regroup at every exit: the ones
that leave go back to the first segment with their next token, the others gather in front of the
next one (dynamic rebatching, arXiv 2512.15705).
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from megatron.early_exit.inference.passes import Span, in_pass_order


@dataclass(slots=True)
class Progress:
    """How far one sequence has come.

    Attributes:
        key: whose it is.
        slot: where its caches are.
        length: tokens that it has, the prompt's and those generated.
        cached: for each segment, the positions that have been through it, from the first one on.
        front: the segment that it waits for.
        tail: positions at the end that have to be run together, because a head is asked for each.
        since: the step at which it began to wait there.
    """

    key: int
    slot: int
    length: int
    cached: list[int]
    front: int = 0
    since: int = 0
    tail: int = 1

    @property
    def limit(self) -> int:
        """Positions that are ready to go through the segment in front."""
        return self.length if self.front == 0 else self.cached[self.front - 1]

    @property
    def waiting(self) -> int:
        """Positions that have yet to go through the segment in front."""
        return self.limit - self.cached[self.front]

    @property
    def num_pending(self) -> int:
        """Positions that the first segment has seen and the last one has not."""
        return self.cached[0] - self.cached[-1]

    def truncate(self, length: int) -> None:
        """Forget all positions from `length` on."""
        self.cached = [min(cached, length) for cached in self.cached]


@dataclass(frozen=True, slots=True)
class Step:
    """A batch: spans of positions of some sequences, through one segment."""

    segment: int
    sequences: tuple[Progress, ...]
    spans: tuple[Span, ...]


@dataclass(slots=True)
class _Arrival:
    key: int
    length: int


@dataclass
class Scheduler:
    """Admits sequences in the order of their arrival, and picks the next batch.

    Reading the weights takes most of the time of a small batch, so a segment is worth running when
    many sequences wait for it; but those that wait get no tokens meanwhile. So the deepest segment
    runs for which a share of all sequences waits, `quorum`, and else the first one. In simulations
    with the measured times of segments and heads, a quarter was best or within some percent of it
    from 4 to 32 sequences, whether few or most leave. A sequence that has waited for `patience`
    steps goes first whatever its company.

    Attributes:
        num_segments: of the model.
        num_slots: sequences that run at a time.
        max_rows: most positions in a batch; longer prompts and catch-ups are cut, and what is cut
            off leaves room for the others' tokens.
        quorum: share of the running sequences that is company enough for a deeper segment.
        patience: steps that a sequence waits at most while others are preferred.
    """

    num_segments: int
    num_slots: int
    max_rows: int = 256
    quorum: float = 0.25
    patience: int = 16
    running: dict[int, Progress] = field(default_factory=dict)
    _arrivals: deque[_Arrival] = field(default_factory=deque)
    _free: list[int] = field(default_factory=list)
    _step: int = 0

    def __post_init__(self) -> None:
        for name in ("num_slots", "max_rows", "patience"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} {value} is out of range, allowed: 1 or more")
        if not 0 <= self.quorum <= 1:
            raise ValueError(f"quorum {self.quorum} is out of range, allowed: 0 to 1")
        self._free = list(reversed(range(self.num_slots)))

    def add(self, key: int, length: int) -> None:
        """A sequence of `length` tokens has arrived."""
        self._arrivals.append(_Arrival(key, length))

    def remove(self, key: int) -> None:
        """A sequence has ended, or is no longer wanted; what is pending of it is never run."""
        progress = self.running.pop(key, None)
        if progress is None:
            self._arrivals = deque(one for one in self._arrivals if one.key != key)
        else:
            self._free.append(progress.slot)
            # The lowest first keeps the slots in use together.
            self._free.sort(reverse=True)

    def admit(self) -> list[Progress]:
        """Give free slots to those that have waited longest."""
        admitted = []
        while self._free and self._arrivals:
            arrival = self._arrivals.popleft()
            cached = [0] * self.num_segments
            progress = Progress(
                arrival.key, self._free.pop(), arrival.length, cached, 0, self._step
            )
            self.running[arrival.key] = progress
            admitted.append(progress)
        return admitted

    def next(self) -> Step | None:
        """The next batch; None where nothing waits."""
        fronts: list[list[Progress]] = [[] for _ in range(self.num_segments)]
        for progress in self.running.values():
            fronts[progress.front].append(progress)
        chosen = self._choose(fronts)
        if chosen is None:
            return None
        self._step += 1
        return self.batch(chosen, fronts[chosen])

    def _choose(self, fronts: list[list[Progress]]) -> int | None:
        occupied = [index for index, group in enumerate(fronts) if group]
        if len(occupied) < 2:
            return occupied[0] if occupied else None
        waited = {i: self._step - min(one.since for one in fronts[i]) for i in occupied}
        longest = max(occupied, key=lambda i: waited[i])
        if waited[longest] >= self.patience:
            return longest
        enough = self.quorum * len(self.running)
        return next((i for i in reversed(occupied) if len(fronts[i]) >= enough), occupied[0])

    def batch(self, segment: int, group: Iterable[Progress]) -> Step:
        """Spans of the sequences of `group`, all in front of `segment`, as many as there is room
        for: single tokens first, then parts of prompts and catch-ups, the longest-waiting first."""
        singles = [one for one in group if one.waiting == 1]
        longer = sorted((one for one in group if one.waiting > 1), key=lambda one: one.since)
        if len(singles) > self.max_rows:
            singles = sorted(singles, key=lambda one: one.since)[: self.max_rows]
        # Long ones come forward however many single tokens there are.
        room = max(self.max_rows - len(singles), 1)
        batch = [(one, one.limit) for one in singles]
        for one in longer:
            if room <= 0:
                break
            end = one.cached[segment] + _cut(one.waiting, room, one.tail)
            batch.append((one, end))
            room -= end - one.cached[segment]
        spans = [(Span(one.slot, one.cached[segment], end), one) for one, end in batch]
        spans.sort(key=lambda pair: in_pass_order(pair[0]))
        return Step(segment, tuple(one for _, one in spans), tuple(span for span, _ in spans))

    def ran(self, step: Step) -> list[int]:
        """Take note that a batch has been run.

        Returns:
            Indices of its sequences of which nothing waits for this segment any more.
        """
        complete = []
        for index, (progress, span) in enumerate(zip(step.sequences, step.spans, strict=True)):
            progress.cached[step.segment] = span.end
            if span.end == progress.limit:
                complete.append(index)
        return complete

    def go_deeper(self, progress: Progress) -> None:
        """The sequence's last token needs the next segment."""
        progress.front += 1
        progress.since = self._step

    def go_on(self, progress: Progress, length: int, tail: int = 1) -> None:
        """The sequence has `length` tokens now, and starts on the last of them.

        Args:
            tail: positions at the end that heads will be asked for.
        """
        progress.length, progress.tail = length, tail
        progress.front = 0
        progress.since = self._step


def _cut(waiting: int, room: int, tail: int) -> int:
    """How many of the waiting positions to run: the last `tail` of them not apart."""
    count = min(waiting, room)
    if 0 < waiting - count < tail:
        count = waiting - tail
    return count or waiting
