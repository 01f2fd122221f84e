"""Captured layers, with a recorder that a CPU can play and layers that need no compiler."""

import gc
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from megatron.early_exit.inference.model import graphs
from megatron.early_exit.inference.model.graphs import ROW_COUNTS, CudaGraphRecorder, GraphedLayers
from megatron.early_exit.inference.model.kv_cache import KVCache, Span
from megatron.early_exit.inference.model.passes import Pass

CPU = torch.device("cpu")
WIDTH = 4


class Recorder:
    """Counts what it captures."""

    def __init__(self) -> None:
        self.count = 0

    def record(self, work):
        self.count += 1
        result = work()
        return lambda: result.copy_(work()), result


class PlusPositions:
    """Stands in for layers: adds its slot and position to each row."""

    def run(self, layers, caches, hidden, places):
        return hidden + places.slots[:, None] * 100 + places.positions[:, None]


def cache_of(capacity: int = 300) -> KVCache:
    return KVCache(1, 5, capacity, 1, 2, torch.float32, CPU)


def warmed_up(recorder: Recorder, cache: KVCache) -> GraphedLayers:
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
    recorder, cache = Recorder(), cache_of()
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
    layers = warmed_up(Recorder(), cache)
    for spans in ([Span(2, 4, 9)], [Span(3, 1, 2), Span(0, 5, 8), Span(1, 0, 60)]):
        ran(layers, cache, spans, last_only)


def test_long_passes_and_other_caches_are_not_served():
    """What is scored has a cache of its own, for which capturing would not pay."""
    cache = cache_of()
    layers = warmed_up(Recorder(), cache)
    assert layers.serves(Pass(cache, [Span(0, 0, 64)], None, 1))
    assert not layers.serves(Pass(cache, [Span(0, 0, 65)], None, 1))
    assert not layers.serves(Pass(cache_of(), [Span(0, 0, 1)], None, 1))


def test_graphs_go_with_their_caches():
    cache = cache_of()
    layers = warmed_up(Recorder(), cache)
    assert len(layers._graphs) == 1
    del cache
    gc.collect()
    assert len(layers._graphs) == 0


def test_work_is_captured_and_replayed_on_its_own_device(monkeypatch):
    """The current device may be another one, whose stream knows nothing of the work."""
    current, log = [0], []

    @contextmanager
    def device(other):
        before, current[0] = current[0], other.index
        yield
        current[0] = before

    stream = SimpleNamespace(wait_stream=lambda other: None)
    graph = SimpleNamespace(replay=lambda: log.append(("replay", current[0])))

    def captured(graph, pool, stream):
        log.append(("capture", current[0], pool))
        return nullcontext()

    for name, fake in {
        "device": device,
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda stream: nullcontext(),
        "graph_pool_handle": lambda: ("pool", current[0]),
        "CUDAGraph": lambda: graph,
        "graph": captured,
    }.items():
        monkeypatch.setattr(graphs.torch.cuda, name, fake)
    recorder = CudaGraphRecorder(torch.device("cuda", 1))
    ran_on: list[int] = []

    def work() -> torch.Tensor:
        ran_on.append(current[0])
        return torch.ones(1)

    replay, result = recorder.record(work)
    recorder.record(work)
    replay()
    assert set(ran_on) == {1}
    assert log == [
        ("capture", 1, ("pool", 1)),
        ("capture", 1, ("pool", 1)),
        ("replay", 1),
    ]
    assert result.item() == 1
    assert current == [0]


@pytest.mark.gpu
def test_a_graph_does_its_work_again():
    recorder = CudaGraphRecorder(torch.device("cuda", torch.cuda.device_count() - 1))
    given = torch.ones(3, device=recorder._device)
    replay, result = recorder.record(lambda: given * 2)
    given.fill_(5.0)
    replay()
    assert result.tolist() == [10.0] * 3
