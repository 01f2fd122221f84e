"""Evaluates several heads at once.

With few rows a head takes the time of reading its projection, so heads that share one are evaluated
in one product, however deep in the model they are.
"""

from collections import abc
from collections.abc import Iterator

import torch
from torch import Tensor

from megatron.early_exit.inference.engine.head_reading import HeadCall, HeadOutputs, read
from megatron.early_exit.inference.model.heads import Head
from megatron.early_exit.inference.model.kv_cache import Span, row_ends
from megatron.early_exit.inference.model.runner import SegmentRunner
from megatron.early_exit.inference.modes.mode import FINAL, DecodingMode
from megatron.early_exit.inference.transfer import upload


class HeadBatch:
    """The heads to evaluate for batches that a runner has run one after another."""

    def __init__(self, runner: SegmentRunner) -> None:
        self._runner = runner
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
        return read([(calls, logits.to(torch.float32)) for calls, logits in self._logits()])

    def _logits(self) -> Iterator[tuple[list[HeadCall], Tensor]]:
        """The logits [n, v] of as few products as possible, each with the heads that share it."""
        sharing: dict[int, list[HeadCall]] = {}
        for call in self._calls:
            head = self._head(call)
            # A block has caches of its own, which the runner knows.
            product = id(head.projection) if head.block is None else id(call)
            sharing.setdefault(product, []).append(call)
        for calls in sharing.values():
            yield calls, self._alone(calls[0]) if len(calls) == 1 else self._together(calls)

    def _alone(self, call: HeadCall) -> Tensor:
        if call.head != FINAL:
            return self._runner.exit_logits(call.head, call.spans)
        return self._runner.final_logits(_inputs(call))

    def _together(self, calls: list[HeadCall]) -> Tensor:
        features = [self._head(call).features(_inputs(call)) for call in calls]
        return self._head(calls[0]).project(torch.cat(features))

    def _head(self, call: HeadCall) -> Head:
        model = self._runner.model
        return model.final_head if call.head == FINAL else model.exits[call.head].head


def _inputs(call: HeadCall) -> Tensor:
    """The rows that a head is asked about, [n, h]."""
    if len(call.rows) == len(call.hidden):
        return call.hidden
    return call.hidden[upload(call.rows, call.hidden.device)]
