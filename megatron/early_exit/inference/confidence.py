"""How sure a head is of its best token."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Assessment:
    """What a head says about the next token.

    Attributes:
        logprobs: [v] logarithms of the softmax of its logits, fp32.
        best_token: the most probable token.
        best_logprob: its logarithm of probability.
    """

    logprobs: Tensor
    best_token: int
    best_logprob: float

    @property
    def confidence(self) -> float:
        """The largest softmax probability, which decides about leaving at an exit."""
        return math.exp(self.best_logprob)


def assess(logits: Tensor) -> Assessment:
    """Assess the logits [1, v] of one position, at the cost of one small transfer to the host.

    Raises:
        FloatingPointError: the logits are not finite: the weights are damaged, or the hidden
            states overflow the dtype.
    """
    logprobs = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    value, index = logprobs.max(dim=-1)
    # fp32 holds every index up to 2**24 exactly, more than any vocabulary.
    best_logprob, best_token = torch.cat((value, index.to(torch.float32))).tolist()
    if not math.isfinite(best_logprob):
        raise FloatingPointError("the model's logits are not finite numbers")
    return Assessment(logprobs[0], int(best_token), best_logprob)
