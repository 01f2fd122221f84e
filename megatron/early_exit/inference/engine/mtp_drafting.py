"""Has the multi-token-prediction module draft for a batch of sequences.

Shapes: n sequences, v tokens.
"""

from collections import abc

import torch

from megatron.early_exit.inference.engine.gate_batch import GateAnswers
from megatron.early_exit.inference.engine.head_reading import HeadCall, HeadLogits, read
from megatron.early_exit.inference.engine.request import Request
from megatron.early_exit.inference.model.kv_cache import Span, in_pass_order
from megatron.early_exit.inference.model.mtp_rows import MtpRows
from megatron.early_exit.inference.model.runner import SegmentRunner
from megatron.early_exit.inference.modes.head_output import HeadOutput
from megatron.early_exit.inference.modes.mode import MTP
from megatron.early_exit.inference.sequence import Sequence

_MOST_ROWS = 256
"""Of one sequence in a pass; after a pause it may lack more."""


class MtpDrafting:
    """Asks the depths of the module, one after another.

    Args:
        runner: of a model with the module.
    """

    def __init__(self, runner: SegmentRunner) -> None:
        self._head = runner.model.mtp_head
        self._rows = MtpRows(runner)

    def follow(self, sequences: abc.Sequence[Sequence]) -> None:
        """Compute the rows of parts of prompts that have been through the backbone, whose next
        tokens are known."""
        ends = {one.key: one.cached[-1] for one in sequences}
        for depth in range(1, max((one.num_depths for one in sequences), default=0) + 1):
            lacking = []
            for one in sequences:
                ends[one.key] = end = min(ends[one.key], one.num_final - depth)
                if depth <= one.num_depths and self._rows.count(depth, one.slot) < end:
                    lacking.append(one)
            if lacking:
                self._run(depth, lacking, [ends[one.key] for one in lacking])

    def ask(self, depth: int, requests: abc.Sequence[Request]) -> list[HeadOutput]:
        """What a depth says of the token behind the drafts of some sequences.

        Args:
            depth: one more than each of them has drafts. Those before it have been asked.
            requests: of the sequences.
        """
        sequences = [one.sequence for one in requests]
        order, logits = self.logits(depth, sequences)
        asking = [requests[place] for place in order]
        spans = [Span(one.sequence.slot, 0, 1) for one in asking]
        modes = [one.mode for one in asking]
        counts, rows = [1] * len(asking), list(range(len(asking)))
        call = HeadCall(0, MTP, spans, modes, counts, logits, rows)
        outputs = read([HeadLogits([call], logits)], GateAnswers())
        return [outputs[0, one.slot][0] for one in sequences]

    def logits(
        self, depth: int, sequences: abc.Sequence[Sequence]
    ) -> tuple[list[int], torch.Tensor]:
        """The same as numbers.

        Returns:
            The places of the sequences in the order of their rows, and logits [n, v] in fp32.
        """
        # The last token has not been through the backbone yet.
        ends = [one.num_final - 1 for one in sequences]
        while lacking := [
            (one, end)
            for one, end in zip(sequences, ends, strict=True)
            if end - self._rows.count(depth, one.slot) > _MOST_ROWS
        ]:
            self._run(
                depth,
                [one for one, _ in lacking],
                [self._rows.count(depth, one.slot) + _MOST_ROWS for one, _ in lacking],
            )
        order, hidden = self._run(depth, sequences, ends, last_only=True)
        return order, self._head.logits(hidden).to(torch.float32)

    def _run(
        self,
        depth: int,
        sequences: abc.Sequence[Sequence],
        ends: abc.Sequence[int],
        last_only: bool = False,
    ) -> tuple[list[int], torch.Tensor]:
        """Compute the rows that some sequences lack at a depth.

        Args:
            ends: behind the last row of each.

        Returns:
            The places of the sequences in the order in which they have run, and what came of it.
        """
        spans = [
            Span(one.slot, self._rows.count(depth, one.slot), end)
            for one, end in zip(sequences, ends, strict=True)
        ]
        order = sorted(range(len(spans)), key=lambda place: in_pass_order(spans[place]))
        ordered = [spans[place] for place in order]
        tokens = [
            token
            for place in order
            for token in sequences[place].token_ids(
                spans[place].start + depth, spans[place].end + depth
            )
        ]
        return order, self._rows.run(depth, ordered, tokens, last_only)
