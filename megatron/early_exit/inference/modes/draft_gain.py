"""Whether drafting pays: what a sequence's own drafts have gained, against what they have cost.

An exit that drafts at every chance makes decoding slower where its drafts are refused. So the time
of drafting is counted in steps of the full model, each of which gives one token. Everything here
depends on the sequence's own tokens and on constants, but for the number of sequences in its
batches, which may count only where no text depends on it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

HOPE = 0.75
"""The share of drafts that one is expected to get right before it has drafted."""
_MEMORY = 20.0
"""Steps of the full model over which speed and acceptance are averaged, about."""
_LONG_MEMORY = 80.0
"""Those for comparisons with other drafters, where chance must not decide."""
_PRIOR = 6.0
"""Steps or drafts for which the assumptions of the beginning count."""


class Waits(NamedTuple):
    """Times that were measured, beside those of reading weights, as weights that could be read in
    them: of messages between the stages of a pipeline, and of what else asking the module takes.

    Attributes:
        ask: of asking the drafter once.
        order: besides, where it is asked at all before a verification.
        verify: of a verification.
        full: of a step of the full model.
    """

    ask: float = 0.0
    order: float = 0.0
    verify: float = 0.0
    full: float = 0.0


NO_WAITS = Waits()


class Readings(NamedTuple):
    """How long reading weights takes for several rows together, over that for a single row; what
    each row takes besides does not count.

    Attributes:
        two: for two rows.
        several: for more rows.
    """

    two: float = 1.0
    several: float = 1.0

    def of(self, num_rows: int) -> float:
        """How long it takes for some rows."""
        return 1.0 if num_rows == 1 else self.two if num_rows == 2 else self.several


SAME_READINGS = Readings()


@dataclass(frozen=True, slots=True)
class DraftCosts:
    """What drafting takes, in weights that are read.

    Attributes:
        ask: those in front of the exit that drafts, and its head.
        verify: those behind it, and the final head.
        full: those of a step of the full model.
        rows: as many rows take as long to compute as the weights do to read.
        step: what each step takes besides.
        front: those of `ask` through which each position goes that is verified, asked or not.
        waits: what else takes time, as was measured.
        readings: how long weights take to read, for several rows.
        missed: for each token about which the drafter has not been asked, weights through which the
            token's row goes before the drafter is asked again. The rows are computed together.
    """

    ask: float
    verify: float
    full: float
    rows: float
    step: float = 0.0
    front: float = 0.0
    waits: Waits = NO_WAITS
    readings: Readings = SAME_READINGS
    missed: float = 0.0

    def of_question(self, company: int = 1) -> float:
        """The time of asking the exit once, in steps of the full model.

        Args:
            company: sequences that run together.
        """
        return self._steps(self.ask, 1, company, self.waits.ask)

    def of_verification(self, num_drafts: int, company: int = 1) -> float:
        """The time of verifying drafts, in steps of the full model."""
        return self._steps(self.verify, num_drafts + 1, company, self.waits.verify)

    def of_round(self, num_asked: int, num_drafts: int, company: int = 1) -> float:
        """The time of a verification of drafts and of all that was asked for it, in steps of the
        full model."""
        time = num_asked * self.of_question(company) + self.of_verification(num_drafts, company)
        # Behind the last draft that there may be, the exit is not asked.
        unasked = max(num_drafts + 1 - num_asked, 0) * self._time(self.front, 1, company)
        order = self.waits.order / company if num_asked else 0.0
        return time + (unasked + order) / self._full_step(company)

    def of_missed(self, num_tokens: int, company: int = 1) -> float:
        """The time of what is made up for once the drafter is asked again, in steps of the full
        model.

        Args:
            num_tokens: about which it has not been asked.
            company: sequences that run together.
        """
        return num_tokens * self.missed / self.rows / self._full_step(company)

    def _steps(self, weights: float, rows: int, company: int, wait: float) -> float:
        """The time of reading weights, for one of `company` sequences that each have some rows, and
        of messages that they share, in steps of the full model."""
        time = (self.step + wait) / company + self._time(weights, rows, company)
        return time / self._full_step(company)

    def _full_step(self, company: int) -> float:
        """The time of a step of the full model, for one of `company` sequences."""
        return (self.step + self.waits.full) / company + self._time(self.full, 1, company)

    def _time(self, weights: float, rows: int, company: int) -> float:
        """The time of reading weights, for one of `company` sequences that each have some rows."""
        reading = self.readings.of(rows * company) / company
        return weights * (reading + rows / self.rows)


class DraftGain:
    """Keeps the account of one sequence's drafts by one drafter.

    Args:
        costs: of the drafter.

    Attributes:
        total: tokens that it has given, less the steps of the full model that they have taken.
    """

    def __init__(self, costs: DraftCosts) -> None:
        self._costs = costs
        self.total = 0.0
        self._tokens = self._steps = self._accepted = self._expected = _PRIOR
        self._long_tokens = self._long_steps = _PRIOR
        self._asked, self._right = _PRIOR, HOPE * _PRIOR

    @property
    def speed(self) -> float:
        """Tokens for the time of one step of the full model, lately."""
        return self._tokens / self._steps

    @property
    def usual_speed(self) -> float:
        """Tokens for the time of one step of the full model, over a longer time."""
        return self._long_tokens / self._long_steps

    @property
    def trust(self) -> float:
        """The ratio of how often drafts were right to how often they should have been by the
        drafter's confidences. A draft behind one that was wrong does not count."""
        return self._accepted / self._expected

    @property
    def rate(self) -> float:
        """The share of questions that gave a draft that was right, over that time; what came behind
        the first that did not, does not count."""
        return self._right / self._asked

    def least_likelihood(self, company: int = 1, num_drafts: int = 0) -> float:
        """How likely a draft and all in front of it have to be right: then the draft promises as
        many tokens for its time as decoding gives on the whole.

        Args:
            company: sequences that run together.
            num_drafts: those in front of it.
        """
        costs = self._costs
        before = costs.of_verification(num_drafts, company)
        row = costs.of_verification(num_drafts + 1, company) - before
        return max(self.speed, 1.0) * (costs.of_question(company) + row)

    def add(
        self, num_asked: int, confidences: Sequence[float], num_accepted: int, company: int = 1
    ) -> float:
        """Add a verification, with all that was asked for it.

        Args:
            num_asked: how often the drafter was asked, also in vain.
            confidences: of the drafts that it made.
            num_accepted: those that the final head accepted, which itself gave one more token.
            company: sequences that ran together.

        Returns:
            What it has gained, in steps of the full model; less than 0 is a loss.
        """
        tokens = num_accepted + 1
        steps = self._costs.of_round(num_asked, len(confidences), company)
        keep = max(1 - steps / _MEMORY, 0.0)
        self._tokens = keep * self._tokens + tokens
        self._steps = keep * self._steps + steps
        self._accepted = keep * self._accepted + num_accepted
        self._expected = keep * self._expected + sum(confidences[:tokens])
        keep = max(1 - steps / _LONG_MEMORY, 0.0)
        self._long_tokens = keep * self._long_tokens + tokens
        self._long_steps = keep * self._long_steps + steps
        self._asked = keep * self._asked + min(num_asked, tokens)
        self._right = keep * self._right + num_accepted
        self.total += tokens - steps
        return tokens - steps
