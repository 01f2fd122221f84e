"""The best schedule, where it is known without solving anything."""

import pytest
from best_schedule import tokens_per_second

SHARES = (0.25, 0.25, 0.5)


def layers(rows: float) -> float:
    """Reading takes 8, each row 1."""
    return 8 + rows if rows else 0.0


def head(rows: float) -> float:
    return 4 + 0.5 * rows if rows else 0.0


@pytest.mark.parametrize("gated", [False, True])
def test_all_leave_at_the_first_exit(gated):
    found = tokens_per_second(1, 1.0, SHARES, layers, head, 0.0, gated)
    assert found == pytest.approx(1 / (0.25 * layers(1) + head(1)))


def test_as_good_as_lock_step():
    """Two that begin all tokens together: how likely two, one and none are left is plain."""
    expected = 0.25 * layers(2) + head(2)
    for share, stays in ((0.25, 0.4), (0.5, 0.16)):
        one, both = 2 * stays * (1 - stays), stays**2
        expected += share * (one * layers(1) + both * layers(2))
    assert tokens_per_second(2, 0.6, SHARES, layers, head, 0.0, True) >= 2 / expected


@pytest.mark.parametrize("batch", [1, 3])
def test_nobody_leaves(batch):
    """Heads of exits need not be asked."""
    lone = batch / (layers(batch) + head(batch))
    assert tokens_per_second(batch, 0.0, SHARES, layers, head, 0.0, True) == pytest.approx(lone)
    # With the heads of exits, whose rows are computed together with the final one's.
    asked = batch / (layers(batch) + head(3 * batch))
    assert tokens_per_second(batch, 0.0, SHARES, layers, head, 0.0, False) == pytest.approx(asked)


def test_a_gate_is_asked_before_anything_else_runs():
    """For one sequence: a segment runs if the gates in front have refused, then one head."""
    expected = 0.25 * layers(1) + 0.4 * 0.25 * layers(1) + 0.16 * 0.5 * layers(1) + head(1)
    assert tokens_per_second(1, 0.6, SHARES, layers, head, 0.0, True) == pytest.approx(1 / expected)


def test_what_leaves_owes_the_layers_behind():
    rate = 0.5
    undone = rate * (0.6 * 0.75 + 0.24 * 0.5)
    expected = 0.25 * layers(1) + 0.4 * 0.25 * layers(1) + 0.16 * 0.5 * layers(1) + head(1)
    found = tokens_per_second(1, 0.6, SHARES, layers, head, rate, True)
    assert found == pytest.approx(1 / (expected + undone))


def test_gates_are_better_than_heads():
    for batch, chance in [(2, 0.3), (4, 0.8)]:
        gates, heads = (
            tokens_per_second(batch, chance, SHARES, layers, head, 0.1, one)
            for one in (True, False)
        )
        assert gates > heads
