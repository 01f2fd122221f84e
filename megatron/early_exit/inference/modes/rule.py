"""When a position leaves the model at an exit: the only place where confidence meets a threshold.

Everything that decides holds an `ExitRule`: a decoding mode, the task that a pipeline's stages work
on, and the scoring of texts.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from megatron.early_exit.inference.modes.head_output import HeadOutput

DEFAULT_MEASURE = "max_probability"
MEASURES: dict[str, Callable[[HeadOutput], float]] = {
    DEFAULT_MEASURE: lambda output: math.exp(output.best_logprob),
}
"""What an exit's confidence is, by name: numbers of 0 or more that rise with how sure it is."""


@dataclass(frozen=True, slots=True)
class ExitRule:
    """The first exit that is confident enough gives the token, else the final head does.

    Attributes:
        exits: the exits to ask, by their indices in the whole model, ascending.
        threshold: the least confidence to leave with; by default none is enough.
        measure: the name of what confidence is, one of `MEASURES`.
    """

    exits: tuple[int, ...] = ()
    threshold: float = math.inf
    measure: str = DEFAULT_MEASURE

    def measured(self, output: HeadOutput) -> HeadOutput:
        """The output of an exit with the confidence that this rule judges by."""
        if self.measure == DEFAULT_MEASURE:
            return output
        return replace(output, confidence=MEASURES[self.measure](output))

    def takes(self, confidence: float) -> bool:
        """Whether an exit of this confidence gives the token."""
        return confidence >= self.threshold

    @property
    def takes_everything(self) -> bool:
        """Whether the first exit gives every token."""
        return bool(self.exits) and self.takes(0.0)

    def behind(self, exit_index: int) -> "ExitRule":
        """The rule for the exits that come after one that has not given the token."""
        return replace(self, exits=tuple(one for one in self.exits if one > exit_index))

    def message(self) -> dict[str, Any]:
        """The rule as JSON values."""
        return asdict(self)

    @classmethod
    def from_message(cls, message: Mapping[str, Any]) -> "ExitRule":
        """The inverse of `message`."""
        return cls(**{**message, "exits": tuple(message["exits"])})


NO_EXITS = ExitRule()


@dataclass(frozen=True, slots=True)
class DraftRule:
    """When an exit goes on drafting.

    Attributes:
        max_drafts: the most drafts before the final head verifies them.
        least_confidence: how likely a draft and all those in front of it have to be the full
            model's, by the exit's confidences; one that is less likely is not made, and ends the
            drafting. Where this is 0, how many there are at a time follows how many are accepted.
    """

    max_drafts: int
    least_confidence: float

    def takes(self, likelihood: float) -> bool:
        """Whether a draft is made, where it and those in front of it are right so likely."""
        return likelihood >= self.least_confidence

    def next_aim(self, aim: int) -> int:
        """Drafts to make before the next verification, where the last one suggests `aim`."""
        return self.max_drafts if self.least_confidence else min(self.max_drafts, aim)
