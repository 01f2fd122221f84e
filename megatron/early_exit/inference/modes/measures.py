"""How sure a head is: numbers from 0 to 1 that rise with sureness.

Shapes: n rows, v tokens, h hidden size.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from megatron.early_exit.config import EarlyExitConfig
from megatron.early_exit.inference.modes.rows import some_rows

DEFAULT_MEASURE = EarlyExitConfig.exit_measure
"""The largest probability: it comes with what is read of every head in any case."""
GATE = "gate"
"""What an exit's gate says: it is asked before the exit, which is evaluated only where the rule
takes its token. The final head has no gate: its confidence is the largest probability."""
_BLOCK = 1024
"""Logits among which the largest one is searched for together, see `_two_largest`."""
_NOTHING = -200.0
"""A logarithm of a probability that fp32 knows as 0."""

Streams = Callable[[Sequence[int]], tuple[Tensor, Tensor]]
"""The residual stream of some rows where a head is, and at the exit before, each [n, h]."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """What confidences of some rows are computed from.

    Attributes:
        rows: which of those of a product of heads.
        logits: [n, v] in fp32.
        normalizers, best_logprobs: [n] in fp32, see `HeadOutput`.
        num_answers: the first tokens of v that the heads can answer with; the others have logits of
            -inf.
        streams: gives the residual streams of rows.
    """

    rows: Sequence[int]
    logits: Tensor
    normalizers: Tensor
    best_logprobs: Tensor
    num_answers: int
    streams: Streams


def _margin(heads: Evidence) -> Tensor:
    """The difference of the two largest probabilities."""
    first, second = _two_largest(heads.logits).unbind(dim=-1)
    # Not a difference of probabilities: that of close ones loses its digits.
    return -heads.best_logprobs.exp() * (second - first).expm1()


def _certainty(heads: Evidence) -> Tensor:
    """1 - H / ln(number of answers), H being the entropy."""
    logprobs = heads.logits[:, : heads.num_answers] - heads.normalizers[:, None]
    logprobs = logprobs.clamp_(min=_NOTHING)
    entropy = -torch.linalg.vecdot(logprobs.exp(), logprobs)
    return (1 - entropy / math.log(heads.num_answers)).clamp(0, 1)


def _similarity(heads: Evidence) -> Tensor:
    """The cosine of the residual stream here and at the exit before; negative ones count as 0."""
    here, before = (one.to(torch.float32) for one in heads.streams(heads.rows))
    return functional.cosine_similarity(here, before, dim=-1).clamp(0, 1)


def needs_streams(measure: str) -> bool:
    """Whether confidence depends on the residual stream."""
    return measure == "similarity"


MEASURES: dict[str, Callable[[Evidence], Tensor]] = {
    "margin": _margin,
    "entropy": _certainty,
    "similarity": _similarity,
}
"""How confidences [n] in fp32 are computed, by the measure. `DEFAULT_MEASURE` needs no more than
what is read of a head in any case, and `GATE` nothing of a head."""


@dataclass(frozen=True, slots=True)
class Judging:
    """By what measures the heads of one product are judged.

    Attributes:
        measures: for each row of the product.
        num_others: tokens at the end of the vocabulary that its heads cannot answer with.
        streams: gives the residual streams of rows.
    """

    measures: Sequence[str]
    num_others: int
    streams: Streams

    @classmethod
    def by(cls, measures: Sequence[str], num_others: int, streams: Streams) -> "Judging | None":
        """How rows are judged; None where that takes none of `MEASURES`."""
        if not any(measure in MEASURES for measure in measures):
            return None
        return cls(measures, num_others, streams)

    def confidences(self, logits: Tensor, figures: Tensor) -> list[tuple[list[int], Tensor]]:
        """The confidences of rows that are judged by one of `MEASURES`.

        Args:
            logits: [n, v] in fp32.
            figures: [3, n], what `head_figures` gives of them.

        Returns:
            Rows, and the confidences of those, [n of them] in fp32 on the device.
        """
        wanted: dict[str, list[int]] = {}
        for row, measure in enumerate(self.measures):
            if measure in MEASURES:
                wanted.setdefault(measure, []).append(row)
        return [
            (rows, self._of(measure, rows, logits, figures)) for measure, rows in wanted.items()
        ]

    def _of(self, measure: str, rows: list[int], logits: Tensor, figures: Tensor) -> Tensor:
        own, index = some_rows(logits, rows)
        normalizers, best_logprobs, _ = figures if index is None else figures[:, index]
        num_answers = logits.shape[-1] - self.num_others
        evidence = Evidence(rows, own, normalizers, best_logprobs, num_answers, self.streams)
        return MEASURES[measure](evidence)


def _two_largest(logits: Tensor) -> Tensor:
    """The two largest of each row, [n, 2], the larger one first."""
    excess = logits.shape[-1] % _BLOCK
    if excess:
        logits = functional.pad(logits, (0, _BLOCK - excess), value=-math.inf)
    blocks = logits.unflatten(-1, (-1, _BLOCK))
    if blocks.shape[1] == 1:
        return logits.topk(2).values
    # Each is in one of the two blocks with the largest maxima.
    index = blocks.amax(dim=-1).topk(2).indices[..., None].expand(-1, -1, _BLOCK)
    return blocks.gather(1, index).flatten(1).topk(2).values
