"""A measured step of a given layout as the source of the share of the peak that products reach."""

from argparse import ArgumentParser, Namespace
from dataclasses import replace
from math import inf
from typing import Any

from megatron.early_exit.errors import FieldError, as_flag
from megatron.early_exit.planner.drawing.text import seconds_text
from megatron.early_exit.planner.search.calibration import Calibration, calibrate
from megatron.early_exit.planner.search.plans import Plan
from megatron.early_exit.planner.search.request import PlanRequest
from megatron.early_exit.ranges import ABOVE_ZERO

_NEEDED = (*("tensor_model_parallel_size", "pipeline_model_parallel_size", "micro_batch_size"),)
_REPLACED = ("achieved_share", "profile")


def add_measured_step_flag(parser: ArgumentParser) -> None:
    """Add the flag of a measured step to a command line."""
    measured = (
        "of a whole step, without fills, of the layout that the flags of the layout describe; "
        "layouts of all kinds are then ranked with the share of the peak that it reached"
    )
    group = parser.add_argument_group("a measured step")
    group.add_argument("--measured-step", type=float, metavar="SECONDS", help=measured)


def read_measured_step(args: Namespace, request: PlanRequest) -> Calibration | None:
    """What the measured step says, if one is given.

    Args:
        args: parsed arguments.
        request: that they describe.

    Raises:
        ValueError: a flag of the measured layout is missing, or it has none, or it cannot have
            taken so long.
    """
    if args.measured_step is None:
        return None
    ABOVE_ZERO.check_flags(args, "measured_step")
    if args.fill_explicit_bubbles:
        raise ValueError(
            "--measured-step cannot be combined with --fill-explicit-bubbles, allowed: that flag "
            "with the --achieved-share that is printed here"
        )
    for name in _REPLACED:
        value = getattr(args, name)
        if value is not None:
            raise ValueError(f"{as_flag(name)} {value} cannot be combined with --measured-step")
    for name in _NEEDED:
        if getattr(args, name) is None:
            raise ValueError(
                f"{as_flag(name)} is missing, allowed: that of the layout of --measured-step"
            )
    return calibrate(measured_request(args, request), args.measured_step)


def measured_request(args: Namespace, request: PlanRequest) -> PlanRequest:
    """The request for the measured layout alone: what is not given is what Megatron does then.

    Raises:
        ValueError: Megatron would refuse it: stages do not divide the layers.
    """
    num_chunks, ranks = request.num_chunks or 1, args.pipeline_model_parallel_size
    layers = request.layers_per_stage
    if layers is None:
        num_layers, num_stages = request.shape.num_layers, ranks * num_chunks
        if num_layers % num_stages:
            raise FieldError(
                "--pipeline-model-parallel-size",
                f"times {num_chunks} chunks does not divide {num_layers} layers",
                "divisors, or --pipeline-model-parallel-layout",
                value=ranks,
            )
        layers = (num_layers // num_stages,) * num_stages
    experts: dict[str, Any] = {}
    if request.shape.experts is not None:
        experts["expert_parallel"] = request.expert_parallel or 1
        experts["expert_tensor_parallel"] = (
            request.expert_tensor_parallel or args.tensor_model_parallel_size
        )
    return replace(
        request,
        **experts,
        # It has run, so that it fits, whatever is thought of its memory.
        memory_limit_bytes=inf,
        context_parallel=request.context_parallel or 1,
        num_chunks=num_chunks,
        layers_per_stage=layers,
        # Exits are before their layers only if --pre-exit says so, which leaves one placement.
        placements=request.placements[:1],
        mappings=(bool(args.use_tp_pp_dp_mapping),),
        recomputes=(args.recompute_granularity or "none",),
    )


def open_request(request: PlanRequest, calibration: Calibration) -> PlanRequest:
    """The request for layouts of all kinds, with what the measured step says."""
    return replace(
        request,
        achieved_share=calibration.achieved_share,
        context_parallel=None,
        tensor_parallel=None,
        pipeline_parallel=None,
        num_chunks=None,
        microbatch_size=None,
        expert_parallel=None,
        expert_tensor_parallel=None,
        layers_per_stage=None,
        mappings=(False, True),
        recomputes=("none", "full"),
    )


def origin_of_share(calibration: Calibration, request: PlanRequest, fastest: Plan) -> str:
    """Lines that say what the measured step was compared with, and what it gives."""
    measured = calibration.measured
    layout, step_s = measured.costing.candidate.layout, measured.prediction.step_s
    gain = step_s / fastest.prediction.step_s - 1
    compared = f"{gain:.1%} faster than it" if gain > 5e-4 else "as fast as it"
    return (
        f"measured: {seconds_text(step_s)} with tensor {layout.tensor_parallel} x pipeline "
        f"{layout.num_ranks} x data {layout.data_parallel} parallel, predicted "
        f"{seconds_text(calibration.uncalibrated_s)}: products reach "
        f"{calibration.achieved_share:.3f} of the peak, not "
        f"{request.accelerator.product_share:g}\n"
        f"(--achieved-share {calibration.achieved_share:.3f}); the first plan is {compared}"
    )
