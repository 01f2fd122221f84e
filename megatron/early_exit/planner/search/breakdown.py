"""What the time of a planned step consists of, and the memory of each rank at its peak.

Seconds are means over the ranks of the pipeline, so that those of all kinds add up to the step.
"""

from dataclasses import replace

from megatron.early_exit.planner.costs.model_costs import part_seconds
from megatron.early_exit.planner.costs.update import Update
from megatron.early_exit.planner.costs.weight_memory import weight_memory
from megatron.early_exit.planner.search.plans import Plan
from megatron.early_exit.planner.search.request import PlanRequest

# Of a memory that never keeps a computation waiting.
_UNLIMITED_BYTES_PER_S = 1e30

TIME_KINDS = {
    "products": "matrix products and attention of the layers",
    "memory_bound": "norms, activations and operands of the layers, at memory bandwidth",
    "layers": "layers, as measured",
    "embedding": "embedding",
    "head": "final head and its loss",
    "exits": "exits and their losses",
    "recomputation": "layers computed again",
    "exchanges": "exchanges of tensor, context and expert parallelism that nothing hides",
    "passes": "starts of passes, and messages between stages that nothing hides",
    "fills": "fills",
    "bubbles": "bubbles",
    "gradients": "gradients summed over replicas and stages, what nothing hides",
    "optimizer": "update of the weights",
    "weights": "weights gathered from replicas, what nothing hides",
    "fixed": "batch, norm and log of the step",
    "slowest_node": "waiting for the slowest node",
}
"""The kinds of time in the order of a table, and what they are."""

MEMORY_KINDS = ("weights", "gradients", "optimizer", "activations", "temporary")
"""The kinds of memory: weights in bf16 with copies in FP8, their gradients, the states of Adam
(arXiv 1412.6980) with weights in fp32, activations that wait for their backward, and what only the
pass at the peak needs."""


def step_parts(plan: Plan, request: PlanRequest) -> dict[str, float]:
    """Seconds of each kind that takes any; they add up to the step, but for rounding.

    Args:
        plan: whose step it is.
        request: that it answers.
    """
    one, pipeline = plan.costing.candidate, plan.prediction.pipeline
    num_ranks, parts = len(pipeline.ranks), dict.fromkeys(TIME_KINDS, 0.0)
    for kind, seconds in _microbatch_parts(plan, request).items():
        parts[kind] = seconds * one.num_microbatches / num_ranks
    busy_s = sum(rank.busy_s for rank in pipeline.ranks) / num_ranks
    parts["fills"] = busy_s - sum(parts.values())
    parts["bubbles"] = pipeline.step_s - busy_s
    parts |= _update_parts(plan)
    # What remains of a difference by rounding is nothing.
    return {kind: s for kind, s in parts.items() if s > 1e-9 * plan.prediction.step_s}


def _microbatch_parts(plan: Plan, request: PlanRequest) -> dict[str, float]:
    """Seconds of both passes of a microbatch through all stages."""
    one = plan.costing.candidate
    given = one.shape, one.exits, one.layout, one.options
    times = request.times(*given)
    of = part_seconds(one.shape, one.layout, request.accelerator, one.exits, times, one.options)
    num_layers, num_exits = one.shape.num_layers, len(one.exits.positions)
    exit_waits_s = of.waits_s * one.exits.use_exit_block
    layers_s = num_layers * (of.layer_s - of.waits_s - of.again_s)
    parts = {
        "recomputation": num_layers * of.again_s,
        "exchanges": num_layers * of.waits_s + num_exits * exit_waits_s,
        "embedding": of.embedding_s,
        "head": of.head_s,
        "exits": num_exits * (of.exit_s - exit_waits_s),
    }
    if request.profile is None:
        quick = replace(request.accelerator, memory_bytes_per_s=_UNLIMITED_BYTES_PER_S)
        size = one.layout.microbatch_size
        time = replace(request, accelerator=quick).times(*given).time("layer", size)
        parts["products"] = num_layers * (time.forward_s + time.backward_s)
        parts["memory_bound"] = layers_s - parts["products"]
    else:
        parts["layers"] = layers_s
    whole_s = sum(stage.forward_s + stage.backward_s for stage in plan.costing.costs.stages)
    parts["passes"] = whole_s - sum(parts.values())
    return parts


def _update_parts(plan: Plan) -> dict[str, float]:
    """What each part of the update adds to the step, as what leaving it out saves."""
    costing, ranks = plan.costing, plan.prediction.pipeline.ranks
    starts, ends = [rank.start_s for rank in ranks], [rank.end_s for rank in ranks]

    def step_s(update: Update) -> float:
        return update.step_s(costing.costs, starts, ends, costing.overlap)

    update = costing.update
    none = (0.0,) * len(ranks)
    parts, before_s = {}, step_s(update)
    for kind, left_out in (
        ("slowest_node", {"slowdown": 1.0}),
        ("fixed", {"fixed_s": 0.0}),
        ("weights", {"gather_s": none}),
        ("optimizer", {"optimizer_s": none}),
        ("gradients", {"embedding_s": 0.0, "reduce_s": (0.0,) * len(update.reduce_s)}),
    ):
        update = replace(update, **left_out)
        after_s = step_s(update)
        parts[kind], before_s = before_s - after_s, after_s
    return parts


def memory_parts(plan: Plan) -> list[dict[str, float]]:
    """Bytes of each of `MEMORY_KINDS` on each rank when it takes the most."""
    one = plan.costing.candidate
    of_stages = weight_memory(one.shape, one.layout, one.exits, one.options)
    found = []
    for number, rank in enumerate(plan.prediction.pipeline.ranks):
        own = of_stages[number :: one.layout.num_ranks]
        static_bytes = sum(stage.all for stage in own)
        sizes = (
            sum(stage.weights for stage in own),
            sum(stage.gradients for stage in own),
            sum(stage.optimizer for stage in own),
            rank.kept_bytes,
            rank.peak_bytes - static_bytes - rank.kept_bytes,
        )
        found.append(dict(zip(MEMORY_KINDS, sizes, strict=True)))
    return found
