"""Evaluates several heads at once.

With few rows a head takes the time of reading its projection, so heads that share one are evaluated
in one product, however deep in the model they are.
"""

from collections import abc
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.early_exit.inference.model.heads import Head
from megatron.early_exit.inference.model.kv_cache import Span, row_ends
from megatron.early_exit.inference.model.runner import SegmentRunner
from megatron.early_exit.inference.modes.head_output import HeadOutput, head_outputs

HeadOutputs = dict[tuple[int, int], list[HeadOutput]]
"""What heads say about the positions that they were asked about, by segment and slot."""


@dataclass(frozen=True, slots=True)
class _HeadCall:
    """One head to evaluate for the last positions of some spans.

    Attributes:
        segment: the one that the head is behind.
        spans: of each sequence.
        counts: for each span the number of positions.
        hidden: [r, h], what has run.
        rows: those of it that the head is asked about.
    """

    segment: int
    spans: list[Span]
    counts: list[int]
    hidden: Tensor
    rows: list[int]

    def inputs(self) -> Tensor:
        """The rows that the head is asked about, [n, h]."""
        if len(self.rows) == len(self.hidden):
            return self.hidden
        return self.hidden[torch.tensor(self.rows, device=self.hidden.device)]


class HeadBatch:
    """The heads to evaluate for batches that a runner has run one after another."""

    def __init__(self, runner: SegmentRunner) -> None:
        self._runner = runner
        self._calls: list[_HeadCall] = []

    def add(
        self, segment: int, spans: abc.Sequence[Span], counts: abc.Sequence[int], hidden: Tensor
    ) -> None:
        """Add the head behind a segment.

        Args:
            segment: has been run.
            spans: what has been run.
            counts: for each the positions at its end to ask about; 0 does not ask.
            hidden: [r, h], what came of it.
        """
        ends = zip(row_ends(spans), counts, strict=True)
        rows = [row for end, count in ends for row in range(end - count, end)]
        if rows:
            asked = [span for span, count in zip(spans, counts, strict=True) if count]
            own = [count for count in counts if count]
            self._calls.append(_HeadCall(segment, asked, own, hidden, rows))

    def outputs(self) -> HeadOutputs:
        """Evaluate the heads; those that share a projection run as one product."""
        outputs: HeadOutputs = {}
        for calls, logits in self._logits():
            found = iter(head_outputs(logits))
            for call in calls:
                for span, count in zip(call.spans, call.counts, strict=True):
                    outputs[call.segment, span.slot] = [next(found) for _ in range(count)]
        return outputs

    def _logits(self) -> Iterator[tuple[list[_HeadCall], Tensor]]:
        """The logits [n, v] of as few products as possible, each with the heads that share it."""
        sharing: dict[int, list[_HeadCall]] = {}
        for call in self._calls:
            head = self._head(call)
            # A block has caches of its own, which the runner knows.
            product = id(head.projection) if head.block is None else id(call)
            sharing.setdefault(product, []).append(call)
        for calls in sharing.values():
            yield calls, self._alone(calls[0]) if len(calls) == 1 else self._together(calls)

    def _alone(self, call: _HeadCall) -> Tensor:
        if call.segment < len(self._runner.model.exits):
            return self._runner.exit_logits(call.segment, call.spans)
        return self._runner.final_logits(call.inputs())

    def _together(self, calls: list[_HeadCall]) -> Tensor:
        features = [self._head(call).features(call.inputs()) for call in calls]
        return self._head(calls[0]).project(torch.cat(features))

    def _head(self, call: _HeadCall) -> Head:
        model = self._runner.model
        if call.segment < len(model.exits):
            return model.exits[call.segment].head
        return model.final_head
