"""Heads captured as CUDA graphs: what a head says of some rows is one launch.

Captured are a head's branch, its projection, and what is read of its logits. Heads that share a
projection are to be evaluated in one product of it, whatever their branches: it is captured from
the projection on, too, and the branches are run before.

Shapes: n rows; h hidden size; v tokens.
"""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron.early_exit.inference.model.heads import Head
from megatron.early_exit.inference.model.kv_cache import Span
from megatron.early_exit.inference.model.linear import Function
from megatron.early_exit.inference.model.recorder import ROW_COUNTS, captured_count, preparation
from megatron.early_exit.inference.model.runner import SegmentRunner
from megatron.early_exit.inference.model.segmented_model import SegmentedModel
from megatron.early_exit.inference.modes.head_output import head_figures

_LOG = logging.getLogger(__name__)


class _Graph(NamedTuple):
    """A head captured for a number of rows: what runs it, and its figures then."""

    replay: Callable[[], None]
    figures: Tensor


class GraphedHeads:
    """The heads of a model that captures its steps. They are captured at once.

    All graphs have their inputs and their logits in the same places, since one of them is replayed
    after another, and what has come of it is copied before that.

    Args:
        model: has a recorder.
        has_final: the final head is asked, too; on stages of a pipeline but the last it is not.
    """

    def __init__(self, model: SegmentedModel, has_final: bool = True) -> None:
        assert model.recorder is not None
        self._recorder, shape = model.recorder, model.architecture
        new, most = model.word_embeddings.new_zeros, ROW_COUNTS[-1]
        self._inputs = new(most, shape.hidden_size)
        self._logits = new(most, shape.vocab_size, dtype=torch.float32)
        heads = [exit_.head for exit_ in model.exits]
        if has_final:
            heads.append(model.final_head)
        self._whole: dict[int, dict[int, _Graph]] = {}
        self._projections: dict[int, dict[int, _Graph]] = {}
        for number, head in enumerate(heads, start=1):
            _LOG.info("preparing heads: %d of %d", number, len(heads))
            # A block attends over a cache of its own. Exits may share the final head itself.
            if head.block is None and head.branch and id(head) not in self._whole:
                self._whole[id(head)] = self._record(head.logits)
        shares = Counter(id(head.projection) for head in heads)
        for head in heads:
            key = id(head.projection)
            is_apart = shares[key] > 1 or id(head) not in self._whole
            if is_apart and key not in self._projections:
                self._projections[key] = self._record(head.project)

    @classmethod
    def of(cls, model: SegmentedModel, has_final: bool = True) -> "GraphedHeads | None":
        """The captured heads of a model; None where nothing is captured."""
        return None if model.recorder is None else cls(model, has_final)

    def serves(self, num_rows: int) -> bool:
        """Whether heads have been captured for so many rows."""
        return num_rows <= ROW_COUNTS[-1]

    def evaluate(self, head: Head, hidden: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """What a head without a block says of a residual stream.

        Args:
            head: of the model.
            hidden: [n, h], in one part or several.

        Returns:
            Its logits [n, v] in fp32, and their figures [3, n], see `head_figures`.
        """
        graphs = self._whole.get(id(head), self._projections.get(id(head.projection)))
        assert graphs is not None
        return self._replay(graphs, hidden)

    def evaluate_exit(
        self, runner: SegmentRunner, index: int, spans: Sequence[Span]
    ) -> tuple[Tensor, Tensor]:
        """What an exit says of the last position of each span, after its segment ran: with a row
        for each of n spans the logits [n, v] in fp32, and their figures [3, n], see `evaluate`."""
        head = runner.model.exits[index].head
        if head.block is not None:
            return self.project(head, [runner.last_features(index, spans)])
        return self.evaluate(head, [runner.last_positions(index, spans)])

    def project(self, head: Head, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """What the heads that share the projection of `head` say, all of them in one product.

        Args:
            head: any of them.
            features: of each [n of it, h], see `Head.features`.

        Returns:
            The logits [n, v] of all rows in fp32, and their figures [3, n].
        """
        return self._replay(self._projections[id(head.projection)], features)

    def _replay(self, graphs: dict[int, _Graph], parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        count = 0
        for part in parts:
            self._inputs[count : count + len(part)].copy_(part)
            count += len(part)
        # Rows that are missing are those of earlier steps: nobody looks at what comes of them.
        graph = graphs[captured_count(count)]
        graph.replay()
        return self._logits[:count].clone(), graph.figures[:, :count].clone()

    @torch.inference_mode()
    def _record(self, function: Function) -> dict[int, _Graph]:
        """Capture a function, [n, h] to logits [n, v], for all numbers of rows."""
        with preparation():
            return {count: self._record_one(function, count) for count in reversed(ROW_COUNTS)}

    def _record_one(self, function: Function, count: int) -> _Graph:
        inputs, logits = self._inputs[:count], self._logits[:count]

        def work() -> Tensor:
            logits.copy_(function(inputs))
            return head_figures(logits)

        return _Graph(*self._recorder.record(work))
