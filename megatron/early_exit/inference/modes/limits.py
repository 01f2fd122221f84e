"""Filters of scores: which tokens of each row are left to draw from.

Shapes: n rows, v tokens. A token is ruled out by a score of -inf.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def limit_to_min_p(scores: Tensor, log_p: Tensor) -> Tensor:
    """Rule out tokens with less than p times the largest probability of their row, in place.

    Min-p sampling, arXiv 2407.01082.

    Args:
        scores: [n, v]
        log_p: [n, 1], the logarithm of p of each row.
    """
    return scores.masked_fill_(scores < scores.amax(dim=-1, keepdim=True) + log_p, -torch.inf)


def limit_to_top_k(scores: Tensor, k: Tensor, most: int) -> Tensor:
    """Rule out all but the k most probable tokens of each row (and what ties with the last), in
    place.

    Args:
        scores: [n, v]
        k: [n, 1], from 1 to `most`.
        most: the largest k of all rows, at most v.
    """
    least = scores.topk(most).values.gather(1, k - 1)
    return scores.masked_fill_(scores < least, -torch.inf)


def limit_to_top_p(scores: Tensor, p: Tensor, counts: Sequence[int]) -> Tensor:
    """Rule out all but the fewest most probable tokens whose probabilities reach p.

    At least the most probable one of each row is left. Nucleus sampling, arXiv 1904.09751.

    Args:
        scores: [n, v]
        p: [n, 1] fp64
        counts: how many tokens to order, ascending: to order few of a large vocabulary is much
            faster. Those behind the first are for the rows in which so few do not reach p; to learn
            which these are, the host waits for the device.

    Returns:
        [n, v]; NaN in rows in which the last of the counts does not reach p.
    """
    return _nuclei(scores, scores.softmax(dim=-1), p, counts)


def _nuclei(scores: Tensor, probabilities: Tensor, p: Tensor, counts: Sequence[int]) -> Tensor:
    best, order = probabilities.topk(counts[0])
    before = best.cumsum(dim=-1, dtype=torch.float64) - best
    is_kept = before < p
    is_kept[:, 0] = True
    values = scores.gather(1, order).masked_fill_(~is_kept, -torch.inf)
    limited = torch.full_like(scores, -torch.inf).scatter_(1, order, values)
    if counts[0] == scores.shape[-1]:
        return limited
    # False also where the scores are NaN.
    is_reached = before[:, -1:] >= p
    if len(counts) == 1:
        return limited.masked_fill_(~is_reached, torch.nan)
    if not is_reached.all():
        rows = (~is_reached[:, 0]).nonzero()[:, 0]
        limited[rows] = _nuclei(scores[rows], probabilities[rows], p[rows], counts[1:])
    return limited
