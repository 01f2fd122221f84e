"""Perplexity of texts by the log-probabilities of their tokens."""

import math
from collections.abc import Iterable, Mapping
from typing import Any


def perplexity(totals: Iterable[Mapping[str, Any] | None]) -> float | None:
    """The perplexity of texts by their log-probabilities; None where there are none, or a token has
    a probability of 0."""
    found = [one for one in totals if one is not None and one["tokens"]]
    if not found or any(one["logprob"] is None for one in found):
        return None
    return math.exp(-sum(o["logprob"] for o in found) / sum(o["tokens"] for o in found))
