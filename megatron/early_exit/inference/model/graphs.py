"""Compiled layers captured as CUDA graphs: a step of decoding is one launch for each segment.

A graph is replayed on the same memory, so its inputs are copied to where they were at its capture,
and the number of rows is rounded up to a power of two. Slots and positions are inputs, too, so a
graph serves sequences of all lengths, and several positions of a sequence. All are captured before
the first request.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from megatron.early_exit.inference.model.compiled import LayerCompiler
from megatron.early_exit.inference.model.kv_cache import KVCache
from megatron.early_exit.inference.model.passes import Pass
from megatron.early_exit.inference.model.rows_attention import row_places
from megatron.early_exit.inference.transfer import upload

ROW_COUNTS = (1, 2, 4, 8, 16, 32, 64)
"""Numbers of rows for which steps are captured; with more of them, a step takes so long that
launching its kernels does not matter."""
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

    def take(self, hidden: Tensor, places: list[tuple[int, int]]) -> None:
        """Take the rows [n, h] that run next, with their slots and positions.

        The first one stands in for those that are missing: what it writes again is the same.
        """
        count, rows = len(hidden), len(self.hidden)
        places = places + places[:1] * (rows - count)
        self.places.copy_(upload(places, self.places.device).t())
        self.hidden[:count] = hidden
        self.hidden[count:] = hidden[0]


class GraphedLayers:
    """Consecutive whole layers of a segment, for passes over few positions, whosever they are.

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
        self._graphs: WeakKeyDictionary[KVCache, dict[int, _Graph]] = WeakKeyDictionary()

    def warm_up(self, cache: KVCache, hidden_size: int) -> None:
        """Capture the steps over a cache for all numbers of rows, the most first: the others have
        room in the memory that those take."""
        graphs = self._graphs.setdefault(cache, {})
        for count in reversed(ROW_COUNTS):
            if count not in graphs:
                graphs[count] = self._record(cache, count, hidden_size)

    def serves(self, this: Pass) -> bool:
        """Whether steps over the cache of a pass have been captured, and it is over few positions.

        The caches of texts that are scored are of no use for another text, so nothing is captured
        for them.
        """
        return this.count <= ROW_COUNTS[-1] and this.cache in self._graphs

    def __call__(self, hidden: Tensor, this: Pass) -> Tensor:
        """Residual stream [r, h] in front of the layers -> behind them, the rows that ask."""
        count = len(hidden)
        graph = self._graphs[this.cache][_power_of_two(count)]
        graph.take(
            hidden, [(slot, i) for slot, start, end in this.spans for i in range(start, end)]
        )
        graph.replay()
        return graph.result[:count].clone() if this.results is None else graph.result[this.results]

    def _record(self, cache: KVCache, count: int, hidden_size: int) -> _Graph:
        hidden = cache.data.new_zeros(count, hidden_size)
        places = torch.zeros(2, count, dtype=torch.int64, device=hidden.device)
        slots, positions = places.unbind()
        caches, num_places = cache.by_attention[: len(self._layers)], cache.data.shape[2]

        def work() -> Tensor:
            return self._compiler.run(
                self._layers, caches, hidden, row_places(slots, positions, num_places)
            )

        replay, result = self._recorder.record(work)
        return _Graph(hidden, places, replay, result)


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()
