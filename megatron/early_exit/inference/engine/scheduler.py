"""Which sequences run through which segment next. Holds numbers, no tensors.

The unit of work is (sequence, positions, segment). A sequence waits in front of one segment at a
time; those in front of the same segment are run as one batch, and regroup at every exit: the ones
that leave go back to the first segment with their next token, the others gather in front of the
next one (dynamic rebatching, arXiv 2512.15705). Where an exit is not worth a question of its own,
the batch runs on, takes along those that wait on its way, and all its heads are asked at its end.
"""

from collections import Counter, deque
from collections.abc import Container, Iterable
from dataclasses import dataclass, field, replace
from itertools import accumulate

from megatron.early_exit.inference.engine.cache_pages import CachePages
from megatron.early_exit.inference.engine.exit_rates import ExitRateEstimator
from megatron.early_exit.inference.engine.fair_queue import FairQueue
from megatron.early_exit.inference.engine.policy import (
    Costs,
    Policy,
    SegmentQueue,
    is_worth_waiting,
)
from megatron.early_exit.inference.model.kv_cache import Span, in_pass_order
from megatron.early_exit.inference.sequence import Sequence
from megatron.early_exit.ranges import ONE_OR_MORE, ZERO_TO_ONE


@dataclass(frozen=True, slots=True)
class ScheduledBatch:
    """A batch: spans of positions of some sequences, through one segment, or through several where
    nobody joins or leaves between them.

    Attributes:
        segment: the first one.
        last: the last one.
        sequences: whose positions they are.
        spans: of each.
    """

    segment: int
    last: int
    sequences: tuple[Sequence, ...]
    spans: tuple[Span, ...]

    def held(self, segment: int) -> list[Span]:
        """The positions before the spans that have yet to get keys and values in a segment, since
        they are held behind an earlier one; until `Scheduler.ran`."""
        pairs = zip(self.sequences, self.spans, strict=True)
        return [
            Span(span.slot, one.cached[segment], span.start)
            for one, span in pairs
            if one.depths and one.cached[segment] < span.start
        ]


