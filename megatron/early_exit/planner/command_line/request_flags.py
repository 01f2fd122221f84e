"""The flags that describe the machines, and those that fix parts of the layout."""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import replace
from typing import get_args

from megatron.early_exit.flags import refuse_given
from megatron.early_exit.planner.command_line.model_flags import Model
from megatron.early_exit.planner.command_line.profile_flags import read_profile
from megatron.early_exit.planner.costs.hardware import ACCELERATORS, Accelerator
from megatron.early_exit.planner.costs.training_options import Recompute, TrainingOptions
from megatron.early_exit.planner.costs.update import Overlap
from megatron.early_exit.planner.search.filling import FillRequest
from megatron.early_exit.planner.search.request import PlanRequest
from megatron.early_exit.ranges import ABOVE_ZERO, BELOW_ONE, ONE_OR_MORE

_HARDWARE: dict[str, tuple[str, float, str]] = {
    "flops_per_s": ("--tflops", 1e12, "dense bf16 peak of a GPU in TFLOP/s"),
    "memory_bytes": ("--memory-gb", 1e9, "its memory in GB"),
    "memory_bytes_per_s": ("--memory-gb-per-s", 1e9, "bandwidth of its memory in GB/s"),
    "node_bytes_per_s": ("--node-gb-per-s", 1e9, "GB/s to a GPU of the same node, one direction"),
    "network_bytes_per_s": ("--network-gb-per-s", 1e9, "GB/s from each GPU to other nodes"),
}
# Selective recomputation saves the attention matrix, which flash attention never writes.
_RECOMPUTES: tuple[Recompute, ...] = ("none", "full")
NUMBERS_OF_FILLS = ("num_fill_warmup_microbatches", "num_fill_cooldown_microbatches")


def add_request_flags(parser: ArgumentParser) -> None:
    """Add the flags of machines and of the layout to a command line."""
    add = parser.add_argument_group("machines").add_argument
    add("--gpus", type=int, help="number of GPUs, all of which are used")
    add("--gpu", choices=ACCELERATORS, default="a100-80gb", help="default: %(default)s")
    for flag, _, text in _HARDWARE.values():
        add(flag, type=float, help=f"{text} (default: that of --gpu)")
    add("--gpus-per-node", type=int, help="default: 8")
    share = "share of the memory left for libraries and fragments (default: %(default)s)"
    add("--memory-headroom", type=float, default=0.1, help=share)
    share = "share of the peak that large matrix products reach (default: that of --gpu)"
    add("--achieved-share", type=float, help=share)
    overhead = "time to start kernels and messages in a pass of a stage (default: %(default)s)"
    add("--pass-overhead-us", type=float, default=50.0, help=overhead)
    group = parser.add_argument_group("layout", "what is not given is searched")
    add = group.add_argument
    add("--tensor-model-parallel-size", type=int)
    add("--pipeline-model-parallel-size", type=int)
    add("--num-virtual-stages-per-pipeline-rank", type=int, help="1 is not interleaved")
    add("--micro-batch-size", type=int)
    add("--context-parallel-size", type=int, default=1, help="default: %(default)s")
    recompute = (
        "layers that are computed again in the backward (default: the faster of none and full)"
    )
    add("--recompute-granularity", choices=get_args(Recompute), help=recompute)
    add("--tp-comm-overlap", action="store_true", help="as Megatron's flag")
    add("--grad-reduce-in-bf16", action="store_true", help="as Megatron's flag")
    add("--no-overlap-grad-reduce", action="store_true", help="plan without --overlap-grad-reduce")
    add("--overlap-param-gather", action="store_true", help="as Megatron's flag")


