"""Compiled layers captured as CUDA graphs: a step of decoding is one launch for each segment.

A graph is replayed on the same memory, so its inputs are copied to where they were at its capture,
and sizes are rounded up to few: rows to a power of two (the first one stands in for those that are
missing; what it writes twice is the same), positions likewise (those beyond a row's own are
masked).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from megatron.early_exit.inference.model.compiled import SHORTEST, LayerCompiler
from megatron.early_exit.inference.model.kv_cache import KVCache
from megatron.early_exit.inference.model.passes import Pass

_FEWEST_POSITIONS = 128
_RUNS_BEFORE = 3
"""Of work that is captured: what it does only the first times must not be part of a graph."""


class Recorder(Protocol):
    """Captures work such that it can be done again."""

    def record(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Run some work; returns what does it again, and where its result will be."""
        ...


class CudaGraphRecorder:
    """Captures work on one device as CUDA graphs, whichever device is the current one.

    The graphs are replayed one after another, so they share the memory for what lies between.

    Args:
        device: where the work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._stream = torch.cuda.Stream()
            self._pool = torch.cuda.graph_pool_handle()

    def record(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Capture some work as a graph, after it has run a few times, see `Recorder`."""
        with torch.cuda.device(self._device):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                for _ in range(_RUNS_BEFORE):
                    work()
            torch.cuda.current_stream().wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                result = work()

        def replay() -> None:
            with torch.cuda.device(self._device):
                graph.replay()

        return replay, result


@dataclass(frozen=True, slots=True)
class _Graph:
    """A captured step.

    Attributes:
        hidden: [r, h], where the rows go in.
        places: [2, r], their slots and positions.
        replay: runs it.
        result: [r, h], where they come out.
    """

    hidden: Tensor
    places: Tensor
    replay: Callable[[], None]
    result: Tensor


class GraphedLayers:
    """Consecutive whole layers of a segment, for passes with one position of each sequence.

    Args:
        compiler: of the model's layers.
        layers: see `CompiledLayers`.
        recorder: captures them.
    """

    def __init__(
        self,
        compiler: LayerCompiler,
        layers: Sequence[Mapping[str, Tensor]],
        recorder: Recorder,
    ) -> None:
        self._compiler, self._layers, self._recorder = compiler, layers, recorder
        # A graph is of use as long as the cache that it reads and writes.
        self._graphs: WeakKeyDictionary[KVCache, dict[tuple[int, int], _Graph]] = (
            WeakKeyDictionary()
        )

    def serves(self, this: Pass) -> bool:
        """Whether a pass has a single position of each of its sequences."""
        fits = this.cache.capacity >= SHORTEST
        return fits and all(end == start + 1 for _, start, end in this.spans)

    def __call__(self, hidden: Tensor, this: Pass) -> Tensor:
        """Residual stream [r, h] in front of the layers -> behind them."""
        count, rows = len(hidden), _power_of_two(len(hidden))
        spans = [*this.spans, *[this.spans[0]] * (rows - count)]
        places = torch.tensor([[s.slot for s in spans], [s.start for s in spans]])
        longest = max(span.end for span in spans)
        length = min(max(_power_of_two(longest), _FEWEST_POSITIONS), this.cache.capacity)
        graphs = self._graphs.setdefault(this.cache, {})
        graph = graphs.get((rows, length))
        if graph is None:
            zeros = hidden.new_zeros(rows, hidden.shape[1])
            graph = graphs[rows, length] = self._record(this.cache, zeros, places, length)
        graph.places.copy_(places)
        graph.hidden[:count] = hidden
        graph.hidden[count:] = hidden[0]
        graph.replay()
        return graph.result[:count].clone()

    def _record(self, cache: KVCache, hidden: Tensor, places: Tensor, length: int) -> _Graph:
        places = places.to(hidden.device)
        slots, positions = places.unbind()
        caches = cache.by_attention[: len(self._layers)]

        def work() -> Tensor:
            return self._compiler.run(self._layers, caches, hidden, slots, positions, length)

        replay, result = self._recorder.record(work)
        return _Graph(hidden, places, replay, result)


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()
