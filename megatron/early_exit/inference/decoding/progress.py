"""How far one sequence has come on its way through the segments. Holds numbers, no tensors."""

from dataclasses import dataclass, field


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
        chances: for each segment, how likely the head behind it gives the next token; 0 where that
            head is not asked.
        answers: how many exits have given, or not given, a token.
        exits: those that it may ask.
        group: those that one client has asked for together.
        runs_on: whether it may go through further segments before a head that it asks is asked.
    """

    key: int
    slot: int
    length: int
    cached: list[int]
    front: int = 0
    since: int = 0
    tail: int = 1
    chances: list[float] = field(default_factory=list)
    exits: frozenset[int] = frozenset()
    runs_on: bool = True
    answers: int = 0
    group: int = 0

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
