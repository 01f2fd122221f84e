"""What the heads say about positions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from megatron.early_exit.inference.modes.draw import Drawn
from megatron.early_exit.inference.modes.measures import Judging
from megatron.early_exit.inference.transfer import download

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
        confidence: how sure the head is, by the measure of the rule that decides about leaving: by
            default the largest softmax probability.
        drawn: the token that it gives where that is drawn; it counts if the mode takes it.
        best: the most probable tokens and their logits, as many as the request wants to know, where
            they have come from the device together with the rest.
    """

    logits: Tensor
    normalizer: float
    best_token: int
    best_logprob: float
    confidence: float
    drawn: Drawn | None = None
    best: tuple[tuple[int, float], ...] | None = None

    @property
    def is_finite(self) -> bool:
        """Whether the logits are numbers to choose by."""
        return math.isfinite(self.normalizer)

    @property
    def token(self) -> int:
        """The token that it gives: the one that was drawn, else the most probable one."""
        return self.best_token if self.drawn is None else self.drawn.token

    def logprob(self, token: int) -> float:
        """Logarithm of the probability of a token."""
        if token == self.best_token:
            return self.best_logprob
        drawn = self.drawn
        if drawn is not None and token == drawn.token and drawn.logit is not None:
            return drawn.logit - self.normalizer
        return float(self.logits[token]) - self.normalizer

    def top_logprobs(self, count: int) -> tuple[tuple[int, float], ...]:
        """The most probable tokens and the logarithms of their probabilities."""
        best, count = self.best, min(count, len(self.logits))
        if best is None or len(best) != count:
            largest, indices = self.logits.topk(count)
            best = tuple(zip(indices.tolist(), largest.tolist(), strict=True))
        # To the last bit what `logprob` says: who asks whether a token is the best one compares.
        return tuple(
            (token, self.best_logprob if logit == best[0][1] else logit - self.normalizer)
            for token, logit in best
        )


def head_outputs(
    logits: Tensor,
    figures: Tensor | None = None,
    judging: Judging | None = None,
) -> list[HeadOutput]:
    """The outputs of heads with logits [n, v], at the cost of one small transfer to the host.

    Args:
        logits: what the heads say.
        figures: what `head_figures` gives of them, where that is known.
        judging: what their confidences are; None is the largest probabilities.
    """
    logits = logits.to(torch.float32)
    figures = head_figures(logits) if figures is None else figures
    if judging is None:
        return outputs_of(logits, figures.tolist())
    others = judging.confidences(logits, figures)
    numbers, *confidences = download([figures, *(values for _, values in others)])
    outputs = outputs_of(logits, numbers)
    for (rows, _), values in zip(others, confidences, strict=True):
        for row, confidence in zip(rows, values, strict=True):
            outputs[row] = replace(outputs[row], confidence=confidence)
    return outputs


def head_figures(logits: Tensor) -> Tensor:
    """What heads with logits [n, v] in fp32 say, as numbers [3, n] that `outputs_of` reads."""
    values, best = _largest(logits)
    # The maximum's own, not a difference, so that a confidence close to 1 keeps its digits.
    logprobs = logits.log_softmax(dim=-1).amax(dim=-1)
    # fp32 holds every index up to 2**24 exactly, more than any vocabulary.
    return torch.stack((values - logprobs, logprobs, best.to(torch.float32)))


def outputs_of(logits: Tensor, figures: Sequence[Sequence[float]]) -> list[HeadOutput]:
    """The outputs of heads with logits [n, v], from the numbers of `head_figures` on the host."""
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
