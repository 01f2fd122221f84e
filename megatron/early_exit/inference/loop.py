"""The loop that takes many requests through the segments of a model, batch by batch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron.early_exit.inference.confidence import NOT_FINITE, Assessment, assess
from megatron.early_exit.inference.modes import DecodingMode, Next
from megatron.early_exit.inference.passes import Span
from megatron.early_exit.inference.request import Request
from megatron.early_exit.inference.request_loop import RequestLoop
from megatron.early_exit.inference.results import GeneratedToken
from megatron.early_exit.inference.runner import SegmentRunner
from megatron.early_exit.inference.scheduler import Progress, Scheduler, Step
from megatron.early_exit.inference.scoring import PrefixScore, score_text


class DecodingLoop(RequestLoop):
    """Continuous batching: requests come and go between any two batches.

    What one request decides never depends on the others that happen to be in its batch.

    Args:
        runner: the model and its caches.
        scheduler: has as many slots as the runner.
    """

    def __init__(self, runner: SegmentRunner, scheduler: Scheduler) -> None:
        super().__init__(scheduler)
        self.runner = runner

    def step(self) -> list[tuple[Request, GeneratedToken]]:
        """Run one batch; where all of it goes deeper and nobody else waits, to the end of it.

        Returns:
            The tokens that came of it. A request that failed has none, and an `error`.
        """
        for progress in self.scheduler.admit():
            self.runner.truncate(progress.slot, 0)
            self.requests[progress.key].mode.start(0)
        tokens: list[tuple[Request, GeneratedToken]] = []
        step = self.scheduler.next()
        while step is not None:
            with torch.inference_mode():
                step = self._run(step, tokens)
        return tokens

    def score(self, tokens: Sequence[int], num_best: int) -> list[PrefixScore]:
        """Score every prefix of a text, see `score_text`; no request comes forward meanwhile."""
        return score_text(self.runner.model, tokens, num_best)

    def _run(self, step: Step, tokens: list[tuple[Request, GeneratedToken]]) -> Step | None:
        inputs = None
        if step.segment == 0:
            inputs = [
                token
                for progress, (_, start, end) in zip(step.sequences, step.spans, strict=True)
                for token in self.requests[progress.key].token_ids(start, end)
            ]
        hidden = self.runner.run(step.segment, step.spans, inputs)
        complete = self.scheduler.ran(step)
        if step.segment == self.scheduler.num_segments - 1:
            self._at_end(step, complete, hidden, tokens)
            return None
        deeper = self._at_exit(step, complete, tokens)
        if len(deeper) == len(self.scheduler.running) and deeper:
            return self.scheduler.batch(step.segment + 1, deeper)
        return None

    def _at_exit(
        self, step: Step, complete: list[int], tokens: list[tuple[Request, GeneratedToken]]
    ) -> list[Progress]:
        """Ask the exit behind a segment where that is wanted; returns who goes deeper."""
        index = step.segment
        asking = [i for i in complete if self._mode(step.sequences[i]).asks(index)]
        found: dict[int, Assessment] = {}
        if asking:
            logits = self.runner.exit_logits(index, [step.spans[i] for i in asking])
            found = dict(zip(asking, assess(logits), strict=True))
        deeper = []
        for i in complete:
            progress = step.sequences[i]
            if i not in found:
                verdict = Next.DEEPER
            elif found[i].is_finite:
                verdict = self._mode(progress).at_exit(index, found[i])
            else:
                self._fail(progress)
                continue
            if verdict is Next.DEEPER:
                self.scheduler.go_deeper(progress)
                deeper.append(progress)
            else:
                self._go_on(progress, verdict, tokens)
        return deeper

    def _at_end(
        self,
        step: Step,
        complete: list[int],
        hidden: Tensor,
        tokens: list[tuple[Request, GeneratedToken]],
    ) -> None:
        ends = _row_ends(step.spans)
        asked = [step.sequences[i] for i in complete]
        rows = [hidden[ends[i] - step.sequences[i].tail : ends[i]] for i in complete]
        if not rows:
            return
        found = assess(self.runner.final_logits(rows[0] if len(rows) == 1 else torch.cat(rows)))
        for progress in asked:
            own, found = found[: progress.tail], found[progress.tail :]
            if all(one.is_finite for one in own):
                verdict = self._mode(progress).at_end(own)
                self._go_on(progress, verdict, tokens)
            else:
                self._fail(progress)

    def _mode(self, progress: Progress) -> DecodingMode:
        return self.requests[progress.key].mode

    def _go_on(
        self, progress: Progress, verdict: Next, tokens: list[tuple[Request, GeneratedToken]]
    ) -> None:
        """Start the sequence on its next token, or end it."""
        request = self.requests[progress.key]
        if verdict is Next.CHOSEN:
            for choice in request.mode.choices:
                tokens.append((request, request.take(choice)))
                if request.is_finished:
                    self.cancel(progress.key)
                    return
            progress.truncate(request.length - 1)
            self.runner.truncate(progress.slot, request.length - 1)
            request.mode.start(progress.num_pending)
        self.scheduler.go_on(progress, request.length, tail=len(request.mode.drafts) + 1)

    def _fail(self, progress: Progress) -> None:
        request = self.requests[progress.key]
        request.fail(NOT_FINITE)
        self.runner.clear(progress.slot)
        self.cancel(progress.key)


def _row_ends(spans: Sequence[Span]) -> list[int]:
    """The row behind the last one of each span."""
    ends, row = [], 0
    for _, start, end in spans:
        row += end - start
        ends.append(row)
    return ends
