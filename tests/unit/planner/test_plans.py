"""Plans: nothing faster is missed, nothing that does not fit is offered, replicas are not free."""

import time
from dataclasses import replace

import pytest

from megatron.early_exit.config import EarlyExitConfig
from megatron.early_exit.planner.command_line.model_flags import placements
from megatron.early_exit.planner.costs.cost_model import CostModel, StageCost
from megatron.early_exit.planner.costs.hardware import ACCELERATORS
from megatron.early_exit.planner.costs.model_shape import ModelShape
from megatron.early_exit.planner.costs.training_options import TrainingOptions
from megatron.early_exit.planner.named_models import NAMED_MODELS
from megatron.early_exit.planner.search.candidates import Candidate, candidates
from megatron.early_exit.planner.search.filling import FillRequest, fill_bubbles
from megatron.early_exit.planner.search.plans import Plan, find_plans
from megatron.early_exit.planner.search.prediction import Costing, Fills
from megatron.early_exit.planner.search.request import PlanRequest

A100 = ACCELERATORS["a100-80gb"]
SMALL = ModelShape.llama(
    num_layers=12,
    hidden_size=1024,
    ffn_hidden_size=2752,
    num_attention_heads=16,
    num_query_groups=4,
    vocab_size=32000,
    seq_length=1024,
)


def request_of(shape: ModelShape, exits: EarlyExitConfig, gpus: int, batch: int, **more):
    return PlanRequest(
        shape=shape,
        placements=placements(exits, shape.num_layers),
        accelerator=A100,
        num_accelerators=gpus,
        global_batch_size=batch,
        **{"memory_limit_bytes": 72e9, "pass_overhead_s": 5e-5, **more},
    )


GATED = EarlyExitConfig(exit_layer_nums=(3, 6), use_exit_gate=True)
SMALL_REQUEST = request_of(
    SMALL, EarlyExitConfig(exit_layer_nums=(3, 6)), gpus=8, batch=32, memory_limit_bytes=5e9
)


def named_request(name: str, gpus: int, **more) -> PlanRequest:
    model = NAMED_MODELS[name]
    return request_of(model.shape, model.exits, gpus, model.global_batch_size, **more)


def _is_even(costing: Costing) -> bool:
    return costing.candidate.layout.is_even


@pytest.fixture(scope="module")
def every_costing() -> list[Costing]:
    return [Costing.of(one, SMALL_REQUEST) for one in candidates(SMALL_REQUEST)]


def test_layouts_divide_what_they_have_to(every_costing):
    layouts = {
        (c.candidate.layout.tensor_parallel, c.candidate.layout.num_ranks, c.candidate.num_chunks)
        for c in every_costing
    }
    # 4 key-value heads keep tensor parallelism to 4; 3, 6 and 12 stages do not divide 8 GPUs.
    assert {(t, p) for t, p, _ in layouts} == {
        (t, p) for t in (1, 2, 4) for p in (1, 2, 4, 8) if t * p <= 8
    }
    assert {v for _, p, v in layouts if p == 4} == {1, 3}
    # 8 stages cannot have as many layers each.
    uneven = {c.candidate.layout.num_ranks for c in every_costing if not _is_even(c)}
    assert 8 in uneven
    assert all(_is_even(c) for c in every_costing if c.candidate.layout.num_ranks == 1)
    for costing in every_costing:
        one, layout = costing.candidate, costing.candidate.layout
        gpus = layout.tensor_parallel * layout.num_ranks * layout.data_parallel
        assert gpus == 8
        assert layout.data_parallel * layout.microbatch_size * one.num_microbatches == 32
        assert sum(layout.layers_per_stage) == 12
        assert one.shape.vocab_size % (128 * layout.tensor_parallel) == 0


