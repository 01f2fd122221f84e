"""Which drafter drafts for a sequence, where the model has several: one of its exits, or the module
that predicts several tokens.

Each has an account (`DraftGain`) of its running acceptance, as DEL (arXiv 2504.05598) and LEDE
(arXiv 2606.03113) keep them, but no head is evaluated for it that does not draft. One that has not
drafted lately promises what it would give if it were right as often as can be hoped: by a constant,
and by what other exits have shown. One that has, promises what it gave. Everything here depends on
the sequence's own tokens and on constants, as in `DraftGain`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from megatron.early_exit.inference.modes import pauses
from megatron.early_exit.inference.modes.draft_gain import HOPE, DraftCosts, DraftGain

TRIAL = 24
"""Tokens after which a drafter is compared with the others, again and again."""
OPTIMISM = 0.9
"""The share of drafts that one may get right which has never drafted, while another one does: worth
a trial if that is faster."""
MARGIN = 1.05
"""How many times as fast the other one has to promise to be."""
OUTLOOK = 150
"""Tokens over which one that is to draft again has to make up for what it has missed."""
MOST_LOST = 1.0
"""Steps of the full model that a drafter may lose before it is compared with the others at once;
and again as soon as it has lost as many more."""


class Drafter(NamedTuple):
    """What drafting with an exit, or with the module, takes, and the most drafts at a time."""

    costs: DraftCosts
    most: int

    def speed(self, rate: float = HOPE, company: int = 1) -> float:
        """Tokens for the time of a step of the full model, at the best number of drafts.

        Args:
            rate: the share of drafts that is accepted.
            company: sequences that run together.
        """
        best, tokens, chance = 0.0, 1.0, 1.0
        for drafts in range(1, self.most + 1):
            chance *= rate
            tokens += chance
            found = tokens / self.costs.of_round(drafts, drafts, company)
            if found <= best:
                break
            best = found
        return best

    def missed(self, num_tokens: int, company: int = 1) -> float:
        """The time of what it does before it drafts again, in steps of the full model.

        Args:
            num_tokens: about which it has not been asked.
            company: sequences that run together.
        """
        # Each draft may be one of another depth of the module, which all lack the tokens.
        return self.most * self.costs.of_missed(num_tokens, company)


class Record(NamedTuple):
    """What a drafter has shown when it last drafted, which was at some token.

    Attributes:
        speed: tokens for the time of a step of the full model, see `DraftGain.usual_speed`.
        rate: the share of questions that gave a draft that was right, see `DraftGain.rate`.
        last: number of the token at which it last drafted.
    """

    speed: float
    rate: float
    last: int


class DraftChoice:
    """Keeps the accounts of a sequence's drafters, and chooses the one that promises most.

    What all of them lose together is bounded as for a single one (`Pauses`), so however many there
    are, none is tried at the cost of more than a small share of the time.

    Args:
        drafters: by how modes number heads, at least one. Of exits a deeper one is thought to be
            the more often right; other heads tell nothing about exits.
        may_pause: there may be tokens without drafts. Else the one goes on that loses least.

    Attributes:
        current: the one that drafts.
        gain: its account.
    """

    def __init__(self, drafters: Mapping[int, Drafter], may_pause: bool = True) -> None:
        self._drafters, self._may_pause = drafters, may_pause
        # There is a little more to lose before it is known which of several is any good.
        self._pauses = pauses.Pauses(pauses.CREDIT * min(len(drafters), 2))
        self._records: dict[int, Record] = {}
        self._waits = dict.fromkeys(drafters, pauses.SHORTEST_PAUSE)
        """Tokens until what one that was left has shown is forgotten."""
        self._tried: set[int] = set()
        self._asked = dict.fromkeys(drafters, 0)
        """Tokens up to which each has been asked; about those of a prompt all are."""
        self._tokens, self._total = 0, 0.0
        self._company = 1
        self._begin(self._best(drafters))

    @property
    def heads(self) -> Iterable[int]:
        """The heads that may draft, as modes number them."""
        return self._drafters.keys()

    @property
    def most(self) -> int:
        """The most drafts that it makes at a time."""
        return self._drafters[self.current].most

    def add(
        self, num_asked: int, confidences: Sequence[float], num_accepted: int, company: int = 1
    ) -> int:
        """Add a verification to the account of the one that has drafted, and choose the next one;
        see `DraftGain.add`.

        Returns:
            Tokens to go on without drafts of any; 0 where they pay, as far as is known, or may not
            pause.
        """
        gain = self.gain.add(num_asked, confidences, num_accepted, company)
        pause = self._pauses.add(gain) if self._may_pause else 0
        self._tokens, self._company = self._tokens + num_accepted + 1, company
        self._total += gain
        if pause:
            return self._give_up(pause)
        # Not behind each verification, since that takes time, too.
        if self._tokens >= self._next_tokens or self.gain.total < self._next_loss:
            self._await(self.gain.total)
            self._compare()
        return 0

    def _compare(self) -> None:
        """Let another one draft, if it promises so much more."""
        others = [head for head in self._drafters if head != self.current]
        if not others:
            return
        self._record()
        for head in others:
            record = self._records.get(head)
            if record is not None and self._tokens - record.last >= self._waits[head]:
                # The text may be another kind of text by now. One that is left time and again is
                # tried less and less often.
                del self._records[head]
                self._waits[head] = min(2 * self._waits[head], pauses.LONGEST_PAUSE)
        best, gain = self._best(others), self.gain
        own, least = gain.usual_speed, 0.0
        if self._may_pause:
            # By chance alone, what it has given may be less than what is hoped of others.
            own = max(own, self._drafters[self.current].speed(gain.rate, self._company))
            least = 1.0
        if self._promise(best) > max(MARGIN * own, least):
            self._begin(best)

    def _give_up(self, pause: int) -> int:
        """What has been drafted has not paid: none drafts for a time, and then one that has not
        been tried; where none of those promises anything, all of them begin anew. But where a trial
        has failed for which earlier gains pay, the better one goes on."""
        self._record()
        if self._total > 0:
            best = max(self._records, key=self._promise)
            if best != self.current and self._promise(best) > MARGIN:
                self._begin(best)
                return 0
        self._tokens += pause
        if max(map(self._promise, self._drafters)) <= 1:
            self._records.clear()
        self._begin(self._best(self._drafters))
        return pause

    def _record(self) -> None:
        self._records[self.current] = Record(self.gain.usual_speed, self.gain.rate, self._tokens)
        self._asked[self.current] = self._tokens

    def _begin(self, head: int) -> None:
        # It counts for what all have gained, but leads to no pause: that would only make it more.
        self._total -= self._missed(head)
        self._records.pop(head, None)
        self._tried.add(head)
        self.current, self.gain = head, DraftGain(self._drafters[head].costs)
        self._await(0.0)

    def _await(self, total: float) -> None:
        """Compare the current one, which has gained `total`, with the others in some time."""
        self._next_tokens, self._next_loss = self._tokens + TRIAL, total - MOST_LOST

    def _best(self, heads: Iterable[int]) -> int:
        return max(heads, key=self._promise)

    def _promise(self, head: int) -> float:
        """Tokens for the time of a step of the full model."""
        record = self._records.get(head)
        if record is None:
            speed = self._drafters[head].speed(self._hope(head), self._company)
        else:
            speed = record.speed
        return OUTLOOK / (OUTLOOK / speed + self._missed(head))

    def _missed(self, head: int) -> float:
        return self._drafters[head].missed(self._tokens - self._asked[head], self._company)

    def _hope(self, head: int) -> float:
        """The share of drafts that one may get right which has not been tried lately.

        A deeper exit is hoped to be wrong so much less often than one that has been tried as there
        is less behind it; a shallower one is not hoped to be right more often.
        """
        hope = HOPE if head in self._tried or not self._tried else OPTIMISM
        if head < 0:
            return hope
        left = self._drafters[head].costs.verify
        for one, record in self._records.items():
            if 0 <= one < head:
                share = left / self._drafters[one].costs.verify
                hope = max(hope, 1 - (1 - record.rate) * share)
            elif one > head:
                hope = min(hope, record.rate)
        return hope
