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
        segment: the segment that it waits for.
        since: the step at which it began to wait there.
        exits: the exits that it may ask, by their indices.
        is_asking: it asks them at present.
        asks_gates: the gates of these exits are asked before the exits.
        compared: exits at which the residual stream has to be kept, since confidence at the next
            one depends on it.
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
    segment: int = 0
    since: int = 0
    exits: frozenset[int] = frozenset()
    is_asking: bool = True
    asks_gates: bool = False
    compared: frozenset[int] = frozenset()
    can_defer_exit: bool = True
    exit_rates: list[float] = field(default_factory=list)
    company: int = 1
    num_answers: int = 0
    num_answered: int = 0
    num_admissions: int = 0
    num_cached: int = 0
    is_stored: bool = False

    @property
    def length(self) -> int:
        """Tokens of the prompt, generated ones, and drafts."""
        return len(self.prompt) + len(self.generated) + len(self.drafts)

    @property
    def asked(self) -> frozenset[int]:
        """The exits that it asks about its last token."""
        return self.exits if self.is_asking else frozenset()

    @property
    def rates(self) -> list[float]:
        """`exit_rates`, of the exits that it asks about its last token."""
        return self.exit_rates if self.is_asking else [0.0] * (len(self.exit_rates) - 1) + [1.0]

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
    def waiting(self) -> int:
        """Positions that have yet to go through the segment that it waits for."""
        return self.limit - self.cached[self.segment]

    @property
    def num_pending(self) -> int:
        """Positions that the first segment has seen and the last one has not."""
        return self.cached[0] - self.cached[-1]

    def stops_at(self, segment: int) -> bool:
        """Whether something is to be had behind a segment before the next one runs."""
        return segment in self.asked or segment in self.compared

    def token_ids(self, start: int, end: int) -> list[int]:
        """The token ids at the positions from `start` to `end`."""
        first = len(self.prompt)
        if start >= first:
            behind = self.generated
            if end > first + len(behind):
                behind = [*behind, *self.drafts]
            return behind[start - first : end - first]
        return [*self.prompt, *self.generated, *self.drafts][start:end]

    def truncate(self, length: int) -> None:
        """Forget that positions from `length` on have been through any segment."""
        self.cached = [min(cached, length) for cached in self.cached]
