"""The tokens of one request, and how far they have been through the model. Holds no tensors."""

from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class Sequence:
    """The one place for what changes while a request is under way.

    Attributes:
        key: names the request in the engine.
        prompt: its token ids.
        generated: the token ids that it has got.
        drafts: token ids behind those, which may yet be taken back.
        group: those of a group take turns with other groups, however many they are.
        slot: where its keys and values are.
        cached: for each segment, the positions that have been through it, from the first one on.
        propagates: a position whose token an exit gave is held behind that exit: deeper segments
            see it with the hidden state that it had there, and do not compute it.
        depths: where it propagates, for each position that has given a token, from the last one of
            the prompt on, the segment whose head gave it.
        segment: the segment that it waits for.
        since: the step at which it began to wait there.
        exits: the exits that it may ask, by their indices.
        is_asking: it asks them at present.
        asks_only: then it asks only this one of them; None is all.
        asks_gates: the gates of these exits are asked before the exits.
        kept: exits at which the residual stream is kept whether they are asked or not, since
            confidence at the next one depends on it, or the exit's own block has to see it later.
        num_depths: depths of the multi-token-prediction module that may draft for it.
        can_defer_exit: it may go through further segments before an exit on the way is asked.
        exit_rates: for each segment, how likely the head behind it gives the next token; 0 where
            that head is not asked.
        company: sequences in the batch that it has been in last, itself included.
        num_answers: how many exits have given, or not given, a token.
        num_answered: segments, from the first one on, whose heads are not asked about the last
            token any more: they were, before the sequence had to give back its pages.
        num_admissions: how often it has got a slot.
        num_cached: tokens of the prompt that were not computed: past requests began with them, too.
        is_stored: pages of its prompt are there for others.
    """

    key: int
    prompt: list[int]
    generated: list[int] = field(default_factory=list)
    drafts: list[int] = field(default_factory=list)
    group: int = 0
    slot: int = -1
    cached: list[int] = field(default_factory=list)
    propagates: bool = False
    depths: list[int] = field(default_factory=list)
    segment: int = 0
    since: int = 0
    exits: frozenset[int] = frozenset()
    is_asking: bool = True
    asks_only: int | None = None
    asks_gates: bool = False
    kept: frozenset[int] = frozenset()
    num_depths: int = 0
    can_defer_exit: bool = True
    exit_rates: list[float] = field(default_factory=list)
    company: int = 1
    num_answers: int = 0
    num_answered: int = 0
    num_admissions: int = 0
    num_cached: int = 0
    is_stored: bool = False
    _starts: list[int] = field(default_factory=list)
    """For each segment, the first position behind `cached` that is not held; of use where there are
    `depths`."""

    @property
    def length(self) -> int:
        """Tokens of the prompt, generated ones, and drafts."""
        return len(self.prompt) + len(self.generated) + len(self.drafts)

    @property
    def num_final(self) -> int:
        """Tokens of the prompt and generated ones, which nothing takes back."""
        return len(self.prompt) + len(self.generated)

    @property
    def asked(self) -> frozenset[int]:
        """The exits that it asks about its last token."""
        if not self.is_asking:
            return frozenset()
        return self.exits if self.asks_only is None else frozenset((self.asks_only,))

    @property
    def rates(self) -> list[float]:
        """`exit_rates`, of the exits that it asks about its last token: how likely each of them
        gives the next one."""
        if self.is_asking and self.asks_only is None:
            return self.exit_rates
        asked, (*exits, last) = self.asked, self.exit_rates
        return [*(rate if index in asked else 0.0 for index, rate in enumerate(exits)), last]

    @property
    def num_verified(self) -> int:
        """Positions at the end that the final head is asked about in one pass, which therefore run
        together: the last token's, and each draft's."""
        return len(self.drafts) + 1

    @property
    def limit(self) -> int:
        """Positions that are ready to go through the segment that it waits for."""
        return self.length if self.segment == 0 else self.cached[self.segment - 1]

    @property
    def num_exact(self) -> int:
        """Positions, from the first one on, that no exit changes."""
        return len(self.prompt) - 1 if self.propagates else self.length

    def start(self, segment: int) -> int:
        """The first position that a segment computes next: those between the cached ones and this
        one are held."""
        return self._starts[segment] if self.depths else self.cached[segment]

    @property
    def waiting(self) -> int:
        """Consecutive positions that have yet to be computed by the segment that it waits for."""
        start = self.start(self.segment)
        return self._end_of_run(start) - start

    @property
    def num_pending(self) -> int:
        """Positions that the first segment has seen and the last one has not."""
        return self.cached[0] - self.cached[-1]

    def stops_at(self, segment: int) -> bool:
        """Whether something is to be had behind a segment before the next one runs."""
        return segment in self.asked or segment in self.kept

    def token_ids(self, start: int, end: int) -> list[int]:
        """The token ids at the positions from `start` to `end`."""
        first = len(self.prompt)
        if start >= first:
            behind = self.generated
            if end > first + len(behind):
                behind = [*behind, *self.drafts]
            return behind[start - first : end - first]
        return [*self.prompt, *self.generated, *self.drafts][start:end]

    def begin(self, cached: list[int]) -> None:
        """The sequence has a slot, in which there are some positions already, see `cached`."""
        self.cached = cached
        self._starts = [self._behind_held(*pair) for pair in enumerate(cached)]

    def passed(self, segment: int, end: int) -> None:
        """The positions up to `end` have been through a segment."""
        self.cached[segment] = end
        if self.depths:
            self._starts[segment] = self._behind_held(segment, end)

    def leave(self, segment: int) -> None:
        """The head behind a segment has given the token of the last position, which propagates."""
        last = self.length - 1
        if not self.depths:
            self._starts = list(self.cached)
        self.depths.append(segment)
        for deeper in range(segment + 1, len(self.cached)):
            # It may have been there before the head was asked.
            self.cached[deeper] = min(self.cached[deeper], last)
            if self._starts[deeper] == last:
                self._starts[deeper] = last + 1

    def held(self, start: int, end: int) -> list[tuple[int, int]]:
        """The positions from `start` to `end` that are known to be held behind some segment, each
        with that segment; it may be the last one."""
        first = len(self.prompt) - 1
        known = range(max(start, first), min(end, first + len(self.depths)))
        return [(position, self.depths[position - first]) for position in known]

    def truncate(self, length: int) -> None:
        """Forget that positions from `length` on have been through any segment."""
        self.cached = [min(cached, length) for cached in self.cached]
        self._starts = [min(start, length) for start in self._starts]

    def _is_held(self, segment: int, position: int) -> bool:
        place = position - len(self.prompt) + 1
        return 0 <= place < len(self.depths) and self.depths[place] < segment

    def _behind_held(self, segment: int, start: int) -> int:
        while self._is_held(segment, start):
            start += 1
        return start

    def _end_of_run(self, start: int) -> int:
        """Where the positions from `start` on that its segment computes one after another end."""
        limit = self.limit
        if not self.depths:
            return limit
        end = min(max(start, len(self.prompt) - 1), limit)
        while end < limit and not self._is_held(self.segment, end):
            end += 1
        return end
