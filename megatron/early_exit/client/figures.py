"""Figures from answers: a server's speed, and the effect of its exits."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from megatron.early_exit.client.completions import Completion


def percentile(values: Sequence[float], share: float) -> float:
    """The least value that at least this share of the values does not exceed; NaN if there are
    none."""
    if not values:
        return math.nan
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def describe(answer: Completion) -> str:
    """One answer's figures."""
    parts = [f"{len(answer.token_ids)} tokens in {answer.latency_seconds:.2f} s"]
    if answer.time_to_first_token_seconds is not None:
        parts.append(f"first after {answer.time_to_first_token_seconds:.3f} s")
    parts.append(_speed(answer))
    if answer.mean_exit_layer is not None:
        parts.append(f"mean exit layer {answer.mean_exit_layer:.2f}")
    return ", ".join(parts)


def describe_all(answers: Sequence[Completion], seconds: float) -> list[str]:
    """The figures of many answers, in any order, which took so many seconds together."""
    tokens = sum(len(one.token_ids) for one in answers)
    latencies = [one.latency_seconds for one in answers]
    firsts = [one.time_to_first_token_seconds for one in answers]
    layers = Counter(layer for one in answers for layer in one.exit_layers)
    shares = (f"{layer}: {layers[layer] / layers.total():.1%}" for layer in sorted(layers))
    return [
        f"{len(answers)} answers, {tokens} tokens in {seconds:.2f} s: "
        f"{tokens / seconds:.1f} tokens/s",
        f"latency: {_quantiles(latencies)}",
        f"time to first token: {_quantiles([one for one in firsts if one is not None])}",
        f"tokens by exit layer: {', '.join(shares) or 'none'}",
    ]


@dataclass(frozen=True)
class Comparison:
    """An answer with exits, compared with the one of all layers.

    Attributes:
        answer: the answer with exits.
        full: the answer in mode `full`.
    """

    answer: Completion
    full: Completion

    @property
    def num_equal(self) -> int:
        """Number of positions at which both answers have the same token."""
        pairs = zip(self.answer.token_ids, self.full.token_ids, strict=False)
        return sum(one == other for one, other in pairs)

    @property
    def num_tokens(self) -> int:
        """Number of positions at which at least one answer has a token."""
        return max(len(self.answer.token_ids), len(self.full.token_ids))

    @property
    def first_difference(self) -> int | None:
        """The first position with different tokens; None if there is none."""
        pairs = zip_longest(self.answer.token_ids, self.full.token_ids)
        return next((i for i, (one, other) in enumerate(pairs) if one != other), None)

    def describe(self) -> str:
        """A line with both speeds and the agreement of the tokens."""
        speeds = f"{_speed(self.answer)}, in mode full {_speed(self.full)}"
        if self.first_difference is None:
            return f"{speeds}; all tokens equal"
        share = self.num_equal / self.num_tokens
        return f"{speeds}; token {self.first_difference} differs first, {share:.1%} equal"


def describe_comparisons(comparisons: Sequence[Comparison]) -> str:
    """The speed-up over many answers, including the times to first tokens, and their agreement."""
    if not comparisons:
        return "speed-up over mode full: nothing to compare"
    speed, full_speed = (
        sum(len(one.token_ids) for one in answers) / sum(one.latency_seconds for one in answers)
        for answers in ([one.answer for one in comparisons], [one.full for one in comparisons])
    )
    equal = sum(one.num_equal for one in comparisons)
    tokens = sum(one.num_tokens for one in comparisons)
    same = sum(one.first_difference is None for one in comparisons)
    return (
        f"speed-up over mode full: {speed / full_speed if full_speed else math.nan:.2f} "
        f"({speed:.1f} over {full_speed:.1f} tokens/s of a request), "
        f"{equal / tokens if tokens else 1:.1%} of tokens equal, "
        f"{same} of {len(comparisons)} texts"
    )


def _quantiles(values: Sequence[float]) -> str:
    return f"p50 {percentile(values, 0.5):.3f} s, p99 {percentile(values, 0.99):.3f} s"


def _speed(answer: Completion) -> str:
    speed = answer.tokens_per_second
    return "no speed (all at once)" if speed is None else f"{speed:.1f} tokens/s"
