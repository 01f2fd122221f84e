"""From log-probabilities to a token: pure functions of tensors and a generator."""

import torch
from torch import Tensor


def limit_to_top_k(logprobs: Tensor, k: int) -> Tensor:
    """Rule out all but the k most probable tokens (and what ties with the last), [v] -> [v]."""
    if k == 0 or k >= logprobs.shape[-1]:
        return logprobs
    least = logprobs.topk(k).values[-1]
    return logprobs.masked_fill(logprobs < least, -torch.inf)


def limit_to_top_p(logprobs: Tensor, p: float) -> Tensor:
    """Rule out all but the fewest most probable tokens whose probabilities reach p, [v] -> [v].

    Nucleus sampling, arXiv 1904.09751.
    """
    if p == 1.0:
        return logprobs
    ordered, order = logprobs.sort(descending=True)
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    return logprobs.index_fill(0, order[before >= p], -torch.inf)


def sample(
    logprobs: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator
) -> int:
    """Draw a token from log-probabilities [v] at a temperature above 0."""
    scaled = logprobs / temperature
    limited = limit_to_top_p(limit_to_top_k(scaled, top_k), top_p)
    return int(limited.softmax(dim=-1).multinomial(1, generator=generator))
