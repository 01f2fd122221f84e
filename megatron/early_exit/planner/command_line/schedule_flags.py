"""The flags of one schedule on even stages."""

from argparse import ArgumentParser, Namespace
from typing import get_args

from megatron.early_exit.errors import as_flag
from megatron.early_exit.flags import refuse_given
from megatron.early_exit.planner.command_line.request_flags import NUMBERS_OF_FILLS
from megatron.early_exit.planner.uniform_stages import ScheduleName, UniformStages


def add_schedule_flags(parser: ArgumentParser) -> None:
    """Add the flags that only a single schedule has; those of ranks, chunks and fills it shares."""
    group = parser.add_argument_group("one schedule", "on stages that take the same time")
    add = group.add_argument
    add("--schedule", choices=get_args(ScheduleName), help="time and draw it, instead of planning")
    add("--num-microbatches", type=int, help="microbatches of the step")
    add(
        "--exit-stages", type=int, nargs="+", default=[], help="stages with an exit, counted from 0"
    )
    ratio = "time of an exit, or the final head, over that of a stage (default: %(default)s)"
    add("--exit-stage-ratio", type=float, default=0.5, help=ratio)


def refuse_schedule_flags(args: Namespace) -> None:
    """Refuse the flags that only a schedule has, where none is asked for.

    Raises:
        ValueError: one of them is given.
    """
    given = {"--num-microbatches": args.num_microbatches, "--exit-stages": args.exit_stages}
    for flag, value in given.items():
        if value:
            raise ValueError(f"{flag} has no effect without --schedule")


def read_schedule(args: Namespace) -> UniformStages:
    """The schedule that the flags describe.

    Raises:
        ValueError: a flag is missing or out of range.
    """
    for name in ("pipeline_model_parallel_size", "num_microbatches"):
        if getattr(args, name) is None:
            raise ValueError(
                f"{as_flag(name)} is missing, allowed: 1 or more, with --schedule {args.schedule}"
            )
    beside = f"with --schedule {args.schedule}"
    names = ("config", "gpus", "profile")
    refuse_given(args, names, f"{beside}, whose stages take the same time")
    if args.no_swiglu:
        raise ValueError(f"--no-swiglu has no effect {beside}")
    if args.schedule != "filled":
        refuse_given(args, NUMBERS_OF_FILLS, f"{beside}, allowed: with --schedule filled")
    return UniformStages(
        name=args.schedule,
        num_ranks=args.pipeline_model_parallel_size,
        num_microbatches=args.num_microbatches,
        num_chunks=args.num_virtual_stages_per_pipeline_rank or 1,
        exit_stages=frozenset(args.exit_stages),
        exit_stage_ratio=args.exit_stage_ratio,
        backward_forward_ratio=args.backward_forward_ratio,
        num_warmup_fills=args.num_fill_warmup_microbatches,
        num_cooldown_fills=args.num_fill_cooldown_microbatches,
    )
