"""The best schedule, where it is known without solving anything."""

import pytest
from best_schedule import Runs, tokens_per_second

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
    """Behind gates only the final head is evaluated, and without them the exits' heads as well."""
    lone = batch / (layers(batch) + head(batch))
    assert tokens_per_second(batch, 0.0, SHARES, layers, head, 0.0, True) == pytest.approx(lone)
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


MEASURED = {1: 17.1, 2: 18.3, 3: 27.2, 4: 28.8, 5: 30.6, 6: 31.9, 7: 34.6, 8: 35.3}
"""Milliseconds of SmolLM2's layers in fp32, compiled, by rows, on two cores with AVX2."""


def measured_layers(rows: float) -> float:
    return MEASURED[int(rows)] if rows else 0.0


def read_layers(rows: float) -> float:
    """Reading takes nearly all of the time, as on a GPU."""
    return 100 + rows / 2 if rows else 0.0


@pytest.mark.parametrize(
    ("layers", "head", "step", "share"),
    [(measured_layers, 5.2, 1.5, 0.99), (read_layers, 17.4, 10.0, 0.93)],
    ids=["cpu", "reading"],
)
@pytest.mark.parametrize("chance", [0.3, 0.5, 0.8])
def test_few_sequences_need_no_better_schedule_than_lock_step(layers, head, step, share, chance):
    """Why the engine takes up to eight sequences that ask gates to the end together."""
    thirds = (1 / 3, 1 / 3, 1 / 3)

    def asked(rows: float) -> float:
        """Each step takes something, whether a head is evaluated or not."""
        return step + (head + rows / 5 if rows else 0.0)

    for batch in (1, 2, 4, 8):
        runs = Runs(chance, thirds, layers, asked, 0.0)
        together = runs.behind_gates((batch, 0, 0), range(3))
        best = tokens_per_second(batch, chance, thirds, layers, asked, 0.0, True)
        assert share <= together.tokens / together.seconds / best < 1.01
