"""Compiled layers captured as CUDA graphs: a step of decoding is one launch for each segment.

A graph is replayed on the same memory, so its inputs are copied to where they were at its capture,
and sizes are rounded up to few: rows to a power of two (the first one stands in for those that are
missing; what it writes twice is the same), positions likewise (those beyond a row's own are
masked).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.early_exit.inference.model.compiled import SHORTEST, LayerCompiler
from megatron.early_exit.inference.model.kv_cache import KVCache
from megatron.early_exit.inference.model.passes import Pass

_FEWEST_POSITIONS = 128

Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]
"""Takes work that has run before; gives what does it again, and where its result will be."""


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
        capture: what records the work; by default a CUDA graph.
    """

    def __init__(
        self,
        compiler: LayerCompiler,
        layers: Sequence[Mapping[str, Tensor]],
        capture: Capture | None = None,
    ) -> None:
        self._compiler, self._layers = compiler, layers
        self._capture = cuda_graph if capture is None else capture
        self._graphs: dict[tuple[KVCache, int, int], _Graph] = {}

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
        graph = self._graphs.get((this.cache, rows, length))
        if graph is None:
            zeros = hidden.new_zeros(rows, hidden.shape[1])
            graph = self._record(this.cache, zeros, places, length)
            self._graphs[this.cache, rows, length] = graph
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
            return self._compiler.run(
                self._layers, caches, hidden, slots, positions, length, is_captured=True
            )

        replay, result = self._capture(work)
        return _Graph(hidden, places, replay, result)


def cuda_graph(work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Capture work on the current device; it runs a few times for that."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()
    return graph.replay, result


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()
