"""What the heads say about positions."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

NOT_FINITE = "the model's logits are not finite numbers"
_BLOCK = 1024
"""Logits whose place is searched for together, see `_largest`."""


@dataclass(frozen=True, slots=True)
class HeadOutput:
    """What a head says about the next token of one sequence.

    Attributes:
        logits: [v], fp32.
        normalizer: logarithm of the sum of their exponentials; not finite where the logits are not:
            the weights are damaged, or the hidden states overflow the dtype.
        best_token: the most probable token.
        best_logprob: its logarithm of probability.
        confidence: how sure the head is: the largest softmax probability, or what else the rule
            measures that decides about leaving there.
    """

    logits: Tensor
    normalizer: float
    best_token: int
    best_logprob: float
    confidence: float

    @property
    def is_finite(self) -> bool:
        """Whether the logits are numbers to choose by."""
        return math.isfinite(self.normalizer)

    def logprob(self, token: int) -> float:
        """Logarithm of the probability of a token."""
        if token == self.best_token:
            return self.best_logprob
        return float(self.logits[token]) - self.normalizer

    def top_logprobs(self, count: int) -> tuple[tuple[int, float], ...]:
        """The most probable tokens and the logarithms of their probabilities."""
        largest, indices = self.logits.topk(min(count, len(self.logits)))
        values = largest.tolist()
        # To the last bit what `logprob` says: who asks whether a token is the best one compares.
        logprobs = (
            self.best_logprob if value == values[0] else value - self.normalizer for value in values
        )
        return tuple(zip(indices.tolist(), logprobs, strict=True))


def head_outputs(logits: Tensor) -> list[HeadOutput]:
    """The outputs of heads with logits [n, v], at the cost of one small transfer to the host."""
    logits = logits.to(torch.float32)
    values, best = _largest(logits)
    # The maximum's own, not a difference, so that a confidence close to 1 keeps its digits.
    logprobs = logits.log_softmax(dim=-1).amax(dim=-1)
    # fp32 holds every index up to 2**24 exactly, more than any vocabulary.
    figures = torch.stack((values - logprobs, logprobs, best.to(torch.float32))).tolist()
    return [
        HeadOutput(row, normalizer, int(token), logprob, math.exp(logprob))
        for row, normalizer, logprob, token in zip(logits.unbind(), *figures, strict=True)
    ]


def _largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest [n] of [n, v], and where it is.

    PyTorch finds places in long rows slowly: of several rows, the block of the place comes first.
    """
    if len(logits) == 1:
        values, places = logits.max(dim=-1)
        return values, places
    excess = logits.shape[-1] % _BLOCK
    if excess:
        logits = functional.pad(logits, (0, _BLOCK - excess), value=-math.inf)
    blocks = logits.unflatten(-1, (-1, _BLOCK))
    values, block = blocks.amax(dim=-1).max(dim=-1)
    rows = torch.arange(len(logits), device=logits.device)
    return values, block * _BLOCK + blocks[rows, block].argmax(dim=-1)
