"""Whether drafting pays: what a sequence's own drafts have gained, against what they have cost.

An exit that drafts at every chance makes decoding slower where its drafts are refused. So the time
of drafting is counted in steps of the full model, each of which gives one token, and drafting
pauses when it has lost a few of them. Everything here depends on the sequence's own tokens and on
constants, but for the number of sequences in its batches, which may count only where no text
depends on it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron.early_exit.inference.modes.pauses import Pauses

_MEMORY = 20.0
"""Steps of the full model over which speed and acceptance are averaged, about."""
_PRIOR = 6.0
"""Steps or drafts for which the assumptions of the beginning count."""


@dataclass(frozen=True, slots=True)
class DraftCosts:
    """What drafting takes, in weights that are read.

    Attributes:
        ask: those in front of the exit that drafts, and its head.
        verify: those behind it, and the final head.
        full: those of a step of the full model.
        rows: as many rows take as long to compute as the weights do to read.
        step: what each step takes besides.
    """

    ask: float
    verify: float
    full: float
    rows: float
    step: float = 0.0

    def of_question(self, company: int = 1) -> float:
        """The time of asking the exit once, in steps of the full model.

        Args:
            company: sequences that run together.
        """
        return self._steps(self.ask, 1, company)

    def of_verification(self, num_drafts: int, company: int = 1) -> float:
        """The time of verifying drafts, in steps of the full model."""
        return self._steps(self.verify, num_drafts + 1, company)

    def _steps(self, weights: float, rows: int, company: int) -> float:
        """The time of reading weights, for one of `company` sequences that each have some rows, in
        steps of the full model."""
        step, reading = self.step / company, 1 / company
        whole = step + self.full * (reading + 1 / self.rows)
        return (step + weights * (reading + rows / self.rows)) / whole


class DraftGain:
    """Keeps the account of one sequence's drafts.

    Args:
        costs: of its exit.
    """

    def __init__(self, costs: DraftCosts) -> None:
        self._costs = costs
        self._pauses = Pauses()
        self._tokens = self._steps = self._accepted = self._expected = _PRIOR

    @property
    def speed(self) -> float:
        """Tokens for the time of one step of the full model, lately."""
        return self._tokens / self._steps

    @property
    def trust(self) -> float:
        """How often drafts were right, over how often they should have been by the exit's
        confidences. A draft behind one that was wrong does not count."""
        return self._accepted / self._expected

    def least_likelihood(self, company: int = 1) -> float:
        """How likely a draft and all in front of it have to be right: then the draft promises as
        many tokens for its time as decoding gives on the whole.

        Args:
            company: sequences that run together.
        """
        costs = self._costs
        row = costs.of_verification(1, company) - costs.of_verification(0, company)
        return max(self.speed, 1.0) * (costs.of_question(company) + row)

    def add(
        self, num_asked: int, confidences: Sequence[float], num_accepted: int, company: int = 1
    ) -> int:
        """Add a verification, with all that was asked for it.

        Args:
            num_asked: how often the exit was asked.
            confidences: of the drafts that it made.
            num_accepted: those that the final head accepted, which itself gave one more token.
            company: sequences that ran together.

        Returns:
            Tokens to go on without drafts; 0 where they pay, as far as is known.
        """
        tokens = num_accepted + 1
        steps = num_asked * self._costs.of_question(company)
        steps += self._costs.of_verification(len(confidences), company)
        keep = max(1 - steps / _MEMORY, 0.0)
        self._tokens = keep * self._tokens + tokens
        self._steps = keep * self._steps + steps
        self._accepted = keep * self._accepted + num_accepted
        self._expected = keep * self._expected + sum(confidences[:tokens])
        pause = self._pauses.add(tokens - steps)
        if pause:
            # Behind the pause the text may be another kind of text.
            self._tokens = self._steps = self._accepted = self._expected = _PRIOR
        return pause
