"""Schedules in time: the closed formulas of the papers, memory, and the critical path."""

import subprocess
import sys
from itertools import pairwise

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron.early_exit.planner.costs.cost_model import CostModel, StageCost
from megatron.early_exit.planner.simulation.simulator import simulate
from megatron.early_exit.schedules.communication import with_communication
from megatron.early_exit.schedules.data_flow import data_source
from megatron.early_exit.schedules.generators import (
    FilledOneFOneB,
    Interleaved,
    OneFOneB,
    Tuning,
    ZeroBubbleH1,
)
from megatron.early_exit.schedules.schedule import Schedule
from tests.helpers.pipeline_schedules import (
    filled,
    generators,
    interleaved,
    num_microbatches,
    num_ranks,
)
from tests.helpers.speed import patient

seconds = st.floats(0.1, 10)


def plain_of(generator: FilledOneFOneB) -> Schedule:
    return OneFOneB(
        num_ranks=generator.num_ranks, num_microbatches=generator.num_microbatches
    ).build()


@st.composite
def uneven_costs(draw: st.DrawFn, num_stages: int) -> CostModel:
    """Stages that take up to three times as long as others, and transfers between them."""
    share = st.floats(1.0, 3.0)
    stages = []
    for _ in range(num_stages):
        backward = draw(share) * 2
        stages.append(
            StageCost(
                forward_s=draw(share),
                backward_s=backward,
                weight_gradient_s=backward * draw(st.floats(0, 1)),
                local_backward_s=draw(share),
            )
        )
    transfers = tuple(draw(st.floats(0, 0.3)) for _ in range(num_stages - 1))
    return CostModel(stages=tuple(stages), transfer_s=transfers)


# --- step time ---------------------------------------------------------------------------------


@settings(max_examples=50)
@given(num_ranks, num_microbatches, seconds, seconds)
def test_1f1b_takes_what_its_formula_says(ranks, microbatches, forward, backward):
    """(m + p - 1) (f + b), of which (p - 1) / (m + p - 1) is bubble."""
    schedule = OneFOneB(num_ranks=ranks, num_microbatches=microbatches).build()
    timeline = simulate(schedule, CostModel.even(ranks, forward, backward))
    rounds = microbatches + ranks - 1
    assert timeline.step_s == pytest.approx(rounds * (forward + backward))
    assert timeline.bubble_fraction == pytest.approx((ranks - 1) / rounds, abs=1e-9)


@settings(max_examples=30)
@given(interleaved(), seconds, seconds)
def test_interleaving_divides_the_bubble_by_the_chunks(generator, forward, backward):
    """Idle for (p - 1) (f + b) / v, with f and b of all v chunks (arXiv 2104.04473)."""
    num_stages = generator.num_ranks * generator.num_chunks
    costs = CostModel.even(num_stages, forward, backward)
    timeline = simulate(generator.build(), costs)
    bubble = (generator.num_ranks - 1) * (forward + backward)
    work = generator.num_microbatches * generator.num_chunks * (forward + backward)
    assert timeline.step_s == pytest.approx(work + bubble)


@settings(max_examples=50)
@given(num_ranks, num_microbatches, seconds, seconds, seconds)
def test_zero_bubble_h1_has_the_bubble_of_its_formula(ranks, microbatches, f, i, w):
    """Idle for (p - 1) (f + i - w), where weight gradients take no longer than the others
    (arXiv 2401.10241, section 2)."""
    w = min(f, i, w)
    assume(microbatches >= ranks)
    schedule = ZeroBubbleH1(num_ranks=ranks, num_microbatches=microbatches).build()
    timeline = simulate(schedule, CostModel.even(ranks, f, i + w, weight_gradient_s=w))
    assert timeline.step_s == pytest.approx(microbatches * (f + i + w) + (ranks - 1) * (f + i - w))


@pytest.mark.parametrize("exit_stages", [{0}, {1}, {0, 2}])
def test_tuning_runs_to_the_last_exit_only(exit_stages):
    schedule = Tuning(num_ranks=4, num_microbatches=5, exit_stages=frozenset(exit_stages)).build()
    stage = StageCost(forward_s=2, backward_s=4, local_backward_s=1)
    timeline = simulate(schedule, CostModel(stages=(stage,) * 4, transfer_s=(0.5,) * 3))
    depth = max(exit_stages)
    # The first microbatch's way to the last exit, with what the exits on the way make it wait.
    assert timeline.step_s == pytest.approx(depth * 2.5 + 5 * 3)
    assert timeline.busy_s[depth + 1 :] == (0,) * (3 - depth)


