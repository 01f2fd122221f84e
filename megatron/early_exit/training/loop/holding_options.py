"""The flags that let layers hand on tokens unchanged: LayerSkip's layer dropout (arXiv 2404.16710),
and the freezing of tokens behind exits."""

from argparse import Namespace
from dataclasses import dataclass
from typing import Literal, get_args

from megatron.early_exit.config import EarlyExitConfig
from megatron.early_exit.errors import FieldError, as_flag
from megatron.early_exit.flags import FlagFields, refuse_beside
from megatron.early_exit.ranges import BELOW_ONE, ZERO_TO_ONE

DropoutSchedule = Literal["constant", "exponential"]

_FEWEST_LAYERS = 2
_WHOLE_LAYERS = "it takes layers apart, and one that hands on tokens is needed whole"
_REFUSED: dict[str, tuple[object, str]] = {
    "tune_exit": (False, "the frozen backbone learns nothing from it"),
    "num_experts": (None, "tokens that a layer hands on would still be routed to its experts"),
    "mtp_num_layers": (None, "layers that predict more tokens are not held"),
    "hybrid_layer_pattern": (None, "only plain transformer layers are held"),
    "cuda_graph_impl": ("none", "other tokens are held in each microbatch"),
    "overlap_moe_expert_parallel_comm": (False, _WHOLE_LAYERS),
    "fine_grained_activation_offloading": (False, "it frees the inputs of layers, which are used"),
}
"""Flags that have no place beside held tokens: the one value that has, and why."""


@dataclass(frozen=True, kw_only=True)
class HoldingOptions(FlagFields):
    """Which tokens layers hand on unchanged while a model is trained.

    Raises:
        ValueError: a field is outside its range, or has no effect; the message names the flag.
    """

    layer_dropout: float = 0.0
    """Probability with which the last layer is skipped by a whole sequence in training; it grows
    exponentially with depth, from 0 at the first layer (LayerSkip, arXiv 2404.16710). Nothing is
    rescaled. A skipped layer is computed all the same, so this saves no time."""

    layer_dropout_schedule: DropoutSchedule = "constant"
    """Whether --layer-dropout holds from the beginning (constant, for a model that is trained on),
    or grows exponentially from 0 to it over all iterations (exponential, for training from
    scratch)."""

    exit_propagate_prob: float = 0.0
    """Probability with which a token is frozen behind an exit in training, any of the exits before
    the last layer with equal chance: layers behind hand on its hidden state unchanged and make its
    keys and values from that. The token's losses are those of the exits up to there; other exits
    and the final head are not asked for it, and no gate learns from it. Losses are means over all
    tokens, asked or not, and the log shows means over those asked."""

    def __post_init__(self) -> None:
        ZERO_TO_ONE.check_flags(self, "layer_dropout")
        BELOW_ONE.check_flags(self, "exit_propagate_prob")
        if self.layer_dropout_schedule not in get_args(DropoutSchedule):
            raise FieldError(
                "--layer-dropout-schedule",
                "is unknown",
                ", ".join(get_args(DropoutSchedule)),
                value=self.layer_dropout_schedule,
            )
        if not self.layer_dropout:
            self.refuse_changed("layer_dropout_schedule", without="--layer-dropout")

    @property
    def is_used(self) -> bool:
        """Whether anything is ever held."""
        return self.layer_dropout > 0 or self.exit_propagate_prob > 0

    def check(self, args: Namespace, exits: EarlyExitConfig) -> None:
        """Refuse what does not go together.

        Raises:
            ValueError: naming the flags and the reason.
        """
        for name in ("layer_dropout", "exit_propagate_prob"):
            if getattr(self, name):
                refuse_beside(as_flag(name), args, _REFUSED)
        if self.layer_dropout and args.num_layers < _FEWEST_LAYERS:
            raise ValueError(
                f"--layer-dropout has no effect with --num-layers {args.num_layers}: the first "
                "layer is never skipped"
            )
        if not self.exit_propagate_prob:
            return
        if not freezing_positions(exits, args.num_layers):
            raise ValueError(
                "--exit-propagate-prob needs an exit before the last layer: give --exit-layer-nums"
            )
        for part in exits.head_parts:
            if part.replaces_mlp:
                raise ValueError(
                    f"{as_flag(part.field)} cannot be combined with --exit-propagate-prob: tokens "
                    "are frozen between layers, and such exits are inside one"
                )


def freezing_positions(exits: EarlyExitConfig, num_layers: int) -> tuple[int, ...]:
    """The positions of the exits behind which tokens can be frozen."""
    return tuple(position for position in exits.positions if position < num_layers)
