"""Filters and draws over log-probabilities."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron.early_exit.inference.confidence import assess
from megatron.early_exit.inference.sampling import limit_to_top_k, limit_to_top_p, sample

PROBABILITIES = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])


def kept(logprobs):
    return torch.isfinite(logprobs).nonzero().flatten().tolist()


@pytest.mark.parametrize(
    ("k", "expected"), [(0, [0, 1, 2, 3, 4]), (1, [1]), (3, [1, 3, 4]), (9, [0, 1, 2, 3, 4])]
)
def test_top_k(k, expected):
    assert kept(limit_to_top_k(PROBABILITIES.log(), k)) == expected


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        (0.01, [1]),
        (0.4, [1]),
        (0.41, [1, 3]),
        (0.7, [1, 3]),
        (0.8, [1, 3, 4]),
        (1.0, [0, 1, 2, 3, 4]),
    ],
)
def test_top_p(p, expected):
    assert kept(limit_to_top_p(PROBABILITIES.log(), p)) == expected


def test_draws_follow_the_limited_distribution():
    generator = torch.Generator().manual_seed(0)
    draws = [sample(PROBABILITIES.log(), 0.5, 3, 1.0, generator) for _ in range(4000)]
    share = torch.bincount(torch.tensor(draws), minlength=5) / len(draws)
    squared = PROBABILITIES.square() * torch.tensor([0, 1, 0, 1, 1])
    assert torch.allclose(share, squared / squared.sum(), atol=0.03)


@given(st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=40))
def test_confidence_is_the_largest_softmax_probability(values):
    logits = torch.tensor([values])
    assessment = assess(logits)
    expected = logits.double().softmax(-1)[0]
    assert assessment.confidence == pytest.approx(float(expected.max()), rel=1e-4)
    assert float(expected[assessment.best_token]) == pytest.approx(float(expected.max()), rel=1e-4)
    assert assessment.logprobs.exp().sum() == pytest.approx(1.0, abs=1e-4)


def test_low_precision_logits_are_assessed_in_fp32():
    logits = torch.zeros(1, 4096, dtype=torch.bfloat16)
    assert assess(logits).confidence == pytest.approx(1 / 4096, rel=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_must_be_finite(value):
    with pytest.raises(FloatingPointError, match="not finite"):
        assess(torch.tensor([[0.0, value]]))
