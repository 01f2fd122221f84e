"""What benchmarks build on the engine's inner parts still fits them."""

import sys
from pathlib import Path

import pytest

from tests.helpers.tiny_models import make_model

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def decoder(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
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