# --- filling -----------------------------------------------------------------------------------


@settings(max_examples=60)
@given(filled())
def test_filling_costs_no_time_where_stages_are_even(generator):
    """Whatever the number of fills and microbatches, and the ratio."""
    costs = CostModel.even(generator.num_ranks, 1.0, generator.backward_forward_ratio)
    plain = simulate(plain_of(generator), costs)
    # The depth of a pass is taken from the ratio to four digits.
    assert simulate(generator.build(), costs).step_s <= plain.step_s * (1 + 1e-3)


@pytest.mark.parametrize("ranks", range(2, 17))
@pytest.mark.parametrize("transfer", [0.0, 0.05, 0.1])
def test_filling_costs_at_most_a_hundredth_with_transfers(ranks, transfer):
    """Transfers of up to a tenth of a forward, the shortest sensible step, all fills."""
    generator = FilledOneFOneB(num_ranks=ranks, num_microbatches=ranks, backward_forward_ratio=2.0)
    costs = CostModel.even(ranks, 1.0, 2.0, transfer_s=transfer)
    plain = simulate(plain_of(generator), costs).step_s
    assert simulate(generator.build(), costs).step_s <= 1.01 * plain


@settings(max_examples=40)
@given(st.data(), filled())
def test_filling_uneven_stages_costs_at_most_what_the_fills_take_one_by_one(data, generator):
    """The formula is for even stages; else a fill may hold up one stage after the other."""
    costs = data.draw(uneven_costs(generator.num_ranks))
    plain = simulate(plain_of(generator), costs)
    filled = simulate(generator.build(), costs)
    fills = generator.num_warmup_fills + generator.num_cooldown_fills
    own_s = sum(filled.busy_s) - sum(plain.busy_s) + 2 * fills * sum(costs.transfer_s)
    assert plain.step_s - 1e-9 <= filled.step_s <= plain.step_s + own_s + 1e-9


def test_filled_bubbles_are_smaller():
    generator = FilledOneFOneB(num_ranks=8, num_microbatches=16, backward_forward_ratio=2.0)
    costs = CostModel.even(8, 1, 2)
    before = simulate(plain_of(generator), costs).bubble_fraction
    assert simulate(generator.build(), costs).bubble_fraction < 0.6 * before


# --- any schedule, any costs -------------------------------------------------------------------


@settings(max_examples=40)
@given(st.data(), generators)
def test_timeline_keeps_order_and_waits_for_data(data, generator):
    schedule = generator.build()
    # Those of stages that have nothing to do in EE-Tuning are there, too.
    num_stages = max(schedule.num_stages, generator.num_ranks)
    costs = data.draw(uneven_costs(num_stages))
    timeline = simulate(schedule, costs)
    timed = {one.action: one for rank in timeline.ranks for one in rank}
    assert [tuple(one.action for one in rank) for rank in timeline.ranks] == list(schedule.ranks)
    for rank in timeline.ranks:
        assert all(first.end_s <= second.start_s for first, second in pairwise(rank))
    for action, one in timed.items():
        if source := data_source(action, schedule.actions):
            transfer = costs.transfer_s[min(source.stage, action.stage)]
            assert one.start_s >= timed[source].end_s + transfer
    busy, idle = timeline.busy_s, timeline.idle_s
    assert all(b + i == pytest.approx(timeline.step_s) for b, i in zip(busy, idle, strict=True))
    assert min(idle) >= -1e-9


@settings(max_examples=40)
@given(st.data(), generators)
def test_critical_path_takes_the_whole_step(data, generator):
    schedule = generator.build()
    costs = data.draw(uneven_costs(max(schedule.num_stages, generator.num_ranks)))
    timeline = simulate(schedule, costs)
    timed = {one.action: one for rank in timeline.ranks for one in rank}
    path = timeline.critical_path
    assert timed[path[0]].start_s == 0
    assert timed[path[-1]].end_s == timeline.step_s
    for first, second in pairwise(path):
        gap = timed[second].start_s - timed[first].end_s
        same_stage = schedule.rank_of(first.stage) == schedule.rank_of(second.stage)
        boundary = min(first.stage, second.stage)
        assert gap == pytest.approx(0 if same_stage else costs.transfer_s[boundary], abs=1e-9)