def add_fill_flags(parser: ArgumentParser) -> None:
    """Add the flags of partial microbatches in bubbles to a command line."""
    add = parser.add_argument_group("filled bubbles").add_argument
    add("--fill-explicit-bubbles", action="store_true", help="fill the bubbles of 1F1B, with exits")
    add("--num-fill-warmup-microbatches", type=int, help="default: as many as are worth it")
    add("--num-fill-cooldown-microbatches", type=int, help="default: as many as are worth it")
    add("--backward-forward-ratio", type=float, default=2.0, help="default: %(default)s")
    most = (
        "share of the step that fills may cost if their number is not given (default: %(default)s)"
    )
    add("--max-fill-cost", type=float, default=0.01, help=most)


def read_fill_request(args: Namespace, default_of: Callable[[str], object]) -> FillRequest | None:
    """The request to fill bubbles; None if bubbles are not to be filled.

    Args:
        args: parsed arguments.
        default_of: the value of a flag that is not given.

    Raises:
        ValueError: a flag is out of range, or has no effect.
    """
    if args.fill_explicit_bubbles:
        if args.num_virtual_stages_per_pipeline_rank not in (None, 1):
            raise ValueError(
                "--fill-explicit-bubbles cannot be combined with "
                "--num-virtual-stages-per-pipeline-rank "
                f"{args.num_virtual_stages_per_pipeline_rank}, allowed: 1"
            )
        return FillRequest(
            num_warmup=args.num_fill_warmup_microbatches,
            num_cooldown=args.num_fill_cooldown_microbatches,
            backward_forward_ratio=args.backward_forward_ratio,
            most_cost=args.max_fill_cost,
        )
    names = (*NUMBERS_OF_FILLS, "backward_forward_ratio", "max_fill_cost")
    refuse_given(args, names, "without --fill-explicit-bubbles", default_of)
    return None


def read_request(args: Namespace, model: Model) -> PlanRequest:
    """The planning request that the flags describe.

    Raises:
        ValueError: a flag is missing or out of range.
    """
    if args.gpus is None:
        raise ValueError("--gpus is missing, allowed: the number of GPUs, 1 or more")
    if model.global_batch_size is None:
        raise ValueError(
            "--global-batch-size is missing, allowed: the sequences of a step, 1 or more"
        )
    BELOW_ONE.check_flags(args, "memory_headroom")
    accelerator = _accelerator(args)
    return PlanRequest(
        shape=model.shape,
        placements=model.placements,
        accelerator=accelerator,
        num_accelerators=args.gpus,
        global_batch_size=model.global_batch_size,
        memory_limit_bytes=accelerator.memory_bytes * (1 - args.memory_headroom),
        achieved_share=args.achieved_share,
        profile=read_profile(args, model),
        pass_overhead_s=args.pass_overhead_us / 1e6,
        options=TrainingOptions(
            overlaps_messages=args.fill_explicit_bubbles,
            tp_comm_overlap=args.tp_comm_overlap,
            gradient_bytes=2 if args.grad_reduce_in_bf16 else 4,
        ),
        recomputes=(
            _RECOMPUTES if args.recompute_granularity is None else (args.recompute_granularity,)
        ),
        context_parallel=args.context_parallel_size,
        overlap=Overlap(not args.no_overlap_grad_reduce, args.overlap_param_gather),
        tensor_parallel=args.tensor_model_parallel_size,
        pipeline_parallel=args.pipeline_model_parallel_size,
        num_chunks=1 if args.fill_explicit_bubbles else args.num_virtual_stages_per_pipeline_rank,
        microbatch_size=args.micro_batch_size,
    )


def _accelerator(args: Namespace) -> Accelerator:
    changed = {}
    for name, (flag, unit, _) in _HARDWARE.items():
        value = getattr(args, flag.removeprefix("--").replace("-", "_"))
        ABOVE_ZERO.check(**{flag: value})
        if value is not None:
            changed[name] = value * unit
    ONE_OR_MORE.check_flags(args, "gpus_per_node")
    if args.gpus_per_node is not None:
        changed["per_node"] = args.gpus_per_node
    return replace(ACCELERATORS[args.gpu], **changed)
