"""What is drawn for one position of one sequence, and what has come of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from megatron.early_exit.inference.modes.sampling import Sampler


@dataclass(frozen=True, slots=True)
class Draft:
    """A drafted token that the final head verifies.

    Attributes:
        token: it.
        probabilities: [v], from which it was drawn; None where it was not drawn but has been the
            most probable one of what the request allows.
    """

    token: int
    probabilities: Tensor | None = field(compare=False)


@dataclass(frozen=True, slots=True)
class Draw:
    """The token that a head has to give at one position.

    It is computed before it is known whether the mode takes it. So the random numbers for it are
    looked at, and taken only with the token: `number` tells whether they still are the next ones.

    Attributes:
        sampler: of the request.
        generated: the tokens that the sequence has got.
        behind: drafts behind those and in front of this position.
        number: how many random numbers the request has taken before those for this draw.
        draft: what is verified at this position; without one a token is drawn from what the head
            says. With one the draft is kept with the probability target / draft, and else replaced
            by a draw from what the target has more than the draft (speculative sampling, arXiv
            2211.17192): the first number decides about the draft, the second draws.
        keeps: the probabilities are wanted, too: the token becomes a draft.
    """

    sampler: Sampler
    generated: Sequence[int] = field(compare=False)
    behind: tuple[int, ...]
    number: int
    draft: Draft | None = None
    keeps: bool = False

    @property
    def position(self) -> int:
        """The number of tokens in front of it that are not of the prompt."""
        return len(self.generated) + len(self.behind)


@dataclass(frozen=True, slots=True)
class Drawn:
    """A token that has been drawn.

    Attributes:
        draw: what was asked for.
        token: the token; v where there is none that the request allows.
        logit: what the head says of it, before the request's parameters change anything, if that
            has come from the device together with the token.
        probabilities: [v], what it was drawn from, if they were wanted; None also at temperature 0,
            where it is the most probable token of those that the request allows.
    """

    draw: Draw
    token: int
    logit: float | None
    probabilities: Tensor | None

    @property
    def count(self) -> int:
        """The random numbers that it takes."""
        return 1 if self.draw.draft is None or self.token == self.draw.draft.token else 2
