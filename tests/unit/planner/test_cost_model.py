"""Costs of stages that make sense, and even ones."""

import pytest
from hypothesis import given

from megatron.early_exit.planner.costs.cost_model import CostModel, StageCost
from tests.helpers.pipeline_schedules import ratios


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("forward_s", -1, "forward_s -1 is out of range, allowed: 0 or more"),
        ("static_bytes", float("nan"), "static_bytes nan is out of range"),
        (
            "weight_gradient_s",
            3,
            "weight_gradient_s 3 is out of range, allowed: 0 to 2 .backward_s.",
        ),
    ],
)
def test_costs_have_to_make_sense(field, value, message):
    with pytest.raises(ValueError, match=message):
        StageCost(**{"forward_s": 1, "backward_s": 2, field: value})


@given(ratios)
def test_even_costs_have_the_ratio(ratio):
    costs = CostModel.even(2, 1.0, ratio)
    assert costs.stages[0].seconds("B") / costs.stages[1].seconds("F") == pytest.approx(ratio)
    with pytest.raises(ValueError, match="SF is not a computation, allowed: F, B, I, W, L"):
        costs.stages[0].seconds("SF")
