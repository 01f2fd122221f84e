"""That rules which are proven keep their promise: many calibrations of models of known risk."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from megatron.early_exit.evaluation.choosing.fixed_sequence import level_of_path, num_proven
from megatron.early_exit.evaluation.choosing.p_values import Losses, p_value

CONFIDENCE, LIMIT, NUM_PATHS, RUNS = 0.9, 0.1, 4, 1000
RISKS = np.array([[0.02, 0.06, 0.1001, 0.11, 0.16]] * 2 + [[0.1001, 0.05, 0.12, 0.2, 0.3]] * 2)
"""The true risk of each rule, by paths; only the order of the first ones is that of risk."""
SPEEDS = np.argsort(np.argsort(RISKS, axis=None)).reshape(RISKS.shape)
"""The riskier, the faster: nothing could tempt more."""

PValue = Callable[[Losses, float], float]


def broken_promises(
    draw: Callable[[np.random.Generator, float], Losses],
    p: PValue,
    level: float,
    runs: int = RUNS,
) -> int:
    """In how many of the calibrations the fastest proven rule has a risk above the limit."""
    generator, broken = np.random.default_rng(7), 0
    for _ in range(runs):
        fastest, risk = -1, 0.0
        for risks, speeds in zip(RISKS, SPEEDS, strict=True):
            count = num_proven((p(draw(generator, one), LIMIT) for one in risks), level)
            for speed, one in zip(speeds[:count], risks[:count], strict=True):
                fastest, risk = max((fastest, risk), (speed, one))
        broken += risk > LIMIT
    return broken


def all_or_nothing(generator: np.random.Generator, risk: float) -> Losses:
    return Losses(float(generator.binomial(300, risk)), 300, is_binary=True)


def shares(generator: np.random.Generator, risk: float) -> Losses:
    """Texts of 8 tokens that mostly lose all of them or none, which is hardest for a bound."""
    lost = generator.beta(0.05 * risk, 0.05 * (1 - risk), size=300)
    return Losses(float(generator.binomial(8, lost).sum()) / 8, 300)


def most_broken(runs: int = RUNS) -> float:
    """More than that is no chance: the expected number, and four standard deviations."""
    error = 1 - CONFIDENCE
    return runs * error + 4 * math.sqrt(runs * error * (1 - error))


@pytest.mark.parametrize("draw", [all_or_nothing, shares])
def test_the_chosen_rule_keeps_its_promise_as_often_as_is_said(draw):
    level = level_of_path(CONFIDENCE, NUM_PATHS)
    broken = broken_promises(draw, p_value, level)
    # Where none were broken, nothing would have been tried hard.
    assert 0 < broken <= most_broken()


def test_without_the_correction_for_several_paths_it_does_not():
    level = level_of_path(CONFIDENCE, 1)
    assert broken_promises(all_or_nothing, p_value, level, runs=400) > most_broken(400)


def test_with_a_p_value_that_is_none_it_does_not():
    def mean_alone(losses: Losses, limit: float) -> float:
        return 0.0 if losses.mean < limit else 1.0

    level = level_of_path(CONFIDENCE, NUM_PATHS)
    for draw in (all_or_nothing, shares):
        assert broken_promises(draw, mean_alone, level, runs=200) > most_broken(200)


def test_a_path_ends_with_the_first_rule_that_is_not_proven():
    asked = []

    def p_values():
        for one in (0.001, 0.01, 0.02, 0.0001):
            asked.append(one)
            yield one

    assert num_proven(p_values(), 0.01) == 2
    assert asked == [0.001, 0.01, 0.02]
