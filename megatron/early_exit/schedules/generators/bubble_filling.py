"""1F1B with partial passes in its warm-up and cool-down bubbles (EE-LLM, arXiv 2312.04916).

With r the time of a backward over that of a forward, K = floor((P - 1) r / (1 + r)) extra
microbatches fit into each of the two bubbles, and the step does not become longer:

- In the warm-up bubble, between a stage's last warm-up forward and its first backward, fill i of
  1..K runs on the first K + 1 - i stages, backwards last in, first out. Only the losses of exits
  on these stages have gradients, so it ends on the last of them that has an exit, and one that
  reaches no exit is left out.
- In the cool-down bubble the last stages go on as if the step had K more microbatches: fill i runs
  forward on all stages, and backward on the last floor(P - i (1 / r + 1)) of them.

Nothing is promised about memory beyond `activation_limit`: the fills of the warm-up come on top of
the activations that the stage holds already, those of the cool-down do not.
"""

from argparse import ArgumentTypeError
from dataclasses import dataclass
from fractions import Fraction

from megatron.early_exit.errors import out_of_range
from megatron.early_exit.ranges import Range
from megatron.early_exit.schedules.actions import Action, Microbatch
from megatron.early_exit.schedules.generators.base import StageByStage
from megatron.early_exit.schedules.generators.one_f_one_b import one_f_one_b

BACKWARD_FORWARD_RATIO = Range(least=0.01, most=100)

AUTO_RATIO = "auto"
"""The ratio that training measures, and planning derives from what the stages cost."""


def parse_ratio(text: str) -> float | str:
    """The value of a flag: a number, or `AUTO_RATIO`.

    Raises:
        ArgumentTypeError: it is neither.
    """
    if text == AUTO_RATIO:
        return text
    try:
        return float(text)
    except ValueError:
        problem = f"{text} is not a number, allowed: {BACKWARD_FORWARD_RATIO}, or {AUTO_RATIO}"
        raise ArgumentTypeError(problem) from None


def max_fills(num_ranks: int, backward_forward_ratio: float) -> int:
    """How many extra microbatches fit into the bubble of the warm-up, or of the cool-down.

    Args:
        num_ranks: pipeline-parallel size.
        backward_forward_ratio: time of a backward over time of a forward, above 0.
    """
    return int((num_ranks - 1) / (1 + 1 / _fraction(backward_forward_ratio)))


def _fraction(ratio: float) -> Fraction:
    # 1 / 3 as a float is a little less than it should be, and would cost a fill at P = 5.
    return Fraction(ratio).limit_denominator(10_000)


FILL_FLAGS = {
    "num_warmup_fills": "--num-fill-warmup-microbatches",
    "num_cooldown_fills": "--num-fill-cooldown-microbatches",
    "backward_forward_ratio": "--backward-forward-ratio",
}
"""The flags of the fields of `FilledOneFOneB`, for refusals."""


@dataclass(frozen=True, kw_only=True)
class FilledOneFOneB(StageByStage):
    """1F1B with filled bubbles.

    Attributes:
        backward_forward_ratio: time of a backward over time of a forward, 0.01 to 100.
        num_warmup_fills: microbatches in the warm-up bubble, None for as many as fit. More, up to
            P - 1, make the step longer.
        num_cooldown_fills: microbatches in the cool-down bubble, likewise.
        exit_stages: the stages that have exits, counted from 0; None for all.

    Raises:
        FieldError: a number is out of its range.
    """

    backward_forward_ratio: float
    num_warmup_fills: int | None = None
    num_cooldown_fills: int | None = None
    exit_stages: frozenset[int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        BACKWARD_FORWARD_RATIO.check(backward_forward_ratio=self.backward_forward_ratio)
        fitting = max_fills(self.num_ranks, self.backward_forward_ratio)
        most = len(self._warmup_depths_from(self.num_ranks - 1))
        self._choose("num_warmup_fills", len(self._warmup_depths_from(fitting)), most)
        self._choose("num_cooldown_fills", fitting, self.num_ranks - 1)

    def _choose(self, name: str, fitting: int, most: int) -> None:
        number = getattr(self, name)
        if number is None:
            object.__setattr__(self, name, fitting)
        elif not 0 <= number <= most:
            where = "" if self.exit_stages is None else f", exits on {sorted(self.exit_stages)}"
            allowed = f"0 to {most} with {self.num_ranks} stages{where}"
            raise out_of_range(name, number, allowed)

    def _warmup_depths_from(self, deepest: int) -> tuple[int, ...]:
        """Depths of fills of which the first runs on so many stages, or fewer."""
        depths = tuple(range(deepest, 0, -1))
        if self.exit_stages is None:
            return depths
        last = [max((s for s in self.exit_stages if s < depth), default=-1) for depth in depths]
        return tuple(stage + 1 for stage in last if stage >= 0)

    @property
    def warmup_depths(self) -> tuple[int, ...]:
        """For each fill of the warm-up bubble, on how many of the first stages it runs."""
        number = self.num_warmup_fills or 0
        deepest = max_fills(self.num_ranks, self.backward_forward_ratio)
        while len(self._warmup_depths_from(deepest)) < number:
            deepest += 1
        # With fewer fills than fit, the deepest ones: they reach the most exits.
        return self._warmup_depths_from(deepest)[:number]

    @property
    def cooldown_depths(self) -> tuple[int, ...]:
        """For each fill of the cool-down bubble, on how many of the last stages it runs back."""
        period = 1 + 1 / _fraction(self.backward_forward_ratio)
        numbers = range(1, (self.num_cooldown_fills or 0) + 1)
        return tuple(max(int(self.num_ranks - i * period), 1) for i in numbers)

    def actions(self, stage: int) -> list[Action]:
        """The computations of one stage in their order."""
        cooldown = [Microbatch(i, "c") for i in range(len(self.cooldown_depths))]
        full = [Microbatch(i) for i in range(self.num_microbatches)]
        forward_only = {
            microbatch
            for microbatch, depth in zip(cooldown, self.cooldown_depths, strict=True)
            if stage < self.num_ranks - depth
        }
        actions = [
            action
            for action in one_f_one_b(stage, self.num_ranks, full + cooldown)
            if action.kind == "F" or action.microbatch not in forward_only
        ]
        depths = enumerate(self.warmup_depths)
        here = [Microbatch(i, "w") for i, depth in depths if stage < depth]
        fills = [Action(stage, "F", microbatch) for microbatch in here]
        fills += [Action(stage, "B", microbatch) for microbatch in reversed(here)]
        first_backward = next(i for i, action in enumerate(actions) if action.kind == "B")
        return actions[:first_backward] + fills + actions[first_backward:]

    def activation_limit(self, rank: int) -> int:
        """Most activations that are alive on a rank at a time."""
        in_flight = min(self.num_ranks - rank, self.num_microbatches + len(self.cooldown_depths))
        return in_flight + sum(rank < depth for depth in self.warmup_depths)
