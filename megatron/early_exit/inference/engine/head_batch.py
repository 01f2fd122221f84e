"""Evaluates several heads at once.

With few rows a head takes the time of reading its projection, so heads that share one are evaluated
in one product, however deep in the model they are.
"""

from collections import abc
from functools import partial

import torch
from torch import Tensor

from megatron.early_exit.inference.engine.gate_batch import GateAnswers
from megatron.early_exit.inference.engine.graphed_heads import GraphedHeads
from megatron.early_exit.inference.engine.head_reading import (
    HeadCall,
    HeadLogits,
    HeadOutputs,
    read,
)
from megatron.early_exit.inference.model.heads import Head
from megatron.early_exit.inference.model.kv_cache import Span, row_ends
from megatron.early_exit.inference.model.runner import SegmentRunner
from megatron.early_exit.inference.modes.measures import Judging
from megatron.early_exit.inference.modes.mode import FINAL, DecodingMode
from megatron.early_exit.inference.transfer import upload


class HeadBatch:
    """The heads to evaluate for batches that a runner has run one after another.

    Args:
        runner: has run them.
        graphed: the heads as they have been captured, where they have.
        answers: of gates that have been asked already: the confidences of those exits.
    """

    def __init__(
        self,
        runner: SegmentRunner,
        graphed: GraphedHeads | None = None,
        answers: GateAnswers | None = None,
    ) -> None:
        self._runner, self._graphed = runner, graphed
        self._answers = answers or GateAnswers()
        self._calls: list[HeadCall] = []

    def add(
        self,
        segment: int,
        spans: abc.Sequence[Span],
        modes: abc.Sequence[DecodingMode],
        counts: abc.Sequence[int],
        hidden: Tensor,
    ) -> None:
        """Add the head behind a segment.

        Args:
            segment: has been run.
            spans: what has been run.
            modes: for each the mode of its sequence.
            counts: for each the positions at its end to ask about; 0 does not ask.
            hidden: [r, h], what came of it.
        """
        if not any(counts):
            return
        ends = zip(row_ends(spans), counts, strict=True)
        rows = [row for end, count in ends for row in range(end - count, end)]
        head = segment if segment < len(self._runner.model.exits) else FINAL
        asked = [span for span, count in zip(spans, counts, strict=True) if count]
        asking = [mode for mode, count in zip(modes, counts, strict=True) if count]
        own = [count for count in counts if count]
        self._calls.append(HeadCall(segment, head, asked, asking, own, hidden, rows))

    def outputs(self) -> HeadOutputs:
        """Evaluate the heads; those that share a projection run as one product. Where that has to
        wait for the device, it does once for all of them."""
        return read([self._evaluate(calls) for calls in self._sharing()], self._answers)

    def _sharing(self) -> abc.Collection[list[HeadCall]]:
        """The calls of each product, for as few products as possible."""
        sharing: dict[int, list[HeadCall]] = {}
        for call in self._calls:
            head = self._head(call)
            # A block has caches of its own, which the runner knows.
            product = id(head.projection) if head.block is None else id(call)
            sharing.setdefault(product, []).append(call)
        return sharing.values()

    def _evaluate(self, calls: list[HeadCall]) -> HeadLogits:
        graphed, figures = self._graphed, None
        if graphed is not None and graphed.serves(sum(len(call.rows) for call in calls)):
            logits, figures = self._replayed(graphed, calls)
        else:
            logits = self._alone(calls[0]) if len(calls) == 1 else self._together(calls)
        return HeadLogits(calls, logits.to(torch.float32), figures, self._judging(calls))

    def _judging(self, calls: list[HeadCall]) -> Judging | None:
        measures = [
            mode.rule.measure
            for call in calls
            for mode, count in zip(call.modes, call.counts, strict=True)
            for _ in range(count)
        ]
        num_others = self._head(calls[0]).num_others
        return Judging.by(measures, num_others, partial(self._streams, calls))

    def _replayed(self, graphed: GraphedHeads, calls: list[HeadCall]) -> tuple[Tensor, Tensor]:
        call, head = calls[0], self._head(calls[0])
        if head.block is not None:
            return graphed.evaluate_exit(self._runner, call.head, call.spans)
        if all(one.head == call.head for one in calls):
            return graphed.evaluate(head, [_inputs(one) for one in calls])
        return graphed.project(head, self._features(calls))

    def _streams(self, calls: list[HeadCall], rows: abc.Sequence[int]) -> tuple[Tensor, Tensor]:
        """The residual stream of rows of a product, here and at the exit before, each [n, h]."""
        here, before = [], []
        wanted, first = set(rows), 0
        for call in calls:
            asked = [row - first for row in range(first, first + len(call.rows)) if row in wanted]
            first += len(call.rows)
            if not asked:
                continue
            here.append(_inputs(call)[upload(asked, call.hidden.device)])
            before.append(self._before(call, asked))
        return torch.cat(here), torch.cat(before)

    def _before(self, call: HeadCall, asked: list[int]) -> Tensor:
        """The residual stream [n, h] at the exit before a head, of some of the positions that it is
        asked about; before the first one that is the embedding's output."""
        places = [
            (mode.sampler.sequence, position)
            for span, mode, count in zip(call.spans, call.modes, call.counts, strict=True)
            for position in range(span.end - count, span.end)
        ]
        ends = [Span(one.slot, at, at + 1) for one, at in (places[row] for row in asked)]
        if call.segment:
            return self._runner.kept(call.segment - 1, ends)
        tokens = [one.token_ids(at, at + 1)[0] for one, at in (places[row] for row in asked)]
        return self._runner.model.embedding.of_spans(tokens, ends)

    def _alone(self, call: HeadCall) -> Tensor:
        if call.head != FINAL:
            return self._runner.exit_logits(call.head, call.spans)
        return self._runner.final_logits(_inputs(call))

    def _together(self, calls: list[HeadCall]) -> Tensor:
        return self._head(calls[0]).project(torch.cat(self._features(calls)))

    def _features(self, calls: list[HeadCall]) -> list[Tensor]:
        return [self._head(call).features(_inputs(call)) for call in calls]

    def _head(self, call: HeadCall) -> Head:
        model = self._runner.model
        return model.final_head if call.head == FINAL else model.exits[call.head].head


def _inputs(call: HeadCall) -> Tensor:
    """The rows that a head is asked about, [n, h]."""
    if len(call.rows) == len(call.hidden):
        return call.hidden
    return call.hidden[upload(call.rows, call.hidden.device)]
