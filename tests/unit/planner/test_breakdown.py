"""What a step and the memory of ranks consist of: all of it, and each kind where it belongs."""

from dataclasses import replace

import pytest

from megatron.early_exit.planner.command_line.model_flags import placements
from megatron.early_exit.planner.costs.hardware import ACCELERATORS
from megatron.early_exit.planner.named_models import NAMED_MODELS
from megatron.early_exit.planner.search.breakdown import memory_parts, step_parts
from megatron.early_exit.planner.search.filling import FillRequest, fill_bubbles
from megatron.early_exit.planner.search.plans import Plan, find_plans
from megatron.early_exit.planner.search.request import PlanRequest

GIVEN = {"pipeline_parallel": 4, "tensor_parallel": 2, "num_chunks": 1, "microbatch_size": 2}


def request_of(**more) -> PlanRequest:
    model = NAMED_MODELS["30b"]
    settings = {
        "shape": model.shape,
        "placements": placements(model.exits, model.shape.num_layers)[:1],
        "accelerator": ACCELERATORS["a100-80gb"],
        "num_accelerators": 64,
        "global_batch_size": 512,
        "memory_limit_bytes": 72e9,
        "pass_overhead_s": 5e-5,
        **GIVEN,
        **more,
    }
    return PlanRequest(**settings)


def plan_of(request: PlanRequest) -> Plan:
    return find_plans(request, 1).best[0]


@pytest.fixture(scope="module")
def plain() -> tuple[Plan, PlanRequest]:
    request = request_of()
    return plan_of(request), request


def test_parts_are_the_whole_step(plain):
    plan, request = plain
    parts = step_parts(plan, request)
    assert sum(parts.values()) == pytest.approx(plan.prediction.step_s, rel=1e-6)
    pipeline = plan.prediction.pipeline
    assert parts["bubbles"] == pytest.approx(pipeline.bubble_fraction * pipeline.step_s)
    # Both exits' logits take as long as two final heads, but for their norms.
    assert parts["exits"] == pytest.approx(2 * parts["head"], rel=0.1)
    assert "fills" not in parts
    assert "recomputation" not in parts
    assert max(parts, key=parts.__getitem__) == "products"


def test_kinds_are_there_where_what_takes_them_is(plain):
    plan, request = plain
    parts = step_parts(plan, request)
    quick = replace(request.accelerator, memory_bytes_per_s=1e30)
    no_memory = request_of(accelerator=quick)
    assert "memory_bound" not in step_parts(plan_of(no_memory), no_memory)
    again = request_of(recomputes=("full",))
    found = step_parts(plan_of(again), again)
    # A forward of the three that forward and backward are.
    share = found["recomputation"] / (parts["products"] + parts["memory_bound"])
    assert 0.3 < share < 0.45
    sizes = {"num_accelerators": 8, "tensor_parallel": 1, "pipeline_parallel": 8}
    alone = request_of(**sizes, memory_limit_bytes=1e12)
    lonely = step_parts(plan_of(alone), alone)
    # Neither partners nor replicas.
    assert not {"exchanges", "weights", "gradients", "slowest_node"} & set(lonely)
    assert {"optimizer", "fixed", "passes"} <= set(lonely)


def test_fills_are_more_than_the_full_microbatches(plain):
    plan, request = plain
    (filled,) = fill_bubbles([plan], FillRequest(backward_forward_ratio=2.0), 1e12)
    assert filled.fills.number == 4
    parts = step_parts(filled, request)
    assert sum(parts.values()) == pytest.approx(filled.prediction.step_s, rel=1e-6)
    before = step_parts(plan, request)
    longer_s = filled.prediction.pipeline.step_s - plan.prediction.pipeline.step_s
    assert parts["fills"] == pytest.approx(before["bubbles"] - parts["bubbles"] + longer_s)
    assert parts["fills"] > 0.5 * before["bubbles"]


def test_memory_of_all_kinds_is_the_peak(plain):
    plan, request = plain
    found = memory_parts(plan)
    for parts, peak in zip(found, plan.prediction.pipeline.peak_bytes, strict=True):
        assert sum(parts.values()) == pytest.approx(peak)
        # fp32 gradients, and Adam's states over eight replicas.
        assert parts["gradients"] == pytest.approx(2 * parts["weights"])
        assert parts["optimizer"] == pytest.approx(12 / 8 * parts["weights"] / 2)
        assert parts["temporary"] >= 0
    # A rank keeps the activations of as many microbatches as there are ranks behind it and itself.
    assert found[0]["activations"] == pytest.approx(4 / 2 * found[2]["activations"], rel=1e-6)
    # Deferred exits keep nothing, but need their logits for a while.
    assert found[1]["temporary"] > found[2]["temporary"] == 0
    halved = replace(request, options=replace(request.options, gradient_bytes=2))
    one = memory_parts(plan_of(halved))[0]
    assert one["gradients"] == pytest.approx(one["weights"])
