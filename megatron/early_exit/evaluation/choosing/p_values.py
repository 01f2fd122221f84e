"""P-values of the hypothesis that a rule loses more than it may, by what texts have lost.

A p-value is valid if it is at most u with probability u or less where the hypothesis is true. Texts
have to be independent of each other; the tokens of one text are not, so a text counts once.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Losses:
    """What independent texts have lost, each a number from 0 to 1.

    Attributes:
        total: the sum over texts, from 0 to 1 for each.
        count: number of texts.
        is_binary: each text can only lose all or nothing. This has to be known without looking at
            the losses.
    """

    total: float
    count: int
    is_binary: bool = False

    @classmethod
    def of(cls, values: Sequence[float], is_binary: bool = False) -> "Losses":
        """The losses of texts.

        Args:
            values: one for each text, from 0 to 1.
            is_binary: they can be 0 and 1 only.
        """
        return cls(math.fsum(values), len(values), is_binary)

    @property
    def mean(self) -> float:
        """The mean over texts, from 0 to 1."""
        return self.total / self.count

    def within(self, count: int) -> "Losses":
        """The least that so many texts can lose of which these are the first ones."""
        return Losses(self.total, count, self.is_binary)


def p_value(losses: Losses, limit: float) -> float:
    """The p-value of the hypothesis that a text is expected to lose more than `limit`.

    For losses of all or nothing it is the exact binomial tail, else the bound of Hoeffding and
    Bentkus (Angelopoulos et al., Learn then Test, arXiv 2110.01052, proposition 1).

    Args:
        losses: of 1 text or more.
        limit: above 0 and below 1.
    """
    total, count = losses.total, losses.count
    if total >= count * limit:
        return 1.0
    if losses.is_binary:
        return binomial_tail(round(total), count, limit)
    hoeffding = math.exp(-count * _divergence(losses.mean, limit))
    bentkus = math.e * binomial_tail(math.ceil(total), count, limit)
    return min(hoeffding, bentkus, 1.0)


def binomial_tail(successes: int, trials: int, chance: float) -> float:
    """The probability of so many successes or fewer.

    Args:
        successes: 0 or more.
        trials: number of independent trials.
        chance: of each to be a success, above 0 and below 1.
    """
    if successes >= trials:
        return 1.0
    before = np.arange(successes)
    ratios = np.log((trials - before) / (before + 1)) + math.log(chance) - math.log1p(-chance)
    # Logarithms of the probabilities of 0, 1, 2... successes.
    logs = trials * math.log1p(-chance) + np.concatenate([[0.0], np.cumsum(ratios)])
    most = logs.max()
    return min(float(np.exp(logs - most).sum()) * math.exp(most), 1.0)


def _divergence(mean: float, limit: float) -> float:
    """How far one chance of a coin is from another (Kullback-Leibler, in nats)."""
    rest = (1 - mean) * math.log((1 - mean) / (1 - limit))
    return rest if mean == 0 else mean * math.log(mean / limit) + rest
