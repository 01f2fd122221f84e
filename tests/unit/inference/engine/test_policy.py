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


def test_where_gates_let_held_tokens_leave_on_the_way_all_is_one_step():
    """Who leaves runs no deeper, so that running on costs what is expected of the others."""
    own, none = [(0.6, 0.6, 1.0)], SegmentQueue(1, 3, [])
    held = SegmentQueue(0, 3, own, propagates=[True], gated=[True])
    assert held.rows == pytest.approx([1.0, 0.4, 0.16])
    assert Policy(COSTS).choose([held, none, none]) == range(3)
    exact = SegmentQueue(0, 3, own, gated=[True])
    assert exact.rows == [1.0, 1.0, 1.0]
    assert Policy(COSTS).choose([exact, none, none]) == range(1)


@pytest.mark.parametrize(("count", "runs"), [(2, range(3)), (8, range(3)), (9, range(1))])
def test_few_that_ask_gates_on_the_way_are_all_taken_to_the_end(count, runs):
    """Those that stay would make no batch of their own later."""
    own, both = [(0.9, 0.9, 1.0)] * count, [True] * count
    none = SegmentQueue(1, 3, [])
    queues = [SegmentQueue(0, 3, own, both, both), none, none]
    assert Policy(COSTS).choose(queues) == runs


def test_they_begin_where_the_first_of_them_waits():
    own = [(0.9, 0.9, 1.0)]
    queues = [
        SegmentQueue(0, 3, []),
        SegmentQueue(1, 3, own, [True], [True]),
        SegmentQueue(2, 3, own, [True], [True]),
    ]
    assert Policy(COSTS).choose(queues) == range(1, 3)
