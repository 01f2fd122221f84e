"""P-values, against exact arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import product

import pytest

from megatron.early_exit.evaluation.choosing.p_values import Losses, binomial_tail, p_value


def exact_tail(successes: int, trials: int, chance: Fraction) -> Fraction:
    terms = range(min(successes, trials) + 1)
    return sum(
        (math.comb(trials, k) * chance**k * (1 - chance) ** (trials - k) for k in terms),
        Fraction(),
    )


def test_the_binomial_tail_is_that_of_fractions():
    for trials, chance in product((1, 7, 60), (Fraction(1, 100), Fraction(1, 3), Fraction(9, 10))):
        for successes in range(trials + 2):
            exact = float(exact_tail(successes, trials, chance))
            found = binomial_tail(successes, trials, float(chance))
            assert found == pytest.approx(exact, rel=1e-10)


def test_a_tail_of_many_trials_does_not_vanish_before_its_time():
    # The probability of no success alone is below the least number of this format.
    assert binomial_tail(10_000, 20_000, 0.5) == pytest.approx(0.5 + 0.00282, abs=1e-4)


def test_binary_losses_have_their_exact_tail():
    limit = Fraction(1, 20)
    for lost in range(4):
        found = p_value(Losses(float(lost), 100, is_binary=True), float(limit))
        assert found == pytest.approx(float(exact_tail(lost, 100, limit)), rel=1e-10)


def test_bounded_losses_have_the_smaller_one_of_two_bounds():
    limit, count = 0.1, 200
    for total in (0.0, 0.5, 7.25, 15.0, 19.9):
        mean = total / count
        divergence = (1 - mean) * math.log((1 - mean) / (1 - limit))
        divergence += mean * math.log(mean / limit) if mean else 0.0
        tail = float(exact_tail(math.ceil(total), count, Fraction(1, 10)))
        wanted = min(math.exp(-count * divergence), math.e * tail, 1.0)
        assert p_value(Losses(total, count), limit) == pytest.approx(wanted, rel=1e-9)


def test_losses_that_are_not_below_the_limit_prove_nothing():
    assert p_value(Losses.of([0.25] * 8), 0.25) == 1.0
    assert p_value(Losses.of([1.0, 0.0] * 50, is_binary=True), 0.5) == 1.0
