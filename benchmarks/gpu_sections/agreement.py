"""Whether two ways to compute the same texts agree."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron.early_exit.inference import GenerationResult

TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Differences of log-probabilities that rounding alone makes."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """A comparison of greedy texts, token by token, up to the first token that differs.

    Attributes:
        num_equal: tokens that are the same, from the beginning of each text.
        num_tokens: tokens of all texts.
        largest_difference: of the log-probabilities of those that are the same.
        widest_gap: how much more probable the token of the one way was than its second best, where
            the other way chose a different one; 0 if all are the same.
    """

    num_equal: int
    num_tokens: int
    largest_difference: float
    widest_gap: float

    @property
    def is_exact(self) -> bool:
        """Whether all tokens are the same."""
        return self.num_equal == self.num_tokens

    def within(self, tolerance: float) -> bool:
        """Whether rounding explains all differences: different tokens were as good as equally
        probable."""
        return max(self.largest_difference, self.widest_gap) <= tolerance

    def __str__(self) -> str:
        text = f"{self.num_equal} of {self.num_tokens} tokens equal"
        if not self.is_exact:
            text += f" up to the first other one, which was {self.widest_gap:.1e} off"
        return f"{text}, log-probabilities differ by {self.largest_difference:.1e}"


def agreement_of(
    expected: Sequence[GenerationResult], found: Sequence[GenerationResult]
) -> Agreement:
    """Compare texts that were generated with `logprobs` of 2 or more."""
    num_equal = num_tokens = 0
    differences, gaps = [0.0], [0.0]
    for one, other in zip(expected, found, strict=True):
        num_tokens += max(len(one.token_ids), len(other.token_ids))
        pairs = zip(one.token_ids, other.token_ids, strict=False)
        for place, (token, other_token) in enumerate(pairs):
            if token != other_token:
                known = dict(one.top_logprobs[place])
                # Where the other token is not even among the best, no rounding explains it.
                gaps.append(known[token] - known.get(other_token, -float("inf")))
                break
            num_equal += 1
            differences.append(abs(one.logprobs[place] - other.logprobs[place]))
        else:
            if len(one.token_ids) != len(other.token_ids):
                gaps.append(float("inf"))
    return Agreement(num_equal, num_tokens, max(differences), max(gaps))
