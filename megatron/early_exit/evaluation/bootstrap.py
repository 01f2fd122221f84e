"""Intervals of confidence by resampling prompts."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
LEVEL = 0.95

Sums = NDArray[np.float64]
Interval = tuple[float, float]


def interval(
    rows: Sums, statistic: Callable[[Sums], Sums], seed: int = 0, resamples: int = RESAMPLES
) -> Interval | None:
    """The interval that holds a statistic of prompts in 95 % of resamples (percentile bootstrap;
    Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13).

    Prompts are drawn, not tokens: the tokens of an answer depend on each other.

    Args:
        rows: [prompts, k], k sums of each prompt.
        statistic: from sums over prompts [r, k] to values [r].
        seed: of the resampling.
        resamples: how many are drawn.

    Returns:
        Its lower and its upper end; None where there are fewer than 2 prompts, of which all
        resamples are equal, so that an interval would look certain.
    """
    count = len(rows)
    if count < 2:
        return None
    generator = np.random.default_rng(seed)
    # How often each prompt is drawn.
    draws = generator.multinomial(count, np.full(count, 1 / count), size=resamples)
    values = statistic(draws @ rows)
    tail = (1 - LEVEL) / 2
    low, high = np.nanquantile(values, [tail, 1 - tail])
    return float(low), float(high)
