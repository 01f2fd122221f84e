"""What a rank of a pipeline does: one action of its list, and the microbatch it is done for.

A stage is a chunk of the model. Stage s lies on rank s modulo the number of ranks, so that an
interleaved schedule has more stages than ranks; each rank's list names the stage in every action.
"""

import re
from dataclasses import dataclass
from typing import Literal, get_args

Role = Literal["", "w", "c"]
"""What a microbatch is for: "" is a full one, w and c fill the warm-up and the cool-down bubble."""

Computation = Literal["F", "B", "I", "W", "L"]
"""F forward; B backward, which zero-bubble schedules (arXiv 2401.10241) split into I (gradient of
the input) and W (gradient of the weights); L backward of the stage's own exits, without a gradient
from the next stage or for the previous one."""

Communication = Literal["SF", "RF", "SB", "RB"]
"""S send, R receive; F a hidden state to or from the neighbour, B a gradient."""

Kind = Computation | Communication

COMPUTATIONS: tuple[Kind, ...] = get_args(Computation)
COMMUNICATIONS: tuple[Kind, ...] = get_args(Communication)
_PATTERN = re.compile(r"(\d+)([SR][FB]|[FBIWL])([wc]?)(\d+)")


@dataclass(frozen=True, order=True, slots=True)
class Microbatch:
    """One microbatch of a step.

    Attributes:
        index: counted from 0 among those of the same role.
        role: full, or a fill, whose passes do not run on every stage.
    """

    index: int
    role: Role = ""

    def __str__(self) -> str:
        return f"{self.role}{self.index}"


@dataclass(frozen=True, slots=True)
class Action:
    """One action; prints and parses as stage, kind, microbatch: `2F0`, `0Bw1`, `1SF5`."""

    stage: int
    kind: Kind
    microbatch: Microbatch

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"

    @classmethod
    def parse(cls, text: str) -> "Action":
        """Read what `str` writes.

        Raises:
            ValueError: the text is not an action.
        """
        match = _PATTERN.fullmatch(text)
        if match is None:
            raise ValueError(
                f"{text!r} is not an action, allowed: stage, then one of "
                f"{' '.join(COMPUTATIONS + COMMUNICATIONS)}, then a microbatch such as 3, w0 or c1"
            )
        stage, kind, role, index = match.groups()
        # The pattern admits nothing that the literal types do not.
        return cls(int(stage), kind, Microbatch(int(index), role))  # type: ignore[arg-type]

    @property
    def is_communication(self) -> bool:
        """Whether it sends or receives."""
        return self.kind in COMMUNICATIONS
