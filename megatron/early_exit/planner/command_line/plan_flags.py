"""The flags of pretrain_early_exit_gpt.py that choose a plan."""

from shlex import quote

from megatron.early_exit.planner.command_line.layout_notation import LAYOUT_FLAG, layout_text
from megatron.early_exit.planner.costs.layout import Layout
from megatron.early_exit.planner.costs.training_options import FP8, Recompute
from megatron.early_exit.planner.search.plans import Plan
from megatron.early_exit.planner.search.request import PlanRequest

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
    words += _expert_words(layout) if one.shape.experts else []
    words += ["--pipeline-model-parallel-size", layout.num_ranks]
    if not layout.is_even:
        words += [LAYOUT_FLAG, layout_text(layout.layers_per_stage)]
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
    words += _fp8_words(one.options.fp8)
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


def one_flag_a_line(words: list[str]) -> str:
    """Words of a command line as its last lines."""
    lines: list[str] = []
    for word in words:
        if word.startswith("--"):
            lines.append(f"    {word}")
        else:
            lines[-1] += f" {quote(word)}"
    return " \\\n".join(lines)


def _expert_words(layout: Layout) -> list[object]:
    """Flags with which experts are divided, sent their tokens, and computed as plans have it."""
    return [
        *("--expert-model-parallel-size", layout.expert_parallel),
        *("--expert-tensor-parallel-size", layout.expert_tensor_parallel),
        *("--moe-token-dispatcher-type", "alltoall", "--moe-grouped-gemm"),
    ]


def _fp8_words(fp8: FP8 | None) -> list[object]:
    """Flags of products in FP8, if there are any."""
    if fp8 is None:
        return []
    words: list[object] = ["--fp8-format", fp8.format, "--fp8-recipe", fp8.recipe]
    return [*words, *["--fp8-param-gather"] * fp8.param_gather]
