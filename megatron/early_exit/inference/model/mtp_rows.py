"""Runs the multi-token-prediction module over the rows of many sequences.

Row i of depth k exists once row i of depth k - 1 does and token i + k is known. What a depth lacks
is computed in the pass in which it is next asked, or before. Rows with tokens that turn out to be
others are forgotten by the number of tokens that each depth has seen, as an exit's block forgets
positions (`SegmentRunner.truncate`).
"""

from collections.abc import Sequence

from torch import Tensor

from megatron.early_exit.inference.model.kv_cache import Span, row_ends
from megatron.early_exit.inference.model.runner import SegmentRunner
from megatron.early_exit.inference.transfer import upload


class MtpRows:
    """The rows of each depth, in the caches of a runner.

    Args:
        runner: of a model with the module.
    """

    def __init__(self, runner: SegmentRunner) -> None:
        self._runner, self._model = runner, runner.model
        self._first = len(runner.model.exits)

    def count(self, depth: int, slot: int) -> int:
        """Rows that a slot has at a depth, from 1 on; at depth 0 it is the caller who knows."""
        return max(self._runner.block_lengths(slot)[self._first + depth - 1] - depth, 0)

    def run(
        self, depth: int, spans: Sequence[Span], tokens: Sequence[int], last_only: bool = False
    ) -> Tensor:
        """Compute rows of a depth behind those that it has.

        Args:
            depth: 1 or more.
            spans: of rows, sorted by `in_pass_order`.
            tokens: for each row i that at the position i + `depth`.
            last_only: only the last row of each span needs a result.

        Returns:
            Hidden states [r, h], or [n, h] of the last rows.
        """
        runner, model, block = self._runner, self._model, self._first + depth - 1
        is_deepest = depth == len(model.mtp)
        this = runner.block_pass(block, spans, last_only and is_deepest)
        # A depth has as many cuts before it as there are blocks, those of the exits included.
        hidden = runner.kept(block, spans)
        if depth == 1:
            hidden = model.final_head.features(hidden)
        ahead = [Span(slot, start + depth, end + depth) for slot, start, end in spans]
        embeddings = model.embedding.of_spans(tokens, ahead)
        hidden = model.mtp[depth - 1](embeddings, hidden, this)
        for slot, _, end in spans:
            runner.set_block_length(block, slot, end + depth)
        if is_deepest:
            return hidden
        runner.keep(block + 1, spans, this.index, hidden)
        if last_only and len(hidden) > len(spans):
            hidden = hidden[upload([end - 1 for end in row_ends(spans)], hidden.device)]
        return hidden
