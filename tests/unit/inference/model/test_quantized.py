"""Matrices in 8 bits, and products with them."""

import pytest
import torch

from megatron.early_exit.checkpoint.quantization import dequantize, quantize
from megatron.early_exit.inference.model import exact_products
from megatron.early_exit.inference.model.exact_products import FastestLibrary, exact_libraries
from megatron.early_exit.inference.model.linear import make_addition, make_linear
from megatron.early_exit.inference.model.quantized import (
    pack_quantized,
    quantized_product,
)
from tests.helpers.quantized_models import rounded


@pytest.fixture(autouse=True, params=["FBGEMM", "oneDNN"])
def library(request, monkeypatch):
    """The library that all matrices are packed for."""
    found = {request.param: exact_libraries()[request.param]}
    monkeypatch.setattr(exact_products, "exact_libraries", lambda: found)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def packed_matrix(values, scale):
    return pack_quantized(values, scale, FastestLibrary())


def test_each_channel_is_rounded_by_its_own_scale():
    weight = random(7, 33) * torch.logspace(-20, 20, 7)[:, None]
    values, scale = quantize(weight)
    assert values.dtype == torch.int8
    assert scale.dtype == torch.float32
    torch.testing.assert_close(dequantize(values, scale), rounded(weight))
    assert (values.int().abs().amax(dim=1) == 127).all()
    assert ((dequantize(values, scale) - weight).abs() <= scale[:, None] * 0.5001).all()


def test_channels_of_zeros_stay_zeros():
    weight = torch.zeros(3, 5)
    weight[1, 2] = -1e-30
    values, scale = quantize(weight)
    assert scale.tolist() == [0.0, pytest.approx(1e-30 / 127), 0.0]
    assert values.tolist() == [[0] * 5, [0, 0, -127, 0, 0], [0] * 5]
    product = quantized_product(random(2, 5), packed_matrix(values, scale), None)
    assert product[:, [0, 2]].tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_half_precision_is_rounded_as_it_is():
    weight = random(6, 20).bfloat16()
    values, scale = quantize(weight)
    torch.testing.assert_close(dequantize(values, scale), rounded(weight.float()))


@pytest.mark.parametrize("shape", [(24, 16), (1, 1), (61, 33), (96, 577), (130, 7)])
@pytest.mark.parametrize("rows", [*range(1, 10), 17, 33, 64])
def test_products_are_those_of_the_rounded_matrix(shape, rows):
    """A row is off by no more than the rounding of its entries to 14 bits."""
    values, scale = quantize(random(*shape))
    x = random(rows, shape[1]) * torch.logspace(-3, 3, rows)[:, None]
    matrix = dequantize(values, scale).double()
    found = quantized_product(x, packed_matrix(values, scale), None)
    step = x.double().abs().amax(dim=1, keepdim=True) / (63 * 126)
    most = 0.5 * step * matrix.abs().sum(dim=1) * 1.01
    assert found.dtype == torch.float32
    assert ((found - x.double() @ matrix.t()).abs() <= most + 1e-5 * step * 8192).all()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("size", [2, 64, 576, 8192])
def test_extreme_numbers_do_not_saturate(sign, size):
    """Libraries add up two products in 16 bits."""
    values = torch.full((5, size), 127 * sign, dtype=torch.int8)
    packed = packed_matrix(values, torch.ones(5))
    for x in (torch.ones(1, size), -torch.ones(2, size), torch.full((9, size), 1e30)):
        expected = sign * 127.0 * size * x[0, 0].item()
        assert quantized_product(x, packed, None).flatten().tolist() == pytest.approx(
            [expected] * 5 * len(x), rel=1e-6
        )


def test_a_row_does_not_depend_on_the_rows_beside_it():
    packed = packed_matrix(*quantize(random(50, 40)))
    x = random(40, 40) * torch.logspace(-8, 8, 40)[:, None]
    together = quantized_product(x, packed, None)
    for count in (1, 3, 16):
        parts = [quantized_product(part, packed, None) for part in x.split(count)]
        assert torch.equal(torch.cat(parts), together)


def test_rows_of_zeros_and_numbers_that_are_not_finite():
    packed = packed_matrix(*quantize(random(5, 8)))
    x = random(4, 8)
    x[0], x[1, 3], x[2, 4] = 0, torch.inf, torch.nan
    found = quantized_product(x, packed, None)
    assert found[0].tolist() == [0.0] * 5
    assert not found[1:3].isfinite().any()
    assert torch.equal(found[3:], quantized_product(x[3:], packed, None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_linear_maps_and_additions(dtype, has_bias, shared):
    x, y = random(3, 16).to(dtype), random(3, 24).to(dtype)
    values, scale = quantize(random(16, 24))
    packed, matrix = packed_matrix(values, scale), dequantize(values, scale).double()
    bias = random(16).to(dtype) if has_bias else None
    offset = 0 if bias is None else bias.double()
    before = x.clone()
    tolerance = 2e-3 if dtype == torch.float32 else 1e-1
    mapped = make_linear(packed, bias)(y)
    # Two ranks with equal parts: their sum is twice the product, the bias is there once.
    added = make_addition(packed, bias, (lambda part: part * 2) if shared else None)(x, y)
    product = y.double() @ matrix.t()
    assert mapped.dtype == added.dtype == dtype
    torch.testing.assert_close(mapped.double(), product + offset, rtol=0, atol=tolerance)
    whole = x.double() + product * (2 if shared else 1) + offset
    torch.testing.assert_close(added.double(), whole, rtol=0, atol=2 * tolerance)
    assert torch.equal(x, before)
