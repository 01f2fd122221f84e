"""The flags with which command lines load an engine."""

import argparse
from pathlib import Path

from megatron.early_exit.hardware.dtypes import DTYPES
from megatron.early_exit.inference.early_exit_engine import DEFAULT_MAX_BATCH_SIZE, EarlyExitEngine


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags, under Megatron's names where it has such flags."""
    add = parser.add_argument
    add(
        "--load",
        type=Path,
        required=True,
        help="checkpoint: a save directory, or one iteration in it",
    )
    group = parser.add_argument_group("engine")
    add = group.add_argument
    add(
        "--dtype",
        choices=DTYPES,
        help="default: the format that the model was trained in, or fp32 if that is slow here",
    )
    add("--device", help="default: the first GPU if there is one, else cpu")
    add(
        "--compile",
        action="store_true",
        help="compile the layers: some seconds at the start, then faster decoding",
    )
    for name in ("tensor", "pipeline"):
        flag = f"--{name}-model-parallel-size"
        add(flag, type=int, default=1, help="needs torchrun if above 1 (default: %(default)s)")
    add(
        "--max-batch-size",
        type=int,
        default=DEFAULT_MAX_BATCH_SIZE,
        help="most sequences that are decoded at a time (default: %(default)s)",
    )


def load_engine(
    args: argparse.Namespace, max_sequence_length: int | None = None
) -> EarlyExitEngine:
    """Load the engine that the flags describe; with several processes, rank 0 drives the others.

    Raises:
        ValueError: see `EarlyExitEngine.from_checkpoint`.
    """
    return EarlyExitEngine.from_checkpoint(
        args.load,
        dtype=None if args.dtype is None else DTYPES[args.dtype],
        device=args.device,
        max_batch_size=args.max_batch_size,
        max_sequence_length=max_sequence_length,
        tensor_parallel=args.tensor_model_parallel_size,
        pipeline_parallel=args.pipeline_model_parallel_size,
        compile=args.compile,
        has_driver=True,
    )
