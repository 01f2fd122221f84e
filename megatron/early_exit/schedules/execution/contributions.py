"""How many microbatches contribute to the losses of each stage, and what keeps their sum unbiased.

A step estimates the mean gradient of every loss with respect to every parameter. With filled
bubbles, a loss on stage t reaches a parameter on stage s <= t from all full microbatches, from the
warm-up's fills that run on t, and from the cool-down's fills whose backward still runs on s. So two
things are done. A loss on stage t is divided by the number of microbatches that contribute on t
itself. And the gradient that a full microbatch or a fill of the cool-down sends from stage s + 1 to
stage s is multiplied by the ratio of the numbers of those on the two stages, which makes up for the
fills whose backward ends in between. The weights of all microbatches then add up to one for each
pair of a loss and a parameter, whatever the number of exits and fills. A gate on stage t learns
what the final head says, which no fill of the warm-up reaches: the loss of its gate is divided by
the number of the others that contribute on t.
"""

from dataclasses import dataclass
from fractions import Fraction

from megatron.early_exit.schedules.actions import Role
from megatron.early_exit.schedules.schedule import Schedule


@dataclass(frozen=True)
class Contributions:
    """Microbatches that run backward on each stage, by their role.

    Attributes:
        full: on every stage.
        warmup: fills of the warm-up bubble, by stage.
        cooldown: fills of the cool-down bubble, by stage.
    """

    full: int
    warmup: tuple[int, ...]
    cooldown: tuple[int, ...]

    @classmethod
    def of(cls, schedule: Schedule) -> "Contributions":
        """Count those of a schedule with one stage on each rank."""

        def count(role: Role) -> tuple[int, ...]:
            return tuple(
                sum(a.kind in ("B", "L") and a.microbatch.role == role for a in rank)
                for rank in schedule.ranks
            )

        return cls(max(count("")), count("w"), count("c"))

    def to_losses(self, stage: int) -> int:
        """Microbatches that contribute to the losses of a stage; their sum is divided by it."""
        return self.full + self.warmup[stage] + self.cooldown[stage]

    def to_gates(self, stage: int) -> int:
        """Those of them that have passed the final head, from which gates learn: fills of the
        warm-up end before it."""
        return self.full + self.cooldown[stage]

    def gradient_factor(self, stage: int) -> Fraction:
        """What the gradient from the next stage is multiplied by, where it comes from its end."""
        if stage + 1 == len(self.cooldown):
            return Fraction(1)
        return Fraction(self.full + self.cooldown[stage + 1], self.full + self.cooldown[stage])
