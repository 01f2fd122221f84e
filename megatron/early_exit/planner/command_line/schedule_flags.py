"""The flags of one schedule, on stages without a model."""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from typing import get_args

from megatron.early_exit.errors import as_flag
from megatron.early_exit.flags import refuse_given
from megatron.early_exit.planner.command_line.request_flags import NUMBERS_OF_FILLS, given_ratio
from megatron.early_exit.planner.single_schedule import ScheduleName, SingleSchedule

_OWN = ("num_microbatches", "exit_stages", "stage_ratios", "exit_stage_ratio")
"""Flags that only a schedule has."""
_USED = (
    *("schedule", *_OWN, "pipeline_model_parallel_size", "num_virtual_stages_per_pipeline_rank"),
    *("backward_forward_ratio", *NUMBERS_OF_FILLS),
    *("json", "timeline", "schedule_csv"),
)
"""All flags that act beside --schedule."""

# What the figures of the papers assume.
_RATIO_OF_FIGURES = 2.0


def add_schedule_flags(parser: ArgumentParser) -> None:
    """Add the flags that only a single schedule has; those of ranks, chunks and fills it shares."""
    group = parser.add_argument_group("one schedule", "on stages without a model")
    add = group.add_argument
    add("--schedule", choices=get_args(ScheduleName), help="time and draw it, instead of planning")
    add("--num-microbatches", type=int, help="microbatches of the step")
    add(
        "--exit-stages", type=int, nargs="+", default=[], help="stages with an exit, counted from 0"
    )
    ratios = "time of each stage over that of others (default: 1 for all, which are alike)"
    add("--stage-ratios", type=float, nargs="+", default=[], metavar="RATIO", help=ratios)
    ratio = "time of an exit, or the final head, over that of a stage (default: %(default)s)"
    add("--exit-stage-ratio", type=float, default=0.5, help=ratio)


def refuse_schedule_flags(args: Namespace, default_of: Callable[[str], object]) -> None:
    """Refuse the flags that only a schedule has, where none is asked for.

    Args:
        args: parsed arguments.
        default_of: the value of a flag that is not given.

    Raises:
        ValueError: one of them is given.
    """
    refuse_given(args, _OWN, "without --schedule", default_of)


def read_schedule(args: Namespace, default_of: Callable[[str], object]) -> SingleSchedule:
    """The schedule that the flags describe.

    Args:
        args: parsed arguments.
        default_of: the value of a flag that is not given.

    Raises:
        ValueError: a flag is missing or out of range, or has no effect.
    """
    for name in ("pipeline_model_parallel_size", "num_microbatches"):
        if getattr(args, name) is None:
            raise ValueError(
                f"{as_flag(name)} is missing, allowed: 1 or more, with --schedule {args.schedule}"
            )
    beside = f"with --schedule {args.schedule}"
    others = [name for name in vars(args) if name not in _USED]
    refuse_given(args, others, f"{beside}, whose stages have no model", default_of)
    if args.schedule != "filled":
        refuse_given(args, NUMBERS_OF_FILLS, f"{beside}, allowed: with --schedule filled")
    ratio = given_ratio(args)
    return SingleSchedule(
        name=args.schedule,
        num_ranks=args.pipeline_model_parallel_size,
        num_microbatches=args.num_microbatches,
        num_chunks=args.num_virtual_stages_per_pipeline_rank or 1,
        exit_stages=frozenset(args.exit_stages),
        stage_ratios=tuple(args.stage_ratios),
        exit_stage_ratio=args.exit_stage_ratio,
        backward_forward_ratio=_RATIO_OF_FIGURES if ratio is None else ratio,
        num_warmup_fills=args.num_fill_warmup_microbatches,
        num_cooldown_fills=args.num_fill_cooldown_microbatches,
    )
