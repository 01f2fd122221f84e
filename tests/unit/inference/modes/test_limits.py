"""Filters of scores, each row with its own limit."""

import math

import pytest
import torch

from megatron.early_exit.inference.modes.limits import (
    limit_to_min_p,
    limit_to_top_k,
    limit_to_top_p,
)

PROBABILITIES = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])


def rows_of(count: int) -> torch.Tensor:
    return PROBABILITIES.log().repeat(count, 1)


def kept(scores: torch.Tensor) -> list[list[int]]:
    return [torch.isfinite(row).nonzero().flatten().tolist() for row in scores]


def test_top_k():
    expected = {1: [1], 3: [1, 3, 4], 5: [0, 1, 2, 3, 4]}
    k = torch.tensor(list(expected))[:, None]
    assert kept(limit_to_top_k(rows_of(3), k, 5)) == list(expected.values())
    assert kept(limit_to_top_k(rows_of(1), k[:1], 1)) == [[1]]


@pytest.mark.parametrize("counts", [(5,), (1, 5), (2, 3, 5)])
def test_top_p(counts):
    expected = {
        1e-300: [1],
        0.01: [1],
        0.39: [1],
        0.41: [1, 3],
        0.69: [1, 3],
        0.8: [1, 3, 4],
        0.9999: [0, 1, 2, 3, 4],
    }
    p = torch.tensor(list(expected), dtype=torch.float64)[:, None]
    assert kept(limit_to_top_p(rows_of(len(p)), p, counts)) == list(expected.values())


def test_too_few_tokens_in_order_are_told():
    p = torch.tensor([[0.3], [0.6], [0.9]], dtype=torch.float64)
    limited = limit_to_top_p(rows_of(3), p, (3,))
    assert kept(limited[:2]) == [[1], [1, 3]]
    assert limited[2].isnan().all()


def test_min_p():
    expected = {0.24: [0, 1, 3, 4], 0.26: [1, 3, 4], 1.0: [1]}
    log_p = torch.tensor([[math.log(p)] for p in expected])
    assert kept(limit_to_min_p(rows_of(3), log_p)) == list(expected.values())


@pytest.mark.parametrize("spread", [0.0, 0.5, 2.0, 6.0])
def test_top_p_of_a_large_vocabulary(spread):
    """The shortcut for small nuclei finds what ordering everything does."""
    size, p = 40_000, torch.tensor([[0.1], [0.9], [0.9999]], dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    scores = (torch.randn(size, generator=generator) * spread).repeat(len(p), 1)
    ordered = scores.double().softmax(dim=-1).sort(descending=True).values
    # How many tokens reach p, give or take what fp32 makes of their probabilities.
    reached = ordered.cumsum(-1)
    least, most = ((reached < p + slack).sum(-1) + 1 for slack in (-1e-5, 1e-5))
    limited = limit_to_top_p(scores, p, (512, 16384, size))
    for row, few, many in zip(limited, least.tolist(), most.tolist(), strict=True):
        is_kept = row.isfinite()
        assert few <= int(is_kept.sum()) <= many
        assert scores[0][is_kept].min() >= scores[0][~is_kept].max()
