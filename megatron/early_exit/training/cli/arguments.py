"""The early-exit flags: declared once by `EarlyExitConfig`, offered as Megatron flags."""

import typing
from argparse import ArgumentParser
from typing import Any

from megatron.training.argument_utils import ArgumentGroupFactory

from megatron.early_exit.config import EarlyExitConfig
from megatron.early_exit.training.loop.filling_options import FillingOptions
from megatron.early_exit.training.loop.holding_options import HoldingOptions
from megatron.early_exit.training.loss.curriculum import CurriculumOptions
from megatron.early_exit.training.tuning.options import TuningOptions


class _GroupFactory(ArgumentGroupFactory):
    """Megatron's factory of argument groups, for fields that are tuples of numbers too."""

    def _extract_type(self, config_type: type) -> dict[str, Any]:
        if typing.get_origin(config_type) is tuple:
            return {"type": typing.get_args(config_type)[0], "nargs": "+"}
        extracted: dict[str, Any] = super()._extract_type(config_type)
        return extracted


def add_early_exit_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Add the flags of `EarlyExitConfig` and of the exit loss as a help group of their own."""
    group = _GroupFactory(EarlyExitConfig).build_group(parser, title="early exit (model)")
    group.description = (
        "Exits of the model. (Megatron's own --exit-interval, --exit-duration-in-mins and "
        "--exit-signal-handler are about ending the process.)"
    )
    tuning = _GroupFactory(TuningOptions).build_group(parser, title="early exit (tuning)")
    tuning.description = "EE-Tuning: exits for a model that there is already."
    filling = _GroupFactory(FillingOptions).build_group(parser, title="early exit (bubbles)")
    filling.description = "Extra microbatches in the idle time of pipeline stages."
    holding = _GroupFactory(HoldingOptions).build_group(parser, title="early exit (held tokens)")
    holding.description = "Tokens that layers hand on unchanged in training."
    curriculum = _GroupFactory(CurriculumOptions).build_group(
        parser, title="early exit (curriculum)"
    )
    curriculum.description = "When the losses of exits count, and how much."
    loss = parser.add_argument_group(title="early exit (loss)")
    loss.add_argument(
        "--exit-loss-chunk-tokens",
        type=int,
        default=None,
        metavar="TOKENS",
        help="Tokens whose exit logits exist at a time (default: as many as fit in "
        "512 MiB, on a CPU in 16 MiB).",
    )
    return parser
