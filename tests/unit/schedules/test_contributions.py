"""Filled steps are unbiased: the weights of all microbatches add up to one for each loss and each
parameter that it reaches."""

from fractions import Fraction

import pytest
from hypothesis import given, settings

from megatron.early_exit.schedules.actions import Action
from megatron.early_exit.schedules.execution.contributions import Contributions
from megatron.early_exit.schedules.generators import FilledOneFOneB, OneFOneB
from tests.helpers.pipeline_schedules import overfilled


def weights(schedule, loss_stage: int, parameter_stage: int) -> list[Fraction]:
    """What each microbatch's gradient of a loss is multiplied by on its way to a parameter."""
    contributions, found = Contributions.of(schedule), []
    on_loss_stage = [a for a in schedule.ranks[loss_stage] if a.kind == "B"]
    for action in on_loss_stage:
        weight = Fraction(1, contributions.to_losses(loss_stage))
        for stage in range(loss_stage - 1, parameter_stage - 1, -1):
            if Action(stage, "B", action.microbatch) not in schedule.actions:
                break
            if action.microbatch.role != "w":
                weight *= contributions.gradient_factor(stage)
        else:
            found.append(weight)
    return found


@settings(max_examples=40, deadline=None)
@given(overfilled())
def test_weights_add_up_to_one(generator):
    schedule = generator.build()
    for loss_stage in range(generator.num_ranks):
        for parameter_stage in range(loss_stage + 1):
            assert sum(weights(schedule, loss_stage, parameter_stage)) == 1


def test_all_microbatches_of_a_stage_weigh_the_same_for_its_own_losses():
    schedule = FilledOneFOneB(num_ranks=4, num_microbatches=6, backward_forward_ratio=2.0).build()
    assert [weights(schedule, stage, stage) for stage in range(4)] == [
        [Fraction(1, 8)] * 8,
        [Fraction(1, 7)] * 7,
        [Fraction(1, 7)] * 7,
        [Fraction(1, 8)] * 8,
    ]
    # Gates learn from all but the fills of the warm-up.
    assert [Contributions.of(schedule).to_gates(stage) for stage in range(4)] == [6, 6, 7, 8]
    # The losses of the last stage reach the first from full microbatches only.
    assert weights(schedule, 3, 0) == [Fraction(1, 6)] * 6


@pytest.mark.parametrize("stage", range(3))
def test_without_fills_nothing_is_scaled(stage):
    contributions = Contributions.of(OneFOneB(num_ranks=3, num_microbatches=5).build())
    assert contributions.to_losses(stage) == contributions.to_gates(stage) == 5
    assert contributions.gradient_factor(stage) == 1