@dataclass
class Scheduler:
    """Admits sequences, and picks the next batch.

    Sequences come in groups, those that one client has asked for together. Groups take turns: a
    free slot goes to the one that has the fewest. Who has a slot keeps it to the end, so none gets
    all of them: of four or more slots a group leaves a quarter to those that come later.

    A sequence begins when there is memory for its pages. When they run out, the youngest one has to
    give back its own, and computes them again before any other begins. Who begins with the same
    tokens as a sequence that is computing them waits for those, if they are most of what it has.

    What runs next is what promises the most tokens for its time, see `Policy`. It includes a deeper
    segment when `quorum`, a share of all sequences, waits for that: who waits gets no tokens. In
    simulations with measured times a quarter was best. And it includes the segment for which a
    sequence has waited for `patience` steps, whatever its company.

    Attributes:
        num_segments: of the model.
        num_slots: sequences that run at a time.
        max_rows: most positions in a batch; longer prompts and catch-ups are cut, and what is cut
            off leaves room for the others' tokens.
        quorum: share of the running sequences that does not wait for a deeper segment any longer.
        patience: steps that a sequence waits at most while others are preferred.
        costs: what running takes; None takes all segments for alike, and heads for nothing.
        pages: gives memory to sequences; without a limit by default.
        blocks: exits that have a block.
        running: the sequences that have slots, by key.
        vacated: slots that sequences had to leave since somebody last took note of it.
        exit_rates: how often each exit gives a token.
    """

    num_segments: int
    num_slots: int
    max_rows: int = 256
    quorum: float = 0.25
    patience: int = 16
    costs: Costs | None = None
    pages: CachePages | None = None
    blocks: frozenset[int] = frozenset()
    running: dict[int, Sequence] = field(default_factory=dict)
    vacated: list[int] = field(default_factory=list)
    _arrivals: FairQueue = field(default_factory=FairQueue)
    _waiting: dict[int, Sequence] = field(default_factory=dict)
    _first_in_line: deque[int] = field(default_factory=deque)
    """Those that wait for memory; nobody begins before them."""
    _followers: dict[int, list[int]] = field(default_factory=dict)
    """Those that wait for what another sequence computes."""
    _began: dict[int, int] = field(default_factory=dict)
    """For each group that runs the step at which its last sequence has begun."""
    _free: list[int] = field(default_factory=list)
    _step: int = 0
    _end: int = 0

    def __post_init__(self) -> None:
        ONE_OR_MORE.check(num_slots=self.num_slots, max_rows=self.max_rows, patience=self.patience)
        ZERO_TO_ONE.check(quorum=self.quorum)
        self._free = list(reversed(range(self.num_slots)))
        self._pages = self.pages or CachePages((0,) * self.num_segments, keeps_prefixes=False)
        self._policy = Policy(self.costs or Costs((1.0,) * self.num_segments))
        self.exit_rates = ExitRateEstimator(self.num_segments - 1)

    def add(self, sequence: Sequence) -> None:
        """A sequence has arrived."""
        self._waiting[sequence.key] = sequence
        self._arrivals.add(sequence.key, sequence.group)

    def remove(self, key: int) -> None:
        """A sequence has ended, or is no longer wanted; what is pending of it is never run."""
        if key in self.running:
            self._take_slot_of(key)
            return
        self._arrivals.remove(key)
        if self._waiting.pop(key, None) is not None:
            for line in (self._first_in_line, *self._followers.values()):
                if key in line:
                    line.remove(key)

    def _take_slot_of(self, key: int) -> None:
        sequence = self.running.pop(key)
        if all(one.group != sequence.group for one in self.running.values()):
            self._began.pop(sequence.group, None)
        self._free.append(sequence.slot)
        # The lowest first keeps the slots in use together.
        self._free.sort(reverse=True)
        self._pages.release(key)
        self.stop_following(key)

    def stop_following(self, key: int) -> None:
        """Nobody waits any longer for what a sequence computes: it is stored, or never will be."""
        for follower in self._followers.pop(key, ()):
            self._arrivals.add(follower, self._waiting[follower].group)

    def admit(self) -> list[Sequence]:
        """Give free slots to those whose turn it is.

        Who knows which exits they ask tells `exit_rates` of them, before anything else runs.
        """
        admitted: list[Sequence] = []
        if not (self._free and self._waiting):
            return admitted
        held = Counter(sequence.group for sequence in self.running.values())
        while self._free and (key := self._next_in_line(held)) is not None:
            sequence = self._waiting[key]
            leader = self._leader_of(sequence)
            if leader is not None:
                self._followers.setdefault(leader, []).append(key)
                continue
            # A multi-token-prediction module computes the rows that pages lack when it is asked.
            blocks = self.blocks & sequence.exits
            if not self._pages.admit(sequence, blocks):
                self._first_in_line.appendleft(key)
                break
            del self._waiting[key]
            held[sequence.group] += 1
            sequence.kept |= blocks
            sequence.slot, sequence.since = self._free.pop(), self._step
            sequence.segment = 0
            sequence.num_admissions += 1
            self.running[key] = sequence
            admitted.append(sequence)
        return admitted

    def _next_in_line(self, held: Counter[int]) -> int | None:
        if self._first_in_line:
            return self._first_in_line.popleft()
        return self._arrivals.take(held, self.num_slots - self.num_slots // 4)

    def _leader_of(self, sequence: Sequence) -> int | None:
        """The sequence that computes most of what this one needs, if there is one."""
        if sequence.num_admissions:
            return None
        blocks = self.blocks & sequence.exits
        computing = (
            one for one in self.running.values() if not one.is_stored and blocks <= one.asked
        )
        worth = (
            one.key for one in computing if self._pages.is_worth_waiting(sequence, one, blocks)
        )
        return next(worth, None)

    def next(self) -> ScheduledBatch | None:
        """The next batch; None where nothing waits."""
        while self.running:
            groups: list[list[Sequence]] = [[] for _ in range(self.num_segments)]
            for sequence in self.running.values():
                groups[sequence.segment].append(sequence)
            segments = self._segments(groups)
            self._step += 1
            self._end = segments[-1]
            step = self._through(self.batch(segments[0], groups[segments[0]]))
            if self._reserve(step):
                return step
            self.preempt(next(reversed(self.running)))
        return None

    def _reserve(self, step: ScheduledBatch) -> bool:
        pairs = zip(step.sequences, step.spans, strict=True)
        return self._pages.reserve(
            [(one, step.segment, step.last, span.end) for one, span in pairs]
        )

    def preempt(self, key: int) -> None:
        """Take its pages from a sequence. It keeps its tokens, and what heads have said about the
        last of them, and it is the first to begin again."""
        assert len(self.running) > 1, "one sequence alone has the memory that it needs"
        sequence = self.running[key]
        self._take_slot_of(key)
        self.vacated.append(sequence.slot)
        self._pages.counts.preemptions += 1
        sequence.num_answered = max(sequence.num_answered, sequence.segment)
        self._waiting[key] = sequence
        self._first_in_line.appendleft(key)

    def _segments(self, groups: list[list[Sequence]]) -> range:
        if not any(one.asked for one in self.running.values()):
            # Nobody leaves early.
            return range(next(i for i, group in enumerate(groups) if group), self.num_segments)
        queues = [
            SegmentQueue(
                index,
                self.num_segments,
                [one.rates for one in group],
                # A sequence that asks no exit is like either kind: it never leaves early.
                propagates=[one.propagates or not one.asked for one in group],
                gated=[one.asks_gates or not one.asked for one in group],
            )
            for index, group in enumerate(groups)
        ]
        return self._policy.choose(queues, self._must(groups))

    def _must(self, groups: list[list[Sequence]]) -> int | None:
        """The segment that has to be among those that run next, if there is one."""
        waited = {
            index: self._step - min(one.since for one in group)
            for index, group in enumerate(groups)
            if group
        }
        longest = max(waited, key=lambda index: waited[index])
        if waited[longest] >= self.patience:
            return longest
        enough = max(self.quorum * len(self.running), 1)
        deeper = range(self.num_segments - 1, 0, -1)
        return next((index for index in deeper if len(groups[index]) >= enough), None)

    def onward(
        self, step: ScheduledBatch, complete: Iterable[int], let_out: Container[int] = ()
    ) -> ScheduledBatch | None:
        """The batch that runs before any head that `step` has passed is asked; None where there is
        none.

        Args:
            complete: what `ran` has returned for it.
            let_out: keys of those whose gates there have been asked, and let them leave.
        """
        if step.last >= self._end:
            return None
        behind = step.last + 1
        passed = [step.sequences[index] for index in complete]
        asking = {one.key for one in passed if self._waits_for_exit(one, step.last)}
        group = [one for one in self.running.values() if one.segment == behind]
        group = [one for one in group if one.key not in asking and one.key not in let_out]
        if not group:
            return None
        onward = self._through(self.batch(behind, group))
        return onward if self._reserve(onward) else None

    def _waits_for_exit(self, sequence: Sequence, segment: int) -> bool:
        """Whether a sequence that has passed a segment goes no deeper before the exit is asked."""
        if segment not in sequence.asked:
            return False
        if not sequence.can_defer_exit:
            return True
        is_held = sequence.propagates and not sequence.asks_gates
        return is_held and is_worth_waiting(sequence.exit_rates[segment])

    def _through(self, step: ScheduledBatch) -> ScheduledBatch:
        """The same positions through all segments behind which none of them is asked about, or
        waits for others, as far as this turn goes."""
        last = step.segment
        if last >= self._end or any(one.stops_at(last) for one in step.sequences):
            return step
        pairs = list(zip(step.sequences, step.spans, strict=True))
        if any(span.end != one.limit for one, span in pairs):
            return step
        own = {one.key for one in step.sequences}
        others = {one.segment for one in self.running.values() if one.key not in own}
        while last < self._end and last + 1 not in others:
            if any(one.stops_at(last) or one.start(last + 1) != span.start for one, span in pairs):
                break
            last += 1
        return replace(step, last=last)

    def batch(self, segment: int, group: Iterable[Sequence]) -> ScheduledBatch:
        """Spans of the sequences of `group`, all in front of `segment`, as many as there is room
        for: single tokens with their drafts first, then parts of prompts and catch-ups, see
        `_in_turn`."""
        singles: list[Sequence] = []
        longer: list[Sequence] = []
        for one in group:
            (singles if one.waiting <= one.num_verified else longer).append(one)
        longer = self._in_turn(segment, longer)
        rows = sum(one.waiting for one in singles)
        if rows > self.max_rows:
            singles = _first_rows(sorted(singles, key=lambda one: one.since), self.max_rows)
        # Long ones come forward however many single tokens there are.
        room = max(self.max_rows - rows, 1)
        batch = [(one, one.start(segment) + one.waiting) for one in singles]
        for one in longer:
            if room <= 0:
                break
            start = one.start(segment)
            end = start + _cut(one.waiting, room, one.num_verified)
            batch.append((one, end))
            room -= end - start
        spans = [(Span(one.slot, one.start(segment), end), one) for one, end in batch]
        spans.sort(key=lambda pair: in_pass_order(pair[0]))
        sequences = tuple(one for _, one in spans)
        return ScheduledBatch(segment, segment, sequences, tuple(span for span, _ in spans))

    def _in_turn(self, segment: int, longer: list[Sequence]) -> list[Sequence]:
        """Those that have begun, the longest-waiting first; then the next one of each group, that
        first of which none has begun for longest, then the second of each, and so on."""
        longer.sort(key=lambda one: one.since)
        places: Counter[int] = Counter()
        order: dict[int, tuple[int, int]] = {}
        for one in longer:
            if one.cached[segment] > (0 if segment else one.num_cached):
                order[one.key] = (-1, one.since)
            else:
                order[one.key] = (places[one.group], self._began.get(one.group, one.since))
                places[one.group] += 1
        return sorted(longer, key=lambda one: order[one.key])

    def ran(self, step: ScheduledBatch) -> list[int]:
        """Take note that a batch has been run. Sequences of which nothing waits for its segment any
        more wait for the next one, if there is one; `go_on` calls them back.

        Returns:
            Their indices.
        """
        complete = []
        for index, (sequence, span) in enumerate(zip(step.sequences, step.spans, strict=True)):
            is_complete = span.end == sequence.limit
            sequence.company = len(step.sequences)
            if step.segment == 0 and span.start == sequence.num_cached:
                self._began[sequence.group] = self._step
            for segment in range(step.segment, step.last + 1):
                sequence.passed(segment, span.end)
            if is_complete:
                complete.append(index)
                sequence.segment = min(step.last + 1, self.num_segments - 1)
                sequence.since = self._step
        return complete

    def go_on(self, sequence: Sequence) -> None:
        """The sequence has got tokens or drafts, and starts on the last of them."""
        sequence.segment, sequence.since = 0, self._step
        sequence.num_answered = 0


def _first_rows(sequences: list[Sequence], most: int) -> list[Sequence]:
    """The first ones whose positions are at most so many; one at least."""
    ends = accumulate(one.waiting for one in sequences)
    return [one for one, end in zip(sequences, ends, strict=True) if end <= most] or sequences[:1]


def _cut(waiting: int, room: int, num_verified: int) -> int:
    """How many of the waiting positions to run: the last `num_verified` of them not apart."""
    count = min(waiting, room)
    if 0 < waiting - count < num_verified:
        count = waiting - num_verified
    return count or waiting
