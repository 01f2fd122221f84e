"""p-values of paired differences, against SciPy's and against trying all signs one by one."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from megatron.early_exit.evaluation.paired_test import (
    RESAMPLES,
    Signs,
    holm,
    least_p_value,
    paired_p_value,
)


def by_all_signs(differences: list[float]) -> float:
    """The definition: every way of choosing signs, also of those that are 0."""
    found = abs(sum(differences))
    ways = list(product((-1, 1), repeat=len(differences)))
    sums = [sum(sign * one for sign, one in zip(way, differences, strict=True)) for way in ways]
    return sum(abs(one) >= found - 1e-12 for one in sums) / len(ways)


@pytest.mark.parametrize("count", [1, 2, 5, 9])
@pytest.mark.parametrize("seed", range(4))
def test_few_prompts_are_tried_in_all_ways(count, seed):
    generator = np.random.default_rng(seed)
    differences = (generator.normal(size=count) + 0.5).round(1).tolist()
    assert paired_p_value(differences) == pytest.approx(by_all_signs(differences))
    signs = generator.integers(-1, 2, count).astype(float).tolist()
    assert paired_p_value(signs) == pytest.approx(by_all_signs(signs))


def test_p_values_are_those_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    for positive, negative in ((0, 0), (1, 0), (7, 7), (12, 3), (400, 340), (800, 800)):
        scores = [1.0] * positive + [-1.0] * negative + [0.0] * 20
        count = positive + negative
        wanted = stats.binomtest(positive, count).pvalue if count else 1.0
        assert paired_p_value(scores) == pytest.approx(wanted)
    generator = np.random.default_rng(3)
    differences = generator.normal(0.15, 0.3, 40)
    wanted = stats.permutation_test(
        (differences,), np.sum, permutation_type="samples", n_resamples=20_000, rng=generator
    ).pvalue
    found = paired_p_value(differences.tolist())
    assert 0.001 < found < 0.1
    # Four standard deviations of a share of so many draws.
    assert found == pytest.approx(wanted, abs=4 * (2 * wanted / RESAMPLES) ** 0.5)
    assert paired_p_value(differences.tolist()) == found


def test_no_p_value_of_drawn_signs_is_zero():
    differences = [1.0 + number / 100 for number in range(60)]
    assert paired_p_value(differences) == 1 / (RESAMPLES + 1)


def test_the_least_p_value_is_that_of_prompts_that_all_differ_in_one_direction():
    for count in range(1, 17):
        scores = [1.0] * count
        uneven = [1 + number / 100 for number in range(count)]
        assert least_p_value(count, are_equal=True) == pytest.approx(paired_p_value(scores))
        assert least_p_value(count, are_equal=False) == pytest.approx(paired_p_value(uneven))
    assert least_p_value(0, are_equal=True) == 1


def test_signs_are_drawn_once_and_are_fair():
    signs = Signs(3)
    first = np.concatenate(list(signs.pieces(20)))
    assert first.shape == (RESAMPLES, 20)
    assert set(first.ravel()) == {0, 1}
    # Five standard deviations of the mean of so many coins.
    assert first.mean(0) == pytest.approx(0.5, abs=2.5 / RESAMPLES**0.5)
    assert (np.concatenate(list(signs.pieces(20))) == first).all()
    assert (np.concatenate(list(Signs(3).pieces(20))) == first).all()
    assert (np.concatenate(list(Signs(4).pieces(20))) != first).any()


def test_where_nothing_differs_p_values_are_spread_evenly():
    generator = np.random.default_rng(0)
    found = [paired_p_value(generator.normal(size=11).tolist()) for _ in range(400)]
    for level in (0.05, 0.2, 0.5):
        assert np.mean([one <= level for one in found]) == pytest.approx(level, abs=0.08)


def test_holms_correction_is_the_papers():
    # The first is multiplied by 4, the next by 3; none is below one that was smaller before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2]
    assert holm([]) == []
