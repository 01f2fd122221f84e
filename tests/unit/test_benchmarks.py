"""What benchmarks build on the engine's inner parts still fits them."""

import sys
from pathlib import Path

import pytest
import torch

from megatron.early_exit.inference.modes.early_exit import EarlyExitMode
from tests.helpers.tiny_models import make_model

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def found(monkeypatch):
    """The folder of the benchmarks is where modules are looked for."""
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])


@pytest.fixture
def decoder(found):
    from decode_single import EveryNth
    from decode_turns import Decoder

    return Decoder(make_model(exits=(1, 3)).segmented, batch=2, tokens=8), EveryNth


def exits_of(decoder, monkeypatch) -> list[int]:
    layers: list[int] = []
    submit = decoder.engine.submit

    def noted(*args):
        request = submit(*args)
        inner = request.take

        def taken(sampled):
            layers.append(sampled.exit_layer)
            return inner(sampled)

        request.take = taken
        return request

    monkeypatch.setattr(decoder.engine, "submit", noted)
    return layers


def test_settings_of_the_decoder_leave_where_they_say(decoder, monkeypatch):
    turns, every_nth = decoder
    layers = exits_of(turns, monkeypatch)
    assert turns.full() > 0
    assert set(layers) == {4}
    layers.clear()
    assert turns.leaving(0.0, (3,)) > 0
    assert set(layers) == {3}
    layers.clear()
    assert turns.leaving(lambda _: every_nth(3), (1,)) > 0
    assert set(layers) == {1, 4}
    layers.clear()
    assert turns.depths([1, 3]) > 0
    assert set(layers) == {1, 3}
    layers.clear()
    assert turns.drafting() > 0
    assert 4 in layers
    layers.clear()
    asked = questions(monkeypatch)
    assert turns.in_vain() > 0
    assert set(layers) == {4}
    assert set(asked) == {0, 1}


def questions(monkeypatch) -> list[int]:
    """Exits that have been asked, in mode `early_exit`."""
    asked: list[int] = []
    at_exit = EarlyExitMode.at_exit

    def noted(self, exit_index, *args):
        asked.append(exit_index)
        return at_exit(self, exit_index, *args)

    monkeypatch.setattr(EarlyExitMode, "at_exit", noted)
    return asked


@pytest.mark.usefixtures("found")
def test_bare_products_and_bytes_of_weights_in_8_bits():
    from decode_models import FastestLibrary, Weights, products
    from decode_small_weights import quantized

    model = make_model(exits=(1, 3))
    weights = Weights(model.architecture, model.early_exit, model.weights)
    small = quantized(weights)
    matrices = [*weights.layers(0, 4), weights.head]
    whole = [*small.layers(0, 4), small.head]
    assert all(one.scale is None for one in matrices)
    for matrix, one in zip(matrices, whole, strict=True):
        x = torch.randn(3, matrix.values.shape[1])
        exact = x @ matrix.values.t()
        torch.testing.assert_close(matrix.packed_product(FastestLibrary())(x), exact)
        error = (one.packed_product(FastestLibrary())(x) - exact).abs().max()
        assert 0 < error < 0.02 * exact.abs().max()
    products(whole, 2, small.dtype)()
    segments, head = weights.segment_bytes()
    assert small.segment_bytes() == ([size // 4 for size in segments], head // 4)


@pytest.mark.usefixtures("found")
def test_the_limit_of_drafts_is_that_of_the_bytes_they_read():
    from decode_drafts import limit
    from decode_models import Weights

    model = make_model(exits=(1, 3))
    weights = Weights(model.architecture, model.early_exit, model.weights)
    (first, *others), head = weights.segment_bytes()
    full, question = first + sum(others) + head, first + head
    assert limit(weights, 0.0) == pytest.approx(full / (full + question))
    assert limit(weights, 1.0) == pytest.approx(2 * full / (full + question))