def test_bounds_are_bounds(every_costing):
    for costing in every_costing:
        prediction = costing.predict(Fills())
        assert costing.least_step_s <= prediction.step_s * (1 + 1e-9)
        assert costing.least_bytes <= prediction.peak_bytes * (1 + 1e-9)
    # And good ones, or nothing would be ruled out by them.
    tightest = min(every_costing, key=lambda costing: costing.predict(Fills()).step_s)
    assert tightest.least_step_s > 0.97 * tightest.predict(Fills()).step_s


@pytest.mark.parametrize("every_variant", [True, False])
def test_search_finds_what_trying_all_finds(every_costing, every_variant):
    best: dict[object, float] = {}
    for costing in every_costing:
        prediction, layout = costing.predict(Fills()), costing.candidate.layout
        if prediction.peak_bytes <= SMALL_REQUEST.memory_limit_bytes:
            # Layouts that cost the same are the same.
            key = (layout.tensor_parallel, layout.num_ranks)
            if every_variant:
                one = costing.candidate
                key = (one.num_chunks, one.num_microbatches, costing.costs, costing.update)
            best[key] = min(prediction.step_s, best.get(key, prediction.step_s))
    plans = find_plans(SMALL_REQUEST, 6, every_variant)
    found = [plan.prediction.step_s for plan in plans.best]
    assert found == pytest.approx(sorted(best.values())[:6])
    assert all(plan.prediction.peak_bytes <= 5e9 for plan in plans.best)
    assert plans.num_simulated < plans.num_fitting <= plans.num_candidates


def test_what_is_given_is_kept():
    request = replace(
        SMALL_REQUEST, tensor_parallel=2, pipeline_parallel=2, num_chunks=3, microbatch_size=2
    )
    (plan,) = find_plans(request, 5).best
    one, layout = plan.costing.candidate, plan.costing.candidate.layout
    assert (layout.tensor_parallel, layout.num_ranks, layout.data_parallel) == (2, 2, 2)
    assert (one.num_chunks, layout.microbatch_size) == (3, 2)
    # Two exits and the head are on the second rank: even stages are slower.
    assert layout.layers_per_stage != (2,) * 6
    assert (len(layout.layers_per_stage), sum(layout.layers_per_stage)) == (6, 12)


def test_gates_have_the_pipelines_and_fills_that_exits_have_without():
    request = replace(SMALL_REQUEST, pipeline_parallel=4, num_chunks=1)
    found = []
    for kinds in ((GATED,), request.placements):
        plans = find_plans(replace(request, placements=kinds), 2).best
        assert {plan.costing.candidate.layout.num_ranks for plan in plans} == {4}
        found.append([plan.fills for plan in fill_bubbles(plans, FillRequest(), 72e9)])
    assert found[0] == found[1]
    assert all(fills.num_warmup for fills in found[0])


def test_placement_is_searched():
    """In the paper's layout of its smallest model, the exits belong before the next stage."""
    request = named_request(
        "1.3b", 64, tensor_parallel=1, pipeline_parallel=4, microbatch_size=4, num_chunks=1
    )
    plans = find_plans(request, 4, every_variant=True).best
    peak = {plan.costing.candidate.exits.pre_exit: plan.prediction.peak_bytes for plan in plans}
    assert peak[True] < peak[False]


def test_a_large_cluster_is_planned_in_seconds():
    begin = time.monotonic()
    plans = find_plans(named_request("175b", 4096), 10)
    assert time.monotonic() - begin < 30
    best = plans.best[0].costing.candidate.layout
    # Only tensor parallelism over a node leaves microbatches enough for the stages.
    assert best.tensor_parallel == 8
    assert best.num_ranks > 1
    assert plans.best[0].prediction.step_s < plans.best[-1].prediction.step_s


# --- filling -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def four_stages() -> Plan:
    given = {"tensor_parallel": 2, "pipeline_parallel": 4, "num_chunks": 1, "microbatch_size": 1}
    options = TrainingOptions(overlaps_messages=True)
    return find_plans(named_request("30b", 64, **given, options=options), 1).best[0]


