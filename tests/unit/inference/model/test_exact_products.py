"""Products in 8 bits by each library, and the choice between them."""

import logging
import time

import pytest
import torch

from megatron.early_exit.checkpoint.quantization import dequantize, quantize
from megatron.early_exit.inference.model import exact_products
from megatron.early_exit.inference.model.exact_products import (
    FastestLibrary,
    FbgemmMatrix,
    OneDnnMatrix,
    exact_libraries,
    is_exact,
)

LIBRARIES = pytest.mark.parametrize("library", [FbgemmMatrix, OneDnnMatrix])


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def whole_rows(*shape):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(-63, 64, shape, generator=generator).float()


def test_both_are_there():
    assert list(exact_libraries()) == ["FBGEMM", "oneDNN"]


@LIBRARIES
@pytest.mark.parametrize("shape", [(1, 1), (24, 16), (61, 33), (130, 577)])
@pytest.mark.parametrize("count", [1, 2, 7, 16])
def test_products_are_those_of_whole_numbers(library, shape, count):
    values, _ = quantize(random(*shape))
    rows = whole_rows(count, shape[1])
    found = library(values, torch.ones(len(values))).multiply(rows)
    assert torch.equal(found, (rows.double() @ values.double().t()).float())


@LIBRARIES
def test_rows_are_rounded_and_matrices_are_scaled(library):
    values, scale = quantize(random(20, 30))
    matrix = library(values, scale)
    rows = whole_rows(3, 30)
    found = matrix.multiply(rows + 0.4)
    assert torch.equal(found, matrix.multiply(rows))
    torch.testing.assert_close(found, rows @ dequantize(values, scale).t())
    assert torch.equal(matrix.dense(), dequantize(values, scale))


def test_both_give_the_same_bits():
    values, scale = quantize(random(70, 96))
    rows = whole_rows(5, 96)
    by_one, by_other = (one(values, scale).multiply(rows) for one in (FbgemmMatrix, OneDnnMatrix))
    assert torch.equal(by_one, by_other)


@LIBRARIES
@pytest.mark.parametrize("num_inputs", [1, 2, 64, 577, 14336])
def test_the_greatest_sums_are_exact(library, num_inputs):
    assert is_exact(library, num_inputs)


class Saturating(FbgemmMatrix):
    """What a library does where sums of two products do not fit."""

    def multiply(self, rows):
        return super().multiply(rows).clamp(-32768, 32767)


class Slow(FbgemmMatrix):
    def multiply(self, rows):
        time.sleep(0.01)
        return super().multiply(rows)


@pytest.mark.parametrize(
    ("libraries", "chosen"),
    [
        ({"first": Slow, "second": FbgemmMatrix}, FbgemmMatrix),
        ({"first": FbgemmMatrix, "second": Slow}, FbgemmMatrix),
        ({"first": Saturating, "second": Slow}, Slow),
        ({"only": Slow}, Slow),
    ],
)
def test_the_fastest_of_the_exact_ones_is_chosen(monkeypatch, caplog, libraries, chosen):
    monkeypatch.setattr(exact_products, "exact_libraries", lambda: libraries)
    fastest = FastestLibrary()
    values, scale = quantize(random(12, 20))
    with caplog.at_level(logging.INFO, logger=exact_products.__name__):
        assert type(fastest.matrix(values, scale)) is chosen
        assert type(fastest.matrix(values, scale)) is chosen
    name = next(name for name, one in libraries.items() if one is chosen)
    (line,) = [one.message for one in caplog.records]
    assert line.startswith(f"products in 8 bits with [12, 20] by {name}")


def test_no_exact_library(monkeypatch):
    monkeypatch.setattr(exact_products, "exact_libraries", lambda: {"first": Saturating})
    with pytest.raises(RuntimeError, match="the products in 8 bits of first are not exact here"):
        FastestLibrary().matrix(*quantize(random(12, 24)))
