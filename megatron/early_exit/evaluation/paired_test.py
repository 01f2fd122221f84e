"""Whether the scores of the same prompts differ between two rules by more than chance."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
"""Signs that are drawn where there are more prompts than can be tried in all ways."""
_MOST_EXACT = 13
"""Prompts that differ, of which all 2^13 ways are tried: fewer than would be drawn."""
_PIECE = 250
"""Ways whose signs are numbers at the same time."""


class Signs:
    """Signs that are drawn once for each number of prompts, a bit for each.

    Args:
        seed: of the draws.
    """

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed
        self._drawn: dict[int, NDArray[np.uint8]] = {}

    def pieces(self, count: int) -> Iterator[NDArray[np.int8]]:
        """The bits of `RESAMPLES` ways for so many prompts, some ways [w, count] after others."""
        if count not in self._drawn:
            generator = np.random.default_rng(self._seed)
            shape = (RESAMPLES, -(-count // 8))
            self._drawn[count] = generator.integers(0, 256, shape, dtype=np.uint8)
        for start in range(0, RESAMPLES, _PIECE):
            packed = self._drawn[count][start : start + _PIECE]
            yield np.unpackbits(packed, axis=1, count=count).astype(np.int8)


def paired_p_value(differences: Sequence[float], signs: Signs | None = None) -> float:
    """The p-value of the hypothesis that neither of two rules scores higher (two-sided).

    If it holds, each prompt's difference might as well have had the other sign. The p-value is the
    share of all ways of choosing signs in which the sum is at least as far from 0 as the one that
    was found (Fisher's randomisation test of paired differences; Good, Permutation, Parametric and
    Bootstrap Tests of Hypotheses, chapter 3). Where all differences are equally large, as those of
    scores that are 0 or 1 are, this is McNemar's exact test (Psychometrika 12, 1947), whose
    binomial sum is computed. Otherwise all ways are tried up to 13 prompts that differ; of more,
    10,000 ways are drawn, and the found one counts among them, so that no p-value is 0.

    Args:
        differences: of each prompt's scores, in any unit. Those that are 0 say nothing.
        signs: those that are drawn; None draws some.

    Returns:
        0 to 1; 1 where no prompt differs.
    """
    values = np.array([one for one in differences if one], dtype=float)
    if not len(values):
        return 1.0
    sizes = np.abs(values)
    # Sums of the same numbers in another order differ by rounding.
    tolerance = 1e-9 * float(sizes.sum())
    if float(np.ptp(sizes)) <= tolerance:
        return _binomial(len(values), int((values > 0).sum()))
    found = abs(float(values.sum())) - tolerance
    if len(values) <= _MOST_EXACT:
        numbers = np.arange(2 ** len(values))[:, None]
        bits = (numbers >> np.arange(len(values)) & 1).astype(np.int8)
        return float((np.abs(_sums(bits, sizes)) >= found).mean())
    drawn = (signs or Signs()).pieces(len(values))
    extreme = sum(int((np.abs(_sums(bits, sizes)) >= found).sum()) for bits in drawn)
    return (extreme + 1) / (RESAMPLES + 1)


def least_p_value(count: int, are_equal: bool) -> float:
    """The smallest p-value that so many prompts can have, whatever their scores are.

    Args:
        count: of the prompts.
        are_equal: all differences that are not 0 are equally large, as those of scores that are 0
            or 1.
    """
    if are_equal or count <= _MOST_EXACT:
        # Both ways in which all signs are the same.
        return min(1.0, 2.0 ** (1 - count))
    return 1 / (RESAMPLES + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values of several hypotheses, so that at most a share of alpha of such families has
    any wrong rejection where those up to alpha are rejected (Holm, Scandinavian Journal of
    Statistics 6, 1979).

    Args:
        p_values: one for each hypothesis.

    Returns:
        The adjusted ones, in the same order.
    """
    adjusted = [1.0] * len(p_values)
    largest = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def _sums(bits: NDArray[np.int8], sizes: NDArray[np.float64]) -> NDArray[np.float64]:
    return (2.0 * bits - 1.0) @ sizes


def _binomial(count: int, positive: int) -> float:
    """Of `count` fair coins, how probable is a split at least as uneven."""
    # Whole numbers, which a float could not hold for many prompts.
    ways = tail = 1
    for one in range(min(positive, count - positive)):
        ways = ways * (count - one) // (one + 1)
        tail += ways
    return min(1.0, 2 * tail / 2**count)