def test_explicit_messages_change_nothing():
    schedule = Interleaved(num_ranks=4, num_microbatches=8, num_chunks=2).build()
    costs = CostModel.even(8, 1, 2, transfer_s=0.1)
    assert simulate(with_communication(schedule), costs) == simulate(schedule, costs)


# --- memory ------------------------------------------------------------------------------------


def test_peak_memory_of_1f1b():
    stage = StageCost(
        forward_s=1,
        backward_s=2,
        static_bytes=100,
        activation_bytes=10,
        forward_extra_bytes=1,
        backward_extra_bytes=4,
    )
    costs = CostModel(stages=(stage,) * 3, transfer_s=(0, 0))
    schedule = OneFOneB(num_ranks=3, num_microbatches=5).build()
    # As many microbatches as stages from here on, and the larger need of a backward.
    assert simulate(schedule, costs).peak_bytes == (134, 124, 114)


def test_passes_that_only_run_forward_keep_nothing():
    stage = StageCost(forward_s=1, backward_s=2, activation_bytes=10)
    costs = CostModel(stages=(stage,) * 4, transfer_s=(0,) * 3)
    plain = simulate(OneFOneB(num_ranks=4, num_microbatches=6).build(), costs)
    options = {"num_ranks": 4, "num_microbatches": 6, "backward_forward_ratio": 2.0}
    cooldown = FilledOneFOneB(**options, num_warmup_fills=0)
    assert simulate(cooldown.build(), costs).peak_bytes == plain.peak_bytes
    warmup = FilledOneFOneB(**options, num_cooldown_fills=0)
    assert simulate(warmup.build(), costs).peak_bytes == (60, 40, 20, 10)


def test_weight_gradients_keep_their_part():
    stage = StageCost(
        forward_s=1,
        backward_s=2,
        weight_gradient_s=1,
        activation_bytes=10,
        weight_gradient_bytes=4,
    )
    costs = CostModel(stages=(stage,) * 3, transfer_s=(0, 0))
    schedule = ZeroBubbleH1(num_ranks=3, num_microbatches=9).build()
    # Stage s puts off s weight gradients, and is that many full microbatches lighter than stage 0.
    assert simulate(schedule, costs).peak_bytes == (30, 24, 18)


def test_chunks_of_a_rank_share_its_memory():
    stages = tuple(
        StageCost(forward_s=1, backward_s=2, static_bytes=size) for size in (1, 10, 100, 1000)
    )
    schedule = Interleaved(num_ranks=2, num_microbatches=2, num_chunks=2).build()
    timeline = simulate(schedule, CostModel(stages=stages, transfer_s=(0,) * 3))
    assert timeline.peak_bytes == (101, 1010)


# --- what is refused ---------------------------------------------------------------------------


def test_costs_have_to_fit_the_schedule():
    schedule = OneFOneB(num_ranks=4, num_microbatches=2).build()
    with pytest.raises(ValueError, match="costs of 3 stages for a schedule of 4 stages on 4 ranks"):
        simulate(schedule, CostModel.even(3, 1, 2))
    with pytest.raises(ValueError, match="1 transfers for 3 stages, allowed: one fewer"):
        CostModel(stages=(StageCost(forward_s=1, backward_s=2),) * 3, transfer_s=(0,))


def test_schedules_that_cannot_run_are_not_timed():
    schedule = Schedule.from_csv("0F0,0B0,0F1,0B1\n1F0,1F1,1B0,1B1\n")
    with pytest.raises(ValueError, match="0B0 waits for ever"):
        simulate(schedule, CostModel.even(2, 1, 2))


def test_planning_needs_neither_torch_nor_matplotlib():
    code = (
        "import sys\n"
        "import megatron.early_exit.planner.drawing.picture\n"
        "import megatron.early_exit.planner.costs.model_costs\n"
        "import megatron.early_exit.schedules.generators, megatron.early_exit.schedules.check\n"
        "sys.exit(bool({'torch', 'matplotlib', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=patient(60)).returncode == 0
