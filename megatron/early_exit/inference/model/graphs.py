"""Compiled layers captured as CUDA graphs: a step of decoding is one launch for each segment.

Slots and positions are inputs of a graph, so it serves sequences of all lengths, and several
positions of a sequence. At the start of a model tokens are inputs, too. All are captured before the
first request.

Shapes: r rows that are captured, of which n are in use; h hidden size.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from megatron.early_exit.inference.model.compiled import LayerCompiler
from megatron.early_exit.inference.model.embedding import Embedding
from megatron.early_exit.inference.model.kv_cache import KVCache
from megatron.early_exit.inference.model.layers import Attention, Mlp
from megatron.early_exit.inference.model.passes import Pass
from megatron.early_exit.inference.model.recorder import ROW_COUNTS, Recorder, captured_count
from megatron.early_exit.inference.model.rows_attention import row_places
from megatron.early_exit.inference.transfer import upload_to


@dataclass(frozen=True, slots=True)
class _Graph:
    """A captured step.

    Attributes:
        numbers: [3, r], of each row the token, or its place in `hidden`; its slot; its position.
        hidden: [r, h], where the rows go in that come from other layers.
        replay: runs it.
        result: [r, h], where they come out.
    """

    numbers: Tensor
    hidden: Tensor
    replay: Callable[[], None]
    result: Tensor

    def take(self, first_numbers: Sequence[int], this: Pass) -> None:
        """Take what `numbers` says of the n rows of a pass that run next.

        The first one stands in for those that are missing: what it writes again is the same.
        """
        spans, missing = this.spans, self.numbers.shape[1] - this.count
        slots = [slot for slot, start, end in spans for _ in range(start, end)]
        positions = [position for _, start, end in spans for position in range(start, end)]
        numbers = (first_numbers, slots, positions)
        upload_to([[*own, *[own[0]] * missing] for own in numbers], self.numbers)


class GraphedLayers:
    """The layers of a segment, for passes over few positions, whosever they are.

    Args:
        compiler: of the model's layers.
        layers: the tensors of those that are whole, see `CompiledLayers`: matrices
            [outputs, inputs] or in 8 bits [outputs, 1], and vectors [entries].
        recorder: captures them.
        embedding: of the tokens that are their input; None where that is a residual stream.
        mlp: of the layer before them, if its attention is not in the segment.
        attention: of the layer behind them, if its MLP is not in the segment. Neither is compiled.
    """

    def __init__(
        self,
        compiler: LayerCompiler,
        layers: Sequence[Mapping[str, Tensor]],
        recorder: Recorder,
        embedding: Embedding | None = None,
        mlp: Mlp | None = None,
        attention: Attention | None = None,
    ) -> None:
        self._compiler, self._layers, self._recorder = compiler, layers, recorder
        self._embedding, self._mlp, self._attention = embedding, mlp, attention
        # A graph is of use as long as the cache that it reads and writes.
        self._graphs: WeakKeyDictionary[KVCache, dict[int, _Graph]] = WeakKeyDictionary()

    def warm_up(self, cache: KVCache, hidden_size: int) -> None:
        """Capture the steps over a cache for all numbers of rows, the most first: the others have
        room in the memory that those take."""
        graphs = self._graphs.setdefault(cache, {})
        for count in reversed(ROW_COUNTS):
            if count not in graphs:
                graphs[count] = self._record(cache, count, hidden_size)

    @property
    def takes_tokens(self) -> bool:
        """Whether their input are tokens, for `run_tokens`, and not a residual stream."""
        return self._embedding is not None

    def serves(self, this: Pass) -> bool:
        """Whether steps over the cache of a pass have been captured, and it is over few positions.

        The caches of texts that are scored are of no use for another text, so nothing is captured
        for them.
        """
        return this.count <= ROW_COUNTS[-1] and this.cache in self._graphs

    def __call__(self, hidden: Tensor, this: Pass) -> Tensor:
        """Residual stream [n, h] in front of the layers -> behind them, the rows that ask."""
        assert not self.takes_tokens
        graph = self._graph(this)
        graph.hidden[: this.count].copy_(hidden)
        return self._run(graph, range(this.count), this)

    def run_tokens(self, tokens: Sequence[int], this: Pass) -> Tensor:
        """The n tokens of a pass -> the residual stream behind the layers, [n, h], or only those
        of the rows that ask, [rows that ask, h]."""
        assert self.takes_tokens
        return self._run(self._graph(this), tokens, this)

    def _graph(self, this: Pass) -> _Graph:
        return self._graphs[this.cache][captured_count(this.count)]

    @staticmethod
    def _run(graph: _Graph, first_numbers: Sequence[int], this: Pass) -> Tensor:
        graph.take(first_numbers, this)
        graph.replay()
        if this.results is None:
            return graph.result[: this.count].clone()
        return graph.result[this.results]

    def _record(self, cache: KVCache, count: int, hidden_size: int) -> _Graph:
        hidden = cache.data.new_zeros(count, hidden_size)
        numbers = torch.zeros(3, count, dtype=torch.int64, device=hidden.device)
        own, slots, positions = numbers.unbind()
        caches, num_places = cache.by_attention, cache.data.shape[2]
        num_layers, embedding = len(self._layers), self._embedding

        def work() -> Tensor:
            rows = hidden[own] if embedding is None else embedding(own, positions)
            places = row_places(slots, positions, num_places)
            if self._mlp is not None:
                rows = self._mlp(rows)
            rows = self._compiler.run(self._layers, caches[:num_layers], rows, places)
            if self._attention is not None:
                this = self._compiler.rows_pass(caches[num_layers], places)
                rows = self._attention(rows, this)
            return rows

        replay, result = self._recorder.record(work)
        return _Graph(numbers, hidden, replay, result)
