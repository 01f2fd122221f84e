"""Which exits learn in an iteration, and LayerSkip's weights of their losses (arXiv 2404.16710)."""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from megatron.early_exit.config import EarlyExitConfig
from megatron.early_exit.errors import FieldError
from megatron.early_exit.flags import FlagFields, refuse_beside
from megatron.early_exit.ranges import ABOVE_ZERO, Range

Curriculum = Literal["none", "rotational", "gradual"]

_TUNING = {"tune_exit": (False, "exits of a frozen model learn without each other")}


@dataclass(frozen=True, kw_only=True)
class CurriculumOptions(FlagFields):
    """When the losses of exits count, and how much.

    Raises:
        ValueError: a field is outside its range, or has no effect; the message names the flag.
    """

    exit_curriculum: Curriculum = "none"
    """Which exits learn in an iteration (LayerSkip, arXiv 2404.16710): all of them (none); every
    R-th, other ones in the next iteration (rotational); or only the last ones, one more at a time
    until half of the iterations are done (gradual). The others are not computed, and neither are
    their gates. The final head always learns."""

    exit_curriculum_period: int | None = None
    """R of the rotational curriculum, in iterations (default: the number of exits, at least 2)."""

    exit_loss_scale: float | None = None
    """Weight the losses as LayerSkip does, in place of --exit-layer-weight: after l + 1 of L layers
    by this scale times 0 + 1 + ... + l, the final one by L - 1 plus this scale times 0 + 1 + ... +
    (L - 2), all divided by the sum over the heads that learn in the iteration."""

    def __post_init__(self) -> None:
        if self.exit_curriculum not in get_args(Curriculum):
            raise FieldError(
                "--exit-curriculum",
                "is unknown",
                ", ".join(get_args(Curriculum)),
                value=self.exit_curriculum,
            )
        Range(least=2, is_integer=True).check_flags(self, "exit_curriculum_period")
        ABOVE_ZERO.check_flags(self, "exit_loss_scale")
        if self.exit_curriculum != "rotational":
            self.refuse_changed("exit_curriculum_period", without="--exit-curriculum rotational")

    @property
    def is_used(self) -> bool:
        """Whether weights differ from those of `EarlyExitConfig`."""
        return self.exit_curriculum != "none" or self.exit_loss_scale is not None

    def check(self, args: Namespace, exits: EarlyExitConfig) -> None:
        """Refuse what does not go together.

        Raises:
            ValueError: naming the flags and the reason.
        """
        if self.exit_curriculum != "none":
            refuse_beside(f"--exit-curriculum {self.exit_curriculum}", args, _TUNING)
        if self.exit_loss_scale is not None:
            refuse_beside("--exit-loss-scale", args, _TUNING)
        if not exits.positions:
            names = ("exit_curriculum", "exit_curriculum_period", "exit_loss_scale")
            self.refuse_changed(*names, without="--exit-layer-nums")
        if self.exit_loss_scale is None:
            return
        if exits.exit_layer_weight_warmup_iters or any(w != 1.0 for w in exits.exit_layer_weight):
            raise ValueError(
                "--exit-loss-scale cannot be combined with --exit-layer-weight and its warm-up, "
                "whose place it takes"
            )
        if exits.positions[-1] == args.num_layers:
            raise ValueError(
                "--exit-loss-scale cannot be combined with an exit after the last layer "
                f"({args.num_layers}), where the final head is"
            )


@dataclass(frozen=True, kw_only=True)
class LossCurriculum:
    """The weights of all heads in each iteration.

    Attributes:
        options: the curriculum and the scale.
        positions: of all exits, ascending.
        num_layers: of the model.
        iterations: tells how many iterations the run has.
    """

    options: CurriculumOptions
    positions: tuple[int, ...]
    num_layers: int
    iterations: Callable[[], int]

    def active(self, iteration: int) -> frozenset[int]:
        """The exits that learn after so many completed iterations."""
        exits = len(self.positions)
        if self.options.exit_curriculum == "rotational":
            period = self.options.exit_curriculum_period or max(exits, 2)
            return frozenset(self.positions[iteration % period :: period])
        if self.options.exit_curriculum == "gradual":
            # One more every T / 2L iterations, where L counts the final head, too.
            number = 2 * (exits + 1) * iteration // self.iterations()
            return frozenset(self.positions[max(exits - number, 0) :])
        return frozenset(self.positions)

    def weights(self, plain: dict[int, float], iteration: int) -> tuple[dict[int, float], float]:
        """The weight of each exit's loss by position, 0 for those that do not learn, and that of
        the final one.

        Args:
            plain: the weights without curriculum and scale.
            iteration: completed iterations.
        """
        active = self.active(iteration)
        scale = self.options.exit_loss_scale
        if scale is None:
            return {p: w if p in active else 0.0 for p, w in plain.items()}, 1.0
        final = self.num_layers - 1 + scale * _sum_to(self.num_layers - 2)
        chosen = {p: scale * _sum_to(p - 1) if p in active else 0.0 for p in plain}
        total = final + sum(chosen.values())
        return {p: weight / total for p, weight in chosen.items()}, final / total


def _sum_to(last: int) -> int:
    """0 + 1 + ... + last."""
    return last * (last + 1) // 2
