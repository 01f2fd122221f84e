"""Which drafter drafts for a sequence, where the model has several: the exit, or the module that
predicts several tokens.

Each has an account (`DraftGain`) that begins when it first drafts. One that has not been tried yet
promises what it would give if a fixed share of its drafts were accepted; one that has, what it gave
last. Everything here depends on the sequence's own tokens and on constants, as in `DraftGain`.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

from megatron.early_exit.inference.modes import pauses
from megatron.early_exit.inference.modes.draft_gain import DraftCosts, DraftGain

HOPE = 0.75
"""The share of drafts that one is expected to get right before it has drafted."""
TRIAL = 24
"""Tokens after which a drafter may be compared with another one."""
MARGIN = 1.05
"""How many times as fast the other one has to promise to be."""


class Drafter(NamedTuple):
    """What drafting with an exit, or with the module, takes, and the most drafts at a time."""

    costs: DraftCosts
    most: int

    @property
    def hope(self) -> float:
        """Tokens for the time of a step of the full model where a share of HOPE is accepted, at the
        best number of drafts."""
        tokens = list(accumulate(HOPE**place for place in range(self.most + 1)))
        question = self.costs.of_question()
        return max(
            tokens[drafts] / (drafts * question + self.costs.of_verification(drafts))
            for drafts in range(1, self.most + 1)
        )


class DraftChoice:
    """Keeps the accounts of a sequence's drafters, and chooses the one that promises most.

    Args:
        drafters: by how modes number heads, at least one.

    Attributes:
        current: the one that drafts.
    """

    def __init__(self, drafters: Mapping[int, Drafter]) -> None:
        self._drafters = drafters
        self._gains = {head: DraftGain(one.costs) for head, one in drafters.items()}
        self._promises = {head: one.hope for head, one in drafters.items()}
        self.current = self._best()
        self._tokens = self._since = 0
        self._left: dict[int, int] = {}
        """When those that do not draft have drafted last, in tokens."""
        self._waits = dict.fromkeys(drafters, pauses.SHORTEST_PAUSE)
        """Tokens until one that has been left is tried again."""

    @property
    def gain(self) -> DraftGain:
        """The account of the one that drafts."""
        return self._gains[self.current]

    @property
    def most(self) -> int:
        """The most drafts that it makes at a time."""
        return self._drafters[self.current].most

    def add(
        self, num_asked: int, confidences: Sequence[float], num_accepted: int, company: int = 1
    ) -> int:
        """Add a verification to the account of the one that has drafted, and choose the next one.

        Returns:
            Tokens to go on without drafts of any; see `DraftGain.add`.
        """
        pause = self.gain.add(num_asked, confidences, num_accepted, company)
        if len(self._drafters) == 1:
            return pause
        self._tokens += num_accepted + 1
        for head, left in self._left.items():
            if self._tokens - left >= self._waits[head]:
                # The text may be another kind of text by now.
                self._promises[head] = self._drafters[head].hope
        if pause:
            return self._give_up(pause)
        if self._tokens - self._since >= TRIAL:
            self._promises[self.current] = self.gain.speed
            best = self._best()
            if self._promises[best] > MARGIN * self.gain.speed:
                self._switch(best)
        return 0

    def _give_up(self, pause: int) -> int:
        """What the current one has drafted has not paid: another one drafts, or none for a time."""
        self._promises[self.current] = 0.0
        best = self._best()
        if self._promises[best] > 1:
            self._switch(best)
            return 0
        # Behind the pause all of them begin anew.
        self._promises = {head: one.hope for head, one in self._drafters.items()}
        self._left.clear()
        self.current, self._since = self._best(), self._tokens
        return pause

    def _switch(self, head: int) -> None:
        if head in self._left:
            del self._left[head]
        self._left[self.current] = self._tokens
        # One that is left time and again is tried less and less often.
        self._waits[self.current] = min(2 * self._waits[self.current], pauses.LONGEST_PAUSE)
        self.current, self._since = head, self._tokens

    def _best(self) -> int:
        return max(self._promises, key=lambda head: self._promises[head])