def test_fills_that_cost_little_are_put_in(four_stages):
    (filled,) = fill_bubbles([four_stages], FillRequest(backward_forward_ratio=2.0), 72e9)
    assert (filled.fills.num_warmup, filled.fills.num_cooldown) == (2, 2)
    assert 0 <= filled.fill_cost <= 0.01
    assert filled.prediction.pipeline.bubble_fraction < (
        four_stages.prediction.pipeline.bubble_fraction
    )


def test_fills_keep_to_cost_and_memory(four_stages):
    (dear,) = fill_bubbles([four_stages], FillRequest(num_warmup=2, num_cooldown=2), 72e9)
    assert dear.fill_cost > 0
    half = FillRequest(most_cost=dear.fill_cost / 2, backward_forward_ratio=2.0)
    (cheap,) = fill_bubbles([four_stages], half, 72e9)
    assert cheap.fills.number < 4
    # Fills of the warm-up come on top of the activations in flight.
    tight = four_stages.prediction.peak_bytes * (1 + 1e-6)
    (small,) = fill_bubbles([four_stages], FillRequest(num_cooldown=2), tight)
    assert (small.fills.num_warmup, small.fills.num_cooldown) == (0, 2)


def test_fills_need_exits_that_they_reach():
    request = replace(
        named_request("30b", 64, tensor_parallel=2, pipeline_parallel=4, num_chunks=1),
        placements=(EarlyExitConfig(),),
    )
    best = find_plans(request, 1).best
    (filled,) = fill_bubbles(best, FillRequest(backward_forward_ratio=2.0), 72e9)
    assert (filled.fills.num_warmup, filled.fills.num_cooldown) == (0, 2)


def test_fills_that_fit_follow_from_the_costs_of_the_stages(four_stages):
    costs = four_stages.costing.costs
    forward_s = sum(stage.forward_s for stage in costs.stages)
    derived = sum(stage.backward_s for stage in costs.stages) / forward_s
    assert costs.backward_forward_ratio == pytest.approx(derived)
    # Exits run forward and backward in the backward of their stages.
    without_exit, with_exit = (costs.stages[stage].backward_forward_ratio for stage in (2, 1))
    assert 1.5 < without_exit < 2 < with_exit
    (filled,) = fill_bubbles([four_stages], FillRequest(), 72e9)
    assert filled.fills.backward_forward_ratio == pytest.approx(derived, abs=0.005)
    for ratio, fills in ((1.5, 1), (2.0, 2)):
        scaled = replace(four_stages.costing, costs=_with_ratio(costs, ratio))
        fitting = scaled.fitting_fills()
        assert (fitting.num_warmup, fitting.num_cooldown) == (fills, fills)


def _with_ratio(costs: CostModel, ratio: float) -> CostModel:
    stages = tuple(
        StageCost(forward_s=one.forward_s, backward_s=ratio * one.forward_s) for one in costs.stages
    )
    return replace(costs, stages=stages)


@pytest.mark.parametrize(
    ("fills", "limit", "message"),
    [
        (
            FillRequest(num_warmup=9),
            72e9,
            "--num-fill-warmup-microbatches 9 is out of range, allowed: 0 to",
        ),
        (
            FillRequest(num_warmup=2, num_cooldown=2),
            1e9,
            r"--fill-explicit-bubbles takes .* GB with so many microbatches, allowed: 1.0 GB",
        ),
        (
            FillRequest(backward_forward_ratio=0),
            72e9,
            "--backward-forward-ratio 0 is out of range, allowed: 0.01 to 100",
        ),
    ],
)
def test_fills_without_room_are_refused(four_stages, fills, limit, message):
    with pytest.raises(ValueError, match=message):
        fill_bubbles([four_stages], fills, limit)


