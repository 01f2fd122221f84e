"""Captured layers, with a recorder that a CPU can play and layers that need no compiler."""

import gc

import pytest
import torch

from megatron.early_exit.inference.model.embedding import Embedding
from megatron.early_exit.inference.model.graphs import GraphedLayers
from megatron.early_exit.inference.model.kv_cache import KVCache, Span
from megatron.early_exit.inference.model.passes import Pass
from megatron.early_exit.inference.model.recorder import ROW_COUNTS
from tests.helpers.cpu_recorder import CpuRecorder

CPU = torch.device("cpu")
WIDTH = 4


class PlusPositions:
    """Stands in for layers: adds its slot and position to each row."""

    def run(self, layers, caches, hidden, places):
        return hidden + places.slots[:, None] * 100 + places.positions[:, None]


def cache_of(capacity: int = 300) -> KVCache:
    return KVCache(1, 5, capacity, 1, 2, torch.float32, CPU)


def warmed_up(recorder: CpuRecorder, cache: KVCache) -> GraphedLayers:
    layers = GraphedLayers(PlusPositions(), [{}], recorder)
    layers.warm_up(cache, WIDTH)
    return layers


def ran(layers: GraphedLayers, cache: KVCache, spans: list[Span], last_only: bool = False):
    places = [(slot, i) for slot, start, end in spans for i in range(start, end)]
    hidden = torch.arange(float(len(places) * WIDTH)).view(-1, WIDTH)
    this = Pass(cache, spans, None, 1, last_only)
    assert layers.serves(this)
    expected = hidden + torch.tensor([[slot * 100 + i] for slot, i in places])
    found = layers(hidden, this)
    assert torch.equal(found, expected if this.results is None else expected[this.results])
    return found


def test_nothing_is_captured_after_the_start():
    recorder, cache = CpuRecorder(), cache_of()
    layers = warmed_up(recorder, cache)
    assert recorder.count == len(ROW_COUNTS)
    results = [ran(layers, cache, [Span(0, 5, 6)])]
    for count in (3, 4, 5, 4, 3):
        results.append(
            ran(layers, cache, [Span(slot, 7 + slot, 8 + slot) for slot in range(count)])
        )
    ran(layers, cache, [Span(1, 200, 201)])
    assert recorder.count == len(ROW_COUNTS)
    # What has been given out is not written over by the next replay.
    assert torch.equal(results[1], results[-1])


@pytest.mark.parametrize("last_only", [False, True])
def test_several_positions_of_a_sequence(last_only):
    cache = cache_of()
    layers = warmed_up(CpuRecorder(), cache)
    for spans in ([Span(2, 4, 9)], [Span(3, 1, 2), Span(0, 5, 8), Span(1, 0, 60)]):
        ran(layers, cache, spans, last_only)


def test_long_passes_and_other_caches_are_not_served():
    """What is scored has a cache of its own, for which capturing would not pay."""
    cache = cache_of()
    layers = warmed_up(CpuRecorder(), cache)
    assert layers.serves(Pass(cache, [Span(0, 0, 64)], None, 1))
    assert not layers.serves(Pass(cache, [Span(0, 0, 65)], None, 1))
    assert not layers.serves(Pass(cache_of(), [Span(0, 0, 1)], None, 1))


@pytest.mark.parametrize("has_positions", [False, True])
def test_tokens_are_embedded(has_positions):
    cache, recorder = cache_of(), CpuRecorder()
    words, places = torch.rand(30, WIDTH), torch.rand(300, WIDTH)
    embedding = Embedding(words, places if has_positions else None)
    layers = GraphedLayers(PlusPositions(), [{}], recorder, embedding)
    layers.warm_up(cache, WIDTH)
    for spans in ([Span(2, 4, 5)], [Span(3, 7, 8), Span(0, 5, 9)], [Span(1, 0, 64)]):
        this = Pass(cache, spans, None, 1)
        assert layers.takes_tokens
        assert layers.serves(this)
        tokens = [(7 * number) % 30 for number in range(this.count)]
        found = layers.run_tokens(tokens, this)
        expected = embedding.of_spans(tokens, spans)
        numbers = [slot * 100 + i for slot, start, end in spans for i in range(start, end)]
        torch.testing.assert_close(found, expected + torch.tensor(numbers)[:, None])
    assert recorder.count == len(ROW_COUNTS)


def test_graphs_go_with_their_caches():
    cache = cache_of()
    layers = warmed_up(CpuRecorder(), cache)
    assert len(layers._graphs) == 1
    del cache
    gc.collect()
    assert len(layers._graphs) == 0
