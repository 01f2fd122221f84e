"""How sure a head is of its best token."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron.early_exit.inference.modes.head_output import head_outputs


@given(
    st.integers(2, 40).flatmap(
        lambda size: st.lists(
            st.lists(st.floats(-20, 20, width=32), min_size=size, max_size=size),
            min_size=1,
            max_size=3,
        )
    )
)
def test_confidence_is_the_largest_softmax_probability(rows):
    logits = torch.tensor(rows)
    outputs = head_outputs(logits)
    assert len(outputs) == len(rows)
    for output, expected in zip(outputs, logits.double().softmax(-1), strict=True):
        largest = float(expected.max())
        assert output.is_finite
        assert output.confidence == pytest.approx(largest, rel=1e-4)
        assert float(expected[output.best_token]) == pytest.approx(largest, rel=1e-4)


@pytest.mark.parametrize("size", [1024, 2500, 4096])
def test_the_best_token_of_long_rows(size):
    """Whatever block of the row it is in, alone or beside other rows."""
    places = [0, 1, 1023, size // 2, size - 2, size - 1]
    logits = torch.randn(len(places), size, generator=torch.Generator().manual_seed(size))
    logits[range(len(places)), places] = 9.0
    together = head_outputs(logits)
    assert [one.best_token for one in together] == places
    for row, one in zip(logits, together, strict=True):
        (alone,) = head_outputs(row[None])
        assert alone.best_token == one.best_token
        expected = row.double().log_softmax(-1)
        for output in (one, alone):
            largest = float(expected[one.best_token])
            assert output.best_logprob == pytest.approx(largest, abs=1e-5)
            assert output.logprob(2) == pytest.approx(float(expected[2]), abs=1e-5)


def test_low_precision_logits_are_judged_in_fp32():
    (output,) = head_outputs(torch.zeros(1, 4096, dtype=torch.bfloat16))
    assert output.confidence == pytest.approx(1 / 4096, rel=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_of_their_own_row(value):
    damaged, sound = head_outputs(torch.tensor([[0.0, value], [0.0, 1.0]]))
    assert not damaged.is_finite
    assert (sound.is_finite, sound.best_token) == (True, 1)
