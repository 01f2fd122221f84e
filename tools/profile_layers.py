"""Measure on this machine how long the parts of a model take, for tools/plan_pipeline.py --profile.

    python tools/profile_layers.py --config 7b --micro-batch-size 1 2 4 --output profile.json

builds a few layers of the model on one GPU or on the CPU, and measures the forward and the backward
pass of one layer, of the embedding, of the final head with its loss, and of one exit with its loss.
It takes the same flags to describe the model as tools/plan_pipeline.py."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.early_exit.errors import one_line
from megatron.early_exit.planner.command_line.model_flags import Model, add_model_flags, read_model
from megatron.early_exit.planner.command_line.profile_flags import refuse_unprofiled
from megatron.early_exit.planner.costs.layer_profile import MEASURED_SIZES, LayerProfile
from megatron.early_exit.ranges import ONE_OR_MORE

if TYPE_CHECKING:
    from megatron.early_exit.platform import Platform

_INTERRUPTED = 130


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_model_flags(parser)
    add = parser.add_argument_group("measurement").add_argument
    sizes = "microbatch sizes to measure, in sequences (default: 1 2 4)"
    add("--micro-batch-size", type=int, nargs="+", default=[1, 2, 4], help=sizes)
    dtype = parser.add_mutually_exclusive_group()
    dtype.add_argument(
        "--bf16",
        action="store_true",
        help="measure in bf16, as plans need it (the default, even where bf16 is slow)",
    )
    dtype.add_argument(
        "--fp32", action="store_true", help="measure in fp32, to compare; the planner refuses this"
    )
    repeats = "measurements of each pass, of which the median is used (default: %(default)s)"
    add("--repeats", type=int, default=10, help=repeats)
    add("--output", type=Path, required=True, help="JSON file to write")
    add("--overwrite", action="store_true", help="replace an existing file")
    return parser


def check(args: argparse.Namespace) -> None:
    """Refuse invalid flags before the measurement starts.

    Raises:
        ValueError: one of them is out of range, or names a file that cannot be written.
    """
    ONE_OR_MORE.check_flags(args, "repeats")
    for size in args.micro_batch_size:
        ONE_OR_MORE.check(**{"--micro-batch-size": size})
    if not args.output.parent.is_dir():
        raise ValueError(f"--output {args.output}: there is no folder {args.output.parent}")
    if args.output.is_dir():
        raise ValueError(f"--output {args.output} is a folder, allowed: a file")
    if args.output.exists() and not args.overwrite:
        raise ValueError(f"--output {args.output} exists already (--overwrite replaces it)")


def profile(args: argparse.Namespace, model: Model) -> LayerProfile:
    """Measure.

    Raises:
        ValueError: a microbatch does not fit into memory, or nothing could be measured.
    """
    from megatron.early_exit import platform

    machine = platform.prepare()
    import torch

    from megatron.early_exit.hardware.dtypes import dtype_speed
    from megatron.early_exit.training.part_profile import PartProfiler

    dtype = torch.float32 if args.fp32 else torch.bfloat16
    if not (speed := dtype_speed(dtype, machine.device)).is_fast:
        print(
            f"{speed.finding}: plans with this profile hold only for such machines",
            file=sys.stderr,
        )
    exits, sizes = model.placements[0], sorted(set(args.micro_batch_size))
    measuring = ""

    def progress(part: str, size: int) -> None:
        nonlocal measuring
        measuring = f"{part}, --micro-batch-size {size}"
        print(f"measuring {measuring}", file=sys.stderr, flush=True)

    profiler = PartProfiler(
        shape=model.shape,
        exits=exits,
        dtype=dtype,
        options=_layer_options(machine),
    )
    with _one_process(machine), _without_remarks():
        try:
            seconds = profiler.measure(sizes, args.repeats, progress)
        except torch.OutOfMemoryError:
            raise ValueError(
                f"{measuring or 'one layer'} does not fit into memory, allowed: fewer sequences"
            ) from None
        try:
            return LayerProfile(
                machine=_describe(machine),
                dtype="fp32" if args.fp32 else "bf16",
                shape={name: getattr(model.shape, name) for name in MEASURED_SIZES},
                exit_heads=exits.head_flags if exits.positions else None,
                seconds_by_size=seconds,
            )
        except ValueError as error:
            raise ValueError(
                f"--repeats {args.repeats} is too few while other work runs here: {error}"
            ) from None


def _layer_options(machine: Platform) -> dict[str, Any]:
    """The options that training on this machine sets by default."""
    fused, engine = machine.compiled_fusions, machine.transformer_engine
    return {
        "transformer_impl": machine.transformer_impl,
        "gradient_accumulation_fusion": machine.apex,
        "bias_activation_fusion": fused,
        "bias_dropout_fusion": fused,
        "persist_layer_norm": engine,
        "masked_softmax_fusion": engine,
        "apply_rope_fusion": engine,
    }


def _describe(machine: Platform) -> str:
    import torch

    if machine.device == "cuda":
        device = torch.cuda.get_device_name()
    else:
        device = f"CPU with {torch.get_num_threads()} threads"
    return f"{device} ({machine.describe()})"


@contextmanager
def _without_remarks() -> Iterator[None]:
    """Megatron's messages about each model chunk would hide the progress."""
    logger = logging.getLogger("megatron.core")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _one_process(machine: Platform) -> Iterator[None]:
    """Megatron's process groups, all of size one."""
    import torch
    from megatron.core import parallel_state, tensor_parallel

    torch.distributed.init_process_group(
        machine.backend, store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        parallel_state.initialize_model_parallel()
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = build_parser().parse_args(argv)
    try:
        check(args)
        model = read_model(args)
        refuse_unprofiled(model)
        measured = profile(args, model)
        measured.write(args.output)
    except (ValueError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return _INTERRUPTED
    print(f"{args.output}: {measured.machine}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
