"""Plans as a table and as JSON."""

from typing import Any

from megatron.early_exit.planner.command_line.plan_flags import flags
from megatron.early_exit.planner.costs.layer_profile import LayerProfile
from megatron.early_exit.planner.drawing.text import aligned, seconds_text
from megatron.early_exit.planner.search.breakdown import memory_parts, step_parts
from megatron.early_exit.planner.search.plans import Plan
from megatron.early_exit.planner.search.request import PlanRequest


def table(plans: list[Plan], request: PlanRequest) -> str:
    """One line for each plan."""
    fastest_s = plans[0].prediction.step_s
    has_exits = any(plan.costing.candidate.exits.positions for plan in plans)
    has_experts = request.shape.experts is not None
    has_context = any(plan.costing.candidate.layout.context_parallel > 1 for plan in plans)
    has_fills = any(plan.fills.number for plan in plans)
    has_recomputes = any(plan.costing.candidate.options.recompute != "none" for plan in plans)
    rows = [
        [
            *("#", "TP", *(["CP"] if has_context else []), "PP", "VPP", "layers", "DP"),
            *(["EP", "ETP"] if has_experts else []),
            *("size", "number"),
            *(["exits"] if has_exits else []),
            *(["recompute"] if has_recomputes else []),
            *("order", "step", "slower", "tokens/s/GPU", "TFLOP/s", "MFU", "memory", "bubble"),
            "update",
            *(["fills", "cost"] if has_fills else []),
        ]
    ]
    for number, plan in enumerate(plans, start=1):
        one, layout = plan.costing.candidate, plan.costing.candidate.layout
        step_s, pipeline = plan.prediction.step_s, plan.prediction.pipeline
        row: list[object] = [number, layout.tensor_parallel]
        row += [layout.context_parallel] if has_context else []
        row += [layout.num_ranks, one.num_chunks]
        fewest, most = min(layout.layers_per_stage), max(layout.layers_per_stage)
        row.append(most if layout.is_even else f"{fewest}-{most}")
        row.append(layout.data_parallel)
        row += [layout.expert_parallel, layout.expert_tensor_parallel] if has_experts else []
        row += [layout.microbatch_size, one.num_microbatches]
        if has_exits:
            row.append("before" if one.exits.pre_exit else "after")
        if has_recomputes:
            row.append(one.options.recompute)
        row += [
            "tp-pp-dp" if layout.use_tp_pp_dp_mapping else "tp-dp-pp",
            seconds_text(step_s),
            f"{step_s / fastest_s - 1:.1%}",
            f"{_tokens_per_s(plan, request):,.0f}",
            f"{_flops_per_s(plan, request) / 1e12:.0f}",
            f"{_flops_per_s(plan, request) / request.accelerator.flops_per_s:.1%}",
            f"{plan.prediction.peak_bytes / 1e9:.1f} GB",
            f"{pipeline.bubble_fraction:.1%}",
            seconds_text(step_s - pipeline.step_s),
        ]
        if has_fills:
            row += [f"{plan.fills.num_warmup} + {plan.fills.num_cooldown}", f"{plan.fill_cost:.2%}"]
        rows.append([str(cell) for cell in row])
    return aligned(rows)


def origin_of_times(plans: list[Plan], profile: LayerProfile) -> str:
    """A line that says on which machine a profile was measured, and for which plans it is
    extrapolated."""
    text = f"times measured in {profile.dtype} with microbatches of {_list(profile.sizes)} on "
    text += profile.machine
    sizes = {plan.costing.candidate.layout.microbatch_size for plan in plans}
    others = sorted(size for size in sizes if not profile.has_measured(size))
    return f"{text}; extrapolated to {_list(others)}" if others else text


LEGEND = (
    "layers: fewest and most of a stage; size, number: sequences of a microbatch, microbatches "
    "of a step; exits\nafter their layers or before the next ones (--pre-exit); order of the ranks "
    "(tp-pp-dp: --use-tp-pp-dp-mapping);\nTFLOP/s: of each GPU, for the model without its exits, "
    "and without what is computed again; MFU: their share of\nits peak; update: the part of the "
    "step that is not in the pipeline's schedule"
)
"""Explanation of the columns whose names do not explain themselves."""


def as_json(plan: Plan, request: PlanRequest) -> dict[str, Any]:
    """A plan as JSON values; seconds and bytes."""
    one, layout = plan.costing.candidate, plan.costing.candidate.layout
    pipeline = plan.prediction.pipeline
    return {
        "tensor_parallel": layout.tensor_parallel,
        "pipeline_parallel": layout.num_ranks,
        "virtual_stages_per_rank": one.num_chunks,
        "context_parallel": layout.context_parallel,
        "data_parallel": layout.data_parallel,
        "expert_parallel": layout.expert_parallel,
        "expert_tensor_parallel": layout.expert_tensor_parallel,
        "expert_data_parallel": layout.num_expert_replicas if one.shape.experts else None,
        "layers_per_stage": list(layout.layers_per_stage),
        "recompute": one.options.recompute,
        "microbatch_size": layout.microbatch_size,
        "num_microbatches": one.num_microbatches,
        "use_tp_pp_dp_mapping": layout.use_tp_pp_dp_mapping,
        "pre_exit": one.exits.pre_exit,
        "exit_stages": list(one.exits.stages(layout.layers_per_stage)),
        "num_fill_warmup_microbatches": plan.fills.num_warmup,
        "num_fill_cooldown_microbatches": plan.fills.num_cooldown,
        "fill_cost": plan.fill_cost,
        "step_s": plan.prediction.step_s,
        "pipeline_s": pipeline.step_s,
        "bubble_fraction": pipeline.bubble_fraction,
        "tokens_per_s": _tokens_per_s(plan, request) * request.num_accelerators,
        "tokens_per_s_per_gpu": _tokens_per_s(plan, request),
        "model_flops_per_s_per_gpu": _flops_per_s(plan, request),
        "model_flops_utilization": _flops_per_s(plan, request) / request.accelerator.flops_per_s,
        "backward_forward_ratio": plan.costing.costs.backward_forward_ratio,
        "backward_forward_ratio_of_stages": [
            stage.backward_forward_ratio for stage in plan.costing.costs.stages
        ],
        "step_parts_s": step_parts(plan, request),
        "peak_bytes": list(pipeline.peak_bytes),
        "peak_parts_bytes": memory_parts(plan),
        "flags": flags(plan, request),
    }


def _tokens_per_s(plan: Plan, request: PlanRequest) -> float:
    """Tokens of full samples a second, on each accelerator."""
    tokens = request.global_batch_size * request.shape.seq_length
    return tokens / plan.prediction.step_s / request.num_accelerators


def _flops_per_s(plan: Plan, request: PlanRequest) -> float:
    """Operations of the model a second, on each accelerator."""
    return _tokens_per_s(plan, request) * request.shape.training_flops


def _list(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
