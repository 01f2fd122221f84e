"""When a position leaves the model at an exit: the only place where confidence meets a threshold.

Everything that decides holds an `ExitRule`: a decoding mode, the task that a pipeline's stages work
on, and the scoring of texts.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from megatron.early_exit.inference.modes.measures import DEFAULT_MEASURE, GATE


@dataclass(frozen=True, slots=True)
class ExitRule:
    """The first exit that is confident enough gives the token, else the final head does.

    Attributes:
        exits: the exits to ask, by their indices in the whole model, ascending.
        thresholds: for each of them the least confidence to leave with; without any, none is
            enough.
        measure: the name of what confidence is, see `MEASURES`.
        decay: how fast thresholds decay with the place of the token, the factor tau of CALM (arXiv
            2207.07061); 0 is off.
        length: the most tokens, N.
        place: of the token among them, from 0.
    """

    exits: tuple[int, ...] = ()
    thresholds: tuple[float, ...] = ()
    measure: str = DEFAULT_MEASURE
    decay: float = 0.0
    length: int = 1
    place: int = 0

    def at(self, place: int) -> "ExitRule":
        """The rule for the token in some place, from 0."""
        return replace(self, place=place) if self.decay else self

    def over(self, length: int) -> "ExitRule":
        """The rule for so many tokens, from the first one on."""
        return replace(self, length=length, place=0)

    def threshold(self, exit_index: int) -> float:
        """The least confidence with which an exit gives the token in this place."""
        if exit_index not in self.exits or not self.thresholds:
            return math.inf
        given = self.thresholds[self.exits.index(exit_index)]
        if not self.decay:
            return given
        decayed = 0.9 * given + 0.1 * math.exp(-self.decay * self.place / self.length)
        return min(max(decayed, 0.0), 1.0)

    def takes(self, exit_index: int, confidence: float) -> bool:
        """Whether an exit of this confidence gives the token."""
        return confidence >= self.threshold(exit_index)

    @property
    def asks_gates(self) -> bool:
        """Whether it is the gates of exits that are asked, before the exits."""
        return self.measure == GATE

    @property
    def takes_everything(self) -> bool:
        """Whether the first exit gives every token, in whatever place."""
        return bool(self.exits) and not self.decay and self.takes(self.exits[0], 0.0)

    def without_exits(self) -> "ExitRule":
        """The rule by which the final head gives every token."""
        return replace(self, exits=(), thresholds=())

    def behind(self, exit_index: int) -> "ExitRule":
        """The rule for the exits that come after one that has not given the token."""
        left = [place for place, one in enumerate(self.exits) if one > exit_index]
        first = left[0] if left else len(self.exits)
        return replace(self, exits=self.exits[first:], thresholds=self.thresholds[first:])

    def message(self) -> dict[str, Any]:
        """The rule as JSON values."""
        return asdict(self)

    @classmethod
    def from_message(cls, message: Mapping[str, Any]) -> "ExitRule":
        """The inverse of `message`."""
        lists = {name: tuple(message[name]) for name in ("exits", "thresholds")}
        return cls(**{**message, **lists})


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
