"""Products with weight matrices are the plain ones, whatever layout the weights are kept in."""

import pytest
import torch
from torch import Tensor

from megatron.early_exit.inference.model.linear import make_addition, make_linear
from megatron.early_exit.inference.model.packed import rounded_up

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 9, 17, 40, 131])
def test_products(dtype, has_bias, rows):
    x, weight = random(rows, 24, dtype=dtype), random(56, 24, dtype=dtype)
    bias = random(56, dtype=dtype) if has_bias else None
    expected = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    found = make_linear(weight, bias)(x)
    assert found.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=4 * tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_few_rows_of_a_large_matrix(dtype, rows):
    """Where rows are repeated to be multiplied faster, each is there once."""
    x, weight = random(rows, 512, dtype=dtype), random(2100, 512, dtype=dtype)
    found = make_linear(weight)(x)
    assert found.shape == (rows, 2100)
    tolerance = 1e-4 if dtype == torch.float32 else 0.5
    torch.testing.assert_close(
        found.double(), x.double() @ weight.double().t(), rtol=tolerance, atol=tolerance
    )


def test_many_numbers_of_rows_are_few_sizes():
    sizes = {rows: rounded_up(rows) for rows in range(1, 8193)}
    assert all(rows <= size <= max(16, 9 / 8 * rows) for rows, size in sizes.items())
    assert all(sizes[rows] == rows for rows in (*range(1, 17), 32, 128, 8192))
    assert len(set(sizes.values())) == 16 + 8 * 9


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_additions_leave_the_residual_as_it_is(dtype, has_bias, shared):
    x, y, weight = (random(*shape, dtype=dtype) for shape in ((3, 16), (3, 24), (16, 24)))
    bias = random(16, dtype=dtype) if has_bias else None
    before = x.clone()
    # Two ranks with equal parts: their sum is twice the product, the bias is there once.
    found = make_addition(weight, bias, (lambda part: part * 2) if shared else None)(x, y)
    product = y.double() @ weight.double().t() * (2 if shared else 1)
    expected = x.double() + product + (0 if bias is None else bias.double())
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=8 * tolerance)
    assert torch.equal(x, before)


def test_a_part_of_a_matrix_is_multiplied_as_it_is():
    whole = random(32, 24, dtype=torch.float32)
    x = random(2, 24, dtype=torch.float32)
    torch.testing.assert_close(make_linear(whole[8:24])(x), x @ whole[8:24].t())
    torch.testing.assert_close(make_linear(whole[:, 4:12])(x[:, :8]), x[:, :8] @ whole[:, 4:12].t())
