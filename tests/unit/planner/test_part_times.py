"""Measured times of parts take the place of derived ones, and nothing else changes."""

from dataclasses import replace
from typing import get_args

import pytest

from megatron.early_exit.planner.command_line.model_flags import read_model
from megatron.early_exit.planner.command_line.request_flags import read_request
from megatron.early_exit.planner.costs.layer_profile import Part
from megatron.early_exit.planner.costs.layout import Layout
from megatron.early_exit.planner.costs.model_costs import ExitExecution, model_costs
from megatron.early_exit.planner.costs.part_times import MeasuredTimes
from megatron.early_exit.planner.search.plans import find_plans
from tests.helpers.derived_profile import A100, PLANNED, derived_profile, derived_times
from tools.plan_pipeline import build_parser


def test_tensor_parallelism_divides_measured_times_and_adds_collectives():
    derived = derived_times()
    shape, exits = derived.shape, derived.exits
    profile = derived_profile((1, 2), factor=3.0)

    def layer(tensor_parallel: int, node_bytes_per_s: float):
        layout = Layout(layers_per_stage=(6, 6), num_ranks=2, tensor_parallel=tensor_parallel)
        accelerator = replace(A100, node_bytes_per_s=node_bytes_per_s)
        times = MeasuredTimes(profile, derived, shared_by=tensor_parallel)
        costs = model_costs(shape, layout, accelerator, exits, ExitExecution(), times)
        with_exits, _ = costs.stages
        return with_exits

    whole, quarter = layer(1, 1e15), layer(4, 1e15)
    # Four collectives start in the forward of each of six layers, and two in the backward; in that
    # of two exits with blocks all six.
    assert quarter.forward_s == pytest.approx(whole.forward_s / 4 + 24 * 15e-6, rel=1e-3)
    assert quarter.backward_s == pytest.approx(whole.backward_s / 4 + 24 * 15e-6, rel=1e-3)
    slow = layer(4, 1e9)
    # Six layers, four times the other three quarters of 1024 tokens, in bf16.
    received_s = 6 * 4 * 3 / 4 * 1024 * 2 * 1024 / 0.8e9
    assert slow.forward_s - quarter.forward_s == pytest.approx(received_s, rel=1e-3)
    # In backward, half as much of the layers, the rest runs beside products; of two blocks all.
    assert slow.backward_s - quarter.backward_s == pytest.approx(received_s, rel=1e-3)


def test_weight_gradients_keep_their_share_of_the_backward():
    derived = derived_times()
    measured = MeasuredTimes(derived_profile((1, 2), factor=3.0), derived)
    for part in get_args(Part):
        derived_s = derived.time(part, 2).weight_gradient_s
        assert measured.time(part, 2).weight_gradient_s == pytest.approx(3 * derived_s)


def test_a_profile_of_derived_times_gives_the_derived_plan():
    """Where nothing is divided or interpolated."""
    sizes = (1, 2, 4, 8, 16, 32, 64)
    args = build_parser().parse_args([*PLANNED.split(), "--tensor-model-parallel-size", "1"])
    request = read_request(args, read_model(args))
    derived = find_plans(request, 4)
    measured = find_plans(replace(request, profile=derived_profile(sizes)), 4)
    layouts = [[plan.costing.candidate for plan in plans.best] for plans in (derived, measured)]
    assert layouts[0] == layouts[1]
    assert [plan.prediction.peak_bytes for plan in measured.best] == [
        plan.prediction.peak_bytes for plan in derived.best
    ]
    assert [plan.prediction.step_s for plan in measured.best] == pytest.approx(
        [plan.prediction.step_s for plan in derived.best]
    )
