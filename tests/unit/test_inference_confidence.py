"""How sure a head is of its best token."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron.early_exit.inference.confidence import assess


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
