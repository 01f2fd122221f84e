"""Asks several heads at once.

With few rows a head takes the time of reading its projection, so heads that share one are asked in
one product, however deep in the model they are.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.early_exit.inference.compute.heads import Head
from megatron.early_exit.inference.compute.runner import SegmentRunner
from megatron.early_exit.inference.compute.spans import Span, row_ends
from megatron.early_exit.inference.decoding.confidence import Assessment, assess

Answers = dict[tuple[int, int], list[Assessment]]
"""What heads say about the positions that they were asked about, by segment and slot."""


@dataclass(frozen=True, slots=True)
class _Question:
    """To the head behind a segment, about the last positions of some spans.

    Attributes:
        counts: for each span the number of positions.
        hidden: [r, h], what has run.
        rows: those of it that are asked about.
    """

    segment: int
    spans: list[Span]
    counts: list[int]
    hidden: Tensor
    rows: list[int]

    def asked(self) -> Tensor:
        """[n, h]."""
        if len(self.rows) == len(self.hidden):
            return self.hidden
        return self.hidden[torch.tensor(self.rows, device=self.hidden.device)]


class Questions:
    """The questions about batches that have run one after another, for one answer to all.

    Args:
        runner: has run them.
    """

    def __init__(self, runner: SegmentRunner) -> None:
        self._runner = runner
        self._questions: list[_Question] = []

    def ask(
        self, segment: int, spans: Sequence[Span], counts: Sequence[int], hidden: Tensor
    ) -> None:
        """Add a question to the head behind a segment.

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
            self._questions.append(_Question(segment, asked, own, hidden, rows))

    def answers(self) -> Answers:
        """Ask."""
        answers: Answers = {}
        for questions, logits in self._logits():
            found = iter(assess(logits))
            for question in questions:
                for span, count in zip(question.spans, question.counts, strict=True):
                    own = [next(found) for _ in range(count)]
                    answers[question.segment, span.slot] = own
        return answers

    def _logits(self) -> Iterator[tuple[list[_Question], Tensor]]:
        """Questions with the logits that answer them, as few products as possible."""
        sharing: dict[int, list[_Question]] = {}
        for question in self._questions:
            head = self._head(question)
            # A block has caches of its own, which the runner knows.
            product = id(head.projection) if head.block is None else id(question)
            sharing.setdefault(product, []).append(question)
        for questions in sharing.values():
            if len(questions) == 1:
                yield questions, self._alone(questions[0])
            else:
                yield questions, self._together(questions)

    def _alone(self, question: _Question) -> Tensor:
        if question.segment < len(self._runner.model.exits):
            return self._runner.exit_logits(question.segment, question.spans)
        return self._runner.final_logits(question.asked())

    def _together(self, questions: list[_Question]) -> Tensor:
        heads = [self._head(question) for question in questions]
        features = [
            head.features(question.asked()) for head, question in zip(heads, questions, strict=True)
        ]
        return heads[0].project(torch.cat(features))

    def _head(self, question: _Question) -> Head:
        model = self._runner.model
        if question.segment < len(model.exits):
            return model.exits[question.segment].head
        return model.final_head