# --- what cannot be planned ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"shape": replace(NAMED_MODELS["7b"].shape, num_layers=10**9)},
            "--num-layers 1000000000 is out of range, allowed: 1 to 4096",
        ),
        ({"num_accelerators": 0}, "--gpus 0 is out of range, allowed: 1 to 1048576"),
        ({"achieved_share": 0}, "--achieved-share 0 is out of range, allowed: above 0, up to 1"),
        ({"pass_overhead_s": -1e-6}, "--pass-overhead-us -1.0 is out of range, allowed: 0 or more"),
        (
            {"tensor_parallel": 3},
            "--tensor-model-parallel-size 3 is out of range, allowed: divisors of a node's 8 GPUs, "
            "of --num-attention-heads 16, --num-query-groups 4",
        ),
        (
            {"pipeline_parallel": 13},
            "--pipeline-model-parallel-size 13 is out of range, allowed: 1 to --num-layers 12",
        ),
        (
            {"pipeline_parallel": 3},
            "--gpus 8 cannot be divided into pipelines, allowed: multiples of tensor times "
            "pipeline parallelism, here 3, 6, 12",
        ),
        (
            {"global_batch_size": 7, "pipeline_parallel": 1},
            "--global-batch-size 7 cannot be divided over replicas, allowed: multiples of their "
            "number, with 8 GPUs 2, 4, 8",
        ),
        ({"microbatch_size": 3}, "--micro-batch-size 3 is out of range, allowed: divisors of"),
        (
            {"num_chunks": 7},
            "--num-virtual-stages-per-pipeline-rank 7 is out of range, allowed: 1, or up to the "
            "layers of a rank",
        ),
        (
            {"memory_limit_bytes": 1e9, "num_accelerators": 1},
            r"none of \d+ layouts of 1 GPUs fits into 1.0 GB each: one of the smallest, tensor 1 x "
            r"pipeline 1 x data 1 parallel with microbatches of 1, takes \d.\d GB",
        ),
        (
            {"placements": (EarlyExitConfig(exit_layer_nums=(13,)),)},
            "--exit-layer-nums 13 is out of range, allowed: 1 to 12",
        ),
    ],
)
def test_what_cannot_be_planned_is_explained(changes, message):
    with pytest.raises(ValueError, match=message):
        find_plans(replace(SMALL_REQUEST, **changes), 3)


@pytest.mark.parametrize(
    ("exits", "placed_before"),
    [
        (EarlyExitConfig(exit_layer_nums=(3, 6)), [False, True]),
        (EarlyExitConfig(exit_layer_nums=(4, 7), pre_exit=True), [False, True]),
        (EarlyExitConfig(exit_layer_nums=(3,), use_exit_mlp=True), [False]),
        (EarlyExitConfig(exit_layer_nums=(3, 12)), [False]),
        (EarlyExitConfig(), [False]),
    ],
)
def test_exits_have_the_placements_that_they_can_have(exits, placed_before):
    found = placements(exits, 12)
    assert [one.pre_exit for one in found] == placed_before
    assert {one.positions for one in found} == {exits.positions}


def test_interleaved_candidates_have_their_own_schedule():
    one = next(c for c in candidates(SMALL_REQUEST) if c.num_chunks == 3)
    assert isinstance(one, Candidate)
    schedule = Costing.of(one, SMALL_REQUEST).generator(2 * one.layout.num_ranks, Fills()).build()
    assert schedule.num_stages == 3 * one.layout.num_ranks


def test_long_sequences_are_shared():
    long = replace(SMALL, seq_length=131072)
    fixed = {"tensor_parallel": 4, "pipeline_parallel": 1, "microbatch_size": 1}
    request = request_of(long, EarlyExitConfig(), gpus=32, batch=8, **fixed, context_parallel=None)
    request = replace(request, memory_limit_bytes=5e9)
    (plan,) = find_plans(request, 1).best
    assert plan.costing.candidate.layout.context_parallel in (2, 4, 8)
    assert request.context_sizes == [1, 2, 4, 8, 16]
    with pytest.raises(ValueError, match="or --recompute-granularity full") as refused:
        find_plans(replace(request, context_parallel=1), 1)
    assert "--context-parallel-size above 1" in str(refused.value)
    assert replace(request, shape=SMALL).context_sizes == [1]
