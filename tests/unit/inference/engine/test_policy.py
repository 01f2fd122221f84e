"""How far batches run before their heads are asked."""

import pytest

from megatron.early_exit.inference.engine.policy import Costs, Policy, SegmentQueue

COSTS = Costs((10.0, 10.0, 10.0), head=8.0, exit_head=8.0)


def chosen(exit_rates, gated):
    """What runs for one sequence in front of the first layer."""
    own = [(*exit_rates, 1.0)]
    queues = [
        SegmentQueue(0, 3, own, gated=[gated]),
        SegmentQueue(1, 3, []),
        SegmentQueue(2, 3, []),
    ]
    return Policy(COSTS).choose(queues)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("rate", [0.0, 0.002])
def test_exits_that_never_give_a_token_are_no_step_of_their_own(rate, gated):
    assert chosen((rate, rate), gated) == range(3)


@pytest.mark.parametrize("gated", [False, True])
def test_an_exit_that_often_gives_the_token_is_asked_at_once(gated):
    assert chosen((0.6, 0.6), gated) == range(1)


def test_where_it_hardly_matters_exits_are_asked_early():
    """Behind a gate a token that leaves with a rate of 0.1 saves about what a step costs."""
    early, late = chosen((0.1, 0.0), True), chosen((0.01, 0.0), True)
    assert (early, late) == (range(1), range(3))
