"""Steps of many microbatches, timed by few of them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.early_exit.planner.costs.cost_model import CostModel, StageCost
from megatron.early_exit.planner.simulation import long_step
from megatron.early_exit.planner.simulation.long_step import StepTime, time_long_step
from megatron.early_exit.planner.simulation.simulator import simulate
from megatron.early_exit.schedules.generators import (
    FilledOneFOneB,
    Interleaved,
    OneFOneB,
    Tuning,
    ZeroBubbleH1,
)
from megatron.early_exit.schedules.schedule import Schedule

FAMILIES = {
    "1f1b": lambda ranks, n: OneFOneB(num_ranks=ranks, num_microbatches=n),
    "filled": lambda ranks, n: FilledOneFOneB(
        num_ranks=ranks, num_microbatches=n, backward_forward_ratio=2.0
    ),
    "interleaved": lambda ranks, n: Interleaved(num_ranks=ranks, num_microbatches=n, num_chunks=3),
    "zero-bubble": lambda ranks, n: ZeroBubbleH1(num_ranks=ranks, num_microbatches=n),
    "tuning": lambda ranks, n: Tuning(
        num_ranks=ranks, num_microbatches=n, exit_stages=frozenset({0, ranks - 2})
    ),
}


@st.composite
def model_like_costs(draw: st.DrawFn, num_stages: int) -> CostModel:
    """Stages of a few kinds, as those of a model with exits, and links of two."""
    kinds = [draw(st.tuples(st.integers(20, 60), st.integers(20, 120))) for _ in range(3)]
    links = [draw(st.integers(0, 15)) / 7 for _ in range(2)]
    stages = []
    for _ in range(num_stages):
        forward, backward = draw(st.sampled_from(kinds))
        stages.append(
            StageCost(
                forward_s=forward / 7,
                backward_s=backward / 7,
                weight_gradient_s=backward / 14,
                local_backward_s=forward / 21,
                static_bytes=5,
                activation_bytes=3,
                backward_extra_bytes=1,
            )
        )
    transfers = tuple(draw(st.sampled_from(links)) for _ in range(num_stages - 1))
    return CostModel(stages=tuple(stages), transfer_s=transfers)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=12)
@given(st.data())
def test_long_steps_take_what_the_simulator_says(family, data):
    ranks = data.draw(st.integers(2, 6))
    group = ranks if family == "interleaved" else 1
    number = group * data.draw(st.integers(1, 150 // group))
    costs = data.draw(model_like_costs(3 * ranks if family == "interleaved" else ranks))

    def build(count: int) -> Schedule:
        return FAMILIES[family](ranks, count).build()

    expected = StepTime.of(simulate(build(number), costs))
    found = time_long_step(build, number, costs, group)
    for rank, other in zip(found.ranks, expected.ranks, strict=True):
        assert rank.start_s == other.start_s
        assert rank.end_s == pytest.approx(other.end_s, rel=1e-9)
        assert rank.busy_s == pytest.approx(other.busy_s, rel=1e-9)
        assert rank.peak_bytes == other.peak_bytes
    assert found.step_s == pytest.approx(expected.step_s, rel=1e-9)
    assert found.bubble_fraction == pytest.approx(expected.bubble_fraction, abs=1e-9)


def test_a_neighbour_may_make_the_period_longer_than_one_microbatch():
    """Two equal stages with a transfer between them take turns in waiting for each other."""
    costs = CostModel.even(3, 1.0, 2.0, transfer_s=0.25)

    def build(count: int) -> Schedule:
        return OneFOneB(num_ranks=3, num_microbatches=count).build()

    expected = simulate(build(1001), costs).step_s
    assert time_long_step(build, 1001, costs).step_s == pytest.approx(expected, rel=1e-12)


def test_few_microbatches_of_many_are_simulated(monkeypatch):
    simulated = []

    def counting(schedule: Schedule, costs: CostModel):
        simulated.append(len(schedule.actions))
        return simulate(schedule, costs)

    monkeypatch.setattr(long_step, "simulate", counting)

    def build(count: int) -> Schedule:
        return OneFOneB(num_ranks=4, num_microbatches=count).build()

    step = time_long_step(build, 1_000_000, CostModel.even(4, 1.0, 2.0))
    assert step.step_s == pytest.approx(3.0 * 1_000_003)
    assert sum(simulated) < 1000
