"""Plans as a table, as flags for a command line, and as JSON."""

from itertools import groupby
from shlex import quote
from typing import Any

from megatron.early_exit.planner.costs.layer_profile import LayerProfile
from megatron.early_exit.planner.costs.training_options import Recompute
from megatron.early_exit.planner.drawing.text import seconds_text
from megatron.early_exit.planner.search.plans import Plan
from megatron.early_exit.planner.search.request import PlanRequest


def table(plans: list[Plan], request: PlanRequest) -> str:
    """One line for each plan."""
    fastest_s = plans[0].prediction.step_s
    has_exits = any(plan.costing.candidate.exits.positions for plan in plans)
    has_fills = any(plan.fills.number for plan in plans)
    has_recomputes = any(plan.costing.candidate.options.recompute != "none" for plan in plans)
    rows = [
        [
            *("#", "TP", "PP", "VPP", "layers", "DP", "size", "number"),
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
        row: list[object] = [number, layout.tensor_parallel, layout.num_ranks, one.num_chunks]
        fewest, most = min(layout.layers_per_stage), max(layout.layers_per_stage)
        row.append(most if layout.is_even else f"{fewest}-{most}")
        row += [layout.data_parallel, layout.microbatch_size, one.num_microbatches]
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
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )


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


_RECOMPUTE_WORDS: dict[Recompute, list[object]] = {
    "none": [],
    "selective": ["--recompute-granularity", "selective"],
    "full": [
        *("--recompute-granularity", "full", "--recompute-method", "uniform"),
        *("--recompute-num-layers", 1),
    ],
}


def flags(plan: Plan, request: PlanRequest) -> list[str]:
    """The flags of pretrain_early_exit_gpt.py that choose the plan, without those of the model."""
    one, layout = plan.costing.candidate, plan.costing.candidate.layout
    words: list[object] = ["--tensor-model-parallel-size", layout.tensor_parallel]
    if layout.tensor_parallel > 1:
        words.append("--sequence-parallel")
    if layout.context_parallel > 1:
        words += ["--context-parallel-size", layout.context_parallel]
    words += ["--pipeline-model-parallel-size", layout.num_ranks]
    if not layout.is_even:
        words += ["--pipeline-model-parallel-layout", _layout_text(layout.layers_per_stage)]
    elif one.num_chunks > 1:
        words += ["--num-layers-per-virtual-pipeline-stage", layout.layers_per_stage[0]]
    if layout.use_tp_pp_dp_mapping:
        words.append("--use-tp-pp-dp-mapping")
    words += ["--micro-batch-size", layout.microbatch_size]
    words += ["--global-batch-size", request.global_batch_size, "--use-distributed-optimizer"]
    words += ["--overlap-grad-reduce"] * request.overlap.grad_reduce
    words += ["--overlap-param-gather"] * request.overlap.param_gather
    words += ["--grad-reduce-in-bf16"] * (one.options.gradient_bytes == 2)
    words += ["--tp-comm-overlap"] * (one.options.tp_comm_overlap and layout.tensor_parallel > 1)
    words += _RECOMPUTE_WORDS[one.options.recompute]
    if one.exits.positions:
        words += ["--exit-layer-nums", *one.exits.exit_layer_nums]
        words += ["--pre-exit"] * one.exits.pre_exit + one.exits.head_words
    if plan.fills.number:
        words += [
            *("--fill-explicit-bubbles", "--num-fill-warmup-microbatches", plan.fills.num_warmup),
            *("--num-fill-cooldown-microbatches", plan.fills.num_cooldown),
            *("--backward-forward-ratio", f"{plan.fills.backward_forward_ratio:g}"),
        ]
    return [str(word) for word in words]


def _layout_text(layers_per_stage: tuple[int, ...]) -> str:
    """The value of Megatron's --pipeline-model-parallel-layout: E is the embedding, t a layer, L
    the final head with its loss; stages end with |."""

    def layers(number: int) -> str:
        return f"t*{number}" if number > 1 else "t"

    text = f"E{layers(layers_per_stage[0])}|"
    for number, equal in groupby(layers_per_stage[1:-1]):
        times = len(list(equal))
        text += f"({layers(number)}|)*{times}" if times > 1 else f"{layers(number)}|"
    return f"{text}{layers(layers_per_stage[-1])}L"


def one_flag_a_line(words: list[str]) -> str:
    """Words of a command line as its last lines."""
    lines: list[str] = []
    for word in words:
        if word.startswith("--"):
            lines.append(f"    {word}")
        else:
            lines[-1] += f" {quote(word)}"
    return " \\\n".join(lines)


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
        "backward_forward_ratio": plan.costing.backward_forward_ratio,
        "peak_bytes": list(pipeline.peak_bytes),
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
