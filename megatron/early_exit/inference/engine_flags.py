"""The flags with which command lines load an engine."""

import argparse
import math
import string
from pathlib import Path

from megatron.early_exit.hardware.dtypes import DTYPES
from megatron.early_exit.inference.early_exit_engine import DEFAULT_MAX_BATCH_SIZE, EarlyExitEngine
from megatron.early_exit.inference.engine.cache_budget import DEFAULT_GPU_MEMORY_UTILIZATION
from megatron.early_exit.inference.weight_dtype import WEIGHT_DTYPES

_UNITS = {
    "": 1,
    **{unit: 1000**power for power, unit in enumerate("kmgt", 1)},
    **{f"{unit}i": 1024**power for power, unit in enumerate("kmgt", 1)},
}
_SIZES = "1 byte or more, as a number, or as one with KB, MB, GB, TB, KiB, MiB, GiB or TiB"


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
    add(
        "--weight-dtype",
        choices=WEIGHT_DTYPES,
        help="keep weights in fewer bits, on x86 CPUs: int8 takes a quarter of the memory and "
        "decodes a few sequences faster; int4 has no fast products yet and is refused (default: "
        "as --dtype, or as tools/checkpoint.py quantize has stored them)",
    )
    add(
        "--quantize-heads",
        action=argparse.BooleanOptionalAction,
        help="keep the projections to the vocabulary in --weight-dtype, too (default: yes)",
    )
    add("--device", help="default: the first GPU if there is one, else cpu")
    add(
        "--compile",
        action="store_true",
        help="compile the layers: seconds to minutes at the start, then faster decoding",
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
    add(
        "--kv-cache-memory",
        type=memory_size,
        metavar="SIZE",
        help="most memory for keys and values in each process, such as 8GiB or 500MB; when it runs "
        "out, the youngest sequence waits and is computed again (default: enough for "
        "--max-batch-size sequences, at most half of what the machine has left, or what "
        "--gpu-memory-utilization leaves)",
    )
    add(
        "--draft-vocab-size",
        type=int,
        metavar="N",
        help="a multi-token-prediction module drafts the first N tokens only, for which it reads N "
        "rows of the output layer; the text stays that of the full model (default: those that "
        "exits answer with, or all)",
    )
    add(
        "--gpu-memory-utilization",
        type=float,
        help="share of a GPU's memory that each process may use in all, where --kv-cache-memory is "
        f"not given (default: {DEFAULT_GPU_MEMORY_UTILIZATION})",
    )
    add(
        "--enable-prefix-caching",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep keys and values of past requests for new ones that begin with the same tokens "
        "(default: yes)",
    )


def load_engine(
    args: argparse.Namespace,
    max_sequence_length: int | None = None,
    use_stored_rule: bool = True,
) -> EarlyExitEngine:
    """Load the engine that the flags describe; with several processes, rank 0 drives the others.

    Args:
        args: the flags.
        max_sequence_length, use_stored_rule: see `EarlyExitEngine.from_checkpoint`.

    Raises:
        ValueError: see `EarlyExitEngine.from_checkpoint`; or a flag has no effect.
    """
    if args.weight_dtype is None and args.quantize_heads is not None:
        flag = "--quantize-heads" if args.quantize_heads else "--no-quantize-heads"
        raise ValueError(f"{flag} has no effect without --weight-dtype")
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
        kv_cache_memory=args.kv_cache_memory,
        gpu_memory_utilization=args.gpu_memory_utilization,
        prefix_caching=args.enable_prefix_caching,
        weight_dtype=args.weight_dtype,
        quantize_heads=args.quantize_heads,
        draft_vocab_size=args.draft_vocab_size,
        use_stored_rule=use_stored_rule,
    )


def memory_size(text: str) -> int:
    """Bytes of a text such as `8GiB`, `500MB` or `1000000`.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    number = text.rstrip(string.ascii_letters + " ")
    unit = text[len(number) :].strip().lower().removesuffix("b")
    try:
        size = float(number) * _UNITS[unit]
    except (KeyError, ValueError):
        size = 0.0
    if not 1 <= size < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size, allowed: {_SIZES}")
    return int(size)
