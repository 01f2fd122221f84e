"""Sampling from one row of logits, step by step: the reference for what is done with many at once.

Written for one row of logits [v], with numbers instead of columns of them, and every token ordered.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron.early_exit.inference import SamplingParams
from megatron.early_exit.inference.modes.batch_sampler import draw
from megatron.early_exit.inference.modes.draw import Draw
from megatron.early_exit.inference.modes.sampling import Sampler


def reference_distribution(
    params: SamplingParams,
    logits: Tensor,
    prompt: Sequence[int] = (),
    generated: Sequence[int] = (),
    stops: Sequence[int] = (),
) -> Tensor:
    """The probabilities [v] of the token behind `generated`, all on one at temperature 0."""
    scores = logits.to(torch.float32)
    if params.repetition_penalty != 1.0:
        seen = torch.tensor([*prompt, *generated], dtype=torch.int64)
        chosen, penalty = scores[seen], within_fp32(params.repetition_penalty)
        scores = scores.scatter(
            0, seen, torch.where(chosen < 0, chosen * penalty, chosen / penalty)
        )
    for token, bias in params.logit_bias:
        scores = scores.index_add(0, torch.tensor([token]), torch.tensor([float(bias)]))
    if generated:
        tokens, counts = torch.tensor(generated).unique(return_counts=True)
        penalties = params.presence_penalty + params.frequency_penalty * counts
        scores = scores.index_add(0, tokens, -penalties.to(scores.dtype))
    if len(generated) < params.min_tokens:
        scores = scores.index_fill(0, torch.tensor(stops, dtype=torch.int64), -torch.inf)
    if params.temperature == 0:
        return torch.zeros_like(scores).index_fill_(0, scores.argmax(), 1.0)
    # Less the largest first: a small temperature then overflows to -inf, never to inf.
    scores = (scores - scores.max()) / within_fp32(params.temperature)
    if params.min_p > 0:
        least = scores.max() + math.log(params.min_p)
        scores = scores.masked_fill(scores < least, -torch.inf)
    if 0 < params.top_k < len(scores):
        scores = scores.masked_fill(scores < scores.topk(params.top_k).values[-1], -torch.inf)
    p = max(params.top_p * params.top_p_decay ** len(generated), params.top_p_bound)
    if p < 1.0:
        best, order = scores.softmax(dim=-1).topk(len(scores))
        is_kept = best.cumsum(dim=0, dtype=torch.float64) - best < p
        is_kept[0] = True
        kept = order[is_kept]
        scores = torch.full_like(scores, -torch.inf).scatter(0, kept, scores[kept])
    return scores.softmax(dim=-1)


def reference_token(probabilities: Tensor, number: float) -> int:
    """The token that a random number draws from probabilities [v]."""
    reached = probabilities.cumsum(dim=0, dtype=torch.float64)
    return int(torch.searchsorted(reached, number * reached[-1], right=True))


def reference_verification(
    target: Tensor, draft: Tensor, token: int, first: float, second: float
) -> int:
    """A drafted token, or what two random numbers replace it with (arXiv 2211.17192)."""
    if first * float(draft[token]) < float(target[token]):
        return token
    missing = (target - draft).clamp(min=0)
    return reference_token(missing if missing.sum() > 0 else target, second)


def within_fp32(factor: float) -> float:
    """A factor that fp32 can multiply and divide by."""
    return min(max(factor, 1e-30), 1e30)


def make_sampler(
    prompt: Sequence[int] = (), stops: Sequence[int] = (), vocab_size: int = 5, **fields: object
) -> Sampler:
    """What a request with these parameters samples by, by default at temperature 1 and seed 0."""
    params = SamplingParams(**{"seed": 0, "temperature": 1.0} | fields)
    return Sampler(params, prompt, stops, vocab_size)


def distribution(sampler: Sampler, logits: Tensor, generated: Sequence[int] = ()) -> Tensor:
    """The probabilities [v] that the package finds for one row."""
    wanted = Draw(sampler, generated, (), sampler.num_taken, keeps=True)
    (drawn,) = draw([logits.to(torch.float32)], [wanted])
    if drawn.probabilities is None:
        return torch.zeros(len(logits)).index_fill_(0, torch.tensor(drawn.token), 1.0)
    return drawn.probabilities
