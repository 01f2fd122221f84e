"""The flags that describe the machines, and those that fix parts of the layout."""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

from megatron.early_exit.errors import as_flag
from megatron.early_exit.flags import refuse_given
from megatron.early_exit.planner.command_line.model_flags import Model
from megatron.early_exit.planner.command_line.profile_flags import read_profile
from megatron.early_exit.planner.command_line.stage_flags import (
    add_stage_flags,
    read_stages,
)
from megatron.early_exit.planner.costs.hardware import ACCELERATORS, Accelerator
from megatron.early_exit.planner.costs.training_options import (
    FP8,
    FP8Format,
    FP8Recipe,
    Recompute,
    TrainingOptions,
)
from megatron.early_exit.planner.costs.update import Overlap
from megatron.early_exit.planner.search.filling import FillRequest
from megatron.early_exit.planner.search.request import PlanRequest
from megatron.early_exit.ranges import ABOVE_ZERO, BELOW_ONE, ONE_OR_MORE, Range
from megatron.early_exit.schedules.generators.bubble_filling import AUTO_RATIO, parse_ratio

_HARDWARE: dict[str, tuple[str, float, str]] = {
    "flops_per_s": ("--tflops", 1e12, "dense bf16 peak of a GPU in TFLOP/s"),
    "memory_bytes": ("--memory-gb", 1e9, "its memory in GB"),
    "memory_bytes_per_s": ("--memory-gb-per-s", 1e9, "bandwidth of its memory in GB/s"),
    "node_bytes_per_s": ("--node-gb-per-s", 1e9, "GB/s to a GPU of the same node, one direction"),
    "network_bytes_per_s": ("--network-gb-per-s", 1e9, "GB/s from each GPU to other nodes"),
    "fp8_flops_per_s": ("--fp8-tflops", 1e12, "its dense FP8 peak in TFLOP/s"),
}
# Selective recomputation saves the attention matrix, which flash attention never writes.
_RECOMPUTES: tuple[Recompute, ...] = ("none", "full")
_MOST_OF_NODE = 4096
NUMBERS_OF_FILLS = ("num_fill_warmup_microbatches", "num_fill_cooldown_microbatches")


def add_request_flags(parser: ArgumentParser) -> None:
    """Add the flags of machines and of the layout to a command line."""
    add = parser.add_argument_group("machines").add_argument
    add("--gpus", type=int, help="number of GPUs, all of which are used")
    add("--gpu", choices=ACCELERATORS, default="a100-80gb", help="default: %(default)s")
    for flag, _, text in _HARDWARE.values():
        add(flag, type=float, help=f"{text} (default: that of --gpu)")
    add("--gpus-per-node", type=int, help="default: 8")
    slower = "by how much the network is slower beyond a leaf switch (default: 1, as fast)"
    add("--oversubscription", type=float, help=slower)
    add("--nodes-per-leaf", type=int, help="nodes below a leaf switch (default: 1)")
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
    add_stage_flags(group)
    add("--micro-batch-size", type=int)
    context = "default: the best that leaves each GPU 8,192 tokens of a sequence or more, or 1"
    add("--context-parallel-size", type=int, help=context)
    add("--expert-model-parallel-size", type=int)
    add("--expert-tensor-parallel-size", type=int, help="default: the better of 1 and the tensor's")
    recompute = (
        "layers that are computed again in the backward (default: the faster of none and full)"
    )
    add("--recompute-granularity", choices=get_args(Recompute), help=recompute)
    add("--fp8-format", choices=get_args(FP8Format), help="as Megatron's flag (default: bf16)")
    add("--fp8-recipe", choices=get_args(FP8Recipe), help="default: delayed, as Megatron's")
    add("--fp8-param-gather", action="store_true", help="as Megatron's flag")
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
    ratio = (
        "for which the schedule is made; auto, the default, is what the costs of a plan's stages "
        "give, and 2 with --schedule, whose stages cost nothing"
    )
    add("--backward-forward-ratio", type=parse_ratio, default=AUTO_RATIO, help=ratio)
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
        return FillRequest(
            num_warmup=args.num_fill_warmup_microbatches,
            num_cooldown=args.num_fill_cooldown_microbatches,
            backward_forward_ratio=given_ratio(args),
            most_cost=args.max_fill_cost,
        )
    names = (*NUMBERS_OF_FILLS, "backward_forward_ratio", "max_fill_cost")
    refuse_given(args, names, "without --fill-explicit-bubbles", default_of)
    return None


def given_ratio(args: Namespace) -> float | None:
    """The time of a backward over that of a forward; None for auto."""
    ratio: float | str = args.backward_forward_ratio
    return None if isinstance(ratio, str) else ratio


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
    if args.fill_explicit_bubbles and model.shape.experts is not None:
        raise ValueError(
            "--fill-explicit-bubbles cannot be combined with --num-experts "
            f"{model.shape.experts.num_experts}, as in training"
        )
    BELOW_ONE.check_flags(args, "memory_headroom")
    accelerator = _accelerator(args)
    stages = read_stages(args, model.shape.num_layers)
    if args.fill_explicit_bubbles and stages.num_chunks not in (None, 1):
        raise ValueError(
            "--fill-explicit-bubbles cannot be combined with "
            f"--num-virtual-stages-per-pipeline-rank {stages.num_chunks}, allowed: 1"
        )
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
            fp8=_fp8(args),
        ),
        recomputes=(
            _RECOMPUTES if args.recompute_granularity is None else (args.recompute_granularity,)
        ),
        context_parallel=args.context_parallel_size,
        overlap=Overlap(not args.no_overlap_grad_reduce, args.overlap_param_gather),
        tensor_parallel=args.tensor_model_parallel_size,
        pipeline_parallel=args.pipeline_model_parallel_size,
        num_chunks=1 if args.fill_explicit_bubbles else stages.num_chunks,
        microbatch_size=args.micro_batch_size,
        layers_per_stage=stages.layers_per_stage,
        mappings=(True,) if args.use_tp_pp_dp_mapping else (False, True),
        expert_parallel=args.expert_model_parallel_size,
        expert_tensor_parallel=args.expert_tensor_parallel_size,
    )


def _fp8(args: Namespace) -> FP8 | None:
    if args.fp8_format is None:
        for name in ("fp8_recipe", "fp8_param_gather"):
            if value := getattr(args, name):
                shown = "" if value is True else f" {value}"
                raise ValueError(f"{as_flag(name)}{shown} has no effect without --fp8-format")
        return None
    return FP8(
        format=args.fp8_format,
        recipe=args.fp8_recipe or "delayed",
        param_gather=args.fp8_param_gather,
    )


def _accelerator(args: Namespace) -> Accelerator:
    changed: dict[str, Any] = {}
    for name, (flag, unit, _) in _HARDWARE.items():
        value = getattr(args, flag.removeprefix("--").replace("-", "_"))
        ABOVE_ZERO.check(**{flag: value})
        if value is not None:
            changed[name] = value * unit
    Range(least=1, most=_MOST_OF_NODE, is_integer=True).check_flags(args, "gpus_per_node")
    if args.gpus_per_node is not None:
        changed["per_node"] = args.gpus_per_node
    Range(least=1, least_means="a network as fast as its links").check_flags(
        args, "oversubscription"
    )
    ONE_OR_MORE.check_flags(args, "nodes_per_leaf")
    if args.oversubscription is not None:
        changed["oversubscription"] = args.oversubscription
        changed["nodes_per_leaf"] = args.nodes_per_leaf or 1
    elif args.nodes_per_leaf is not None:
        raise ValueError(
            f"--nodes-per-leaf {args.nodes_per_leaf} has no effect without --oversubscription"
        )
    if args.fp8_tflops is not None and args.fp8_format is None:
        raise ValueError(f"--fp8-tflops {args.fp8_tflops:g} has no effect without --fp8-format")
    return replace(ACCELERATORS[args.gpu], **changed)
