"""One stage of a pipeline: a run of layers with the exits in it and the caches for them."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, distributed

from megatron.early_exit.inference.compute.runner import SegmentRunner
from megatron.early_exit.inference.compute.spans import Span
from megatron.early_exit.inference.decoding.confidence import assess
from megatron.early_exit.inference.decoding.scoring import PrefixScore, TextScorer
from megatron.early_exit.inference.parallel.control import Message
from megatron.early_exit.inference.parallel.pipeline_scores import piece_of, rule_of
from megatron.early_exit.inference.parallel.process_groups import Place
from megatron.early_exit.inference.parallel.work import FINAL, Batch, Finding, Work

Report = Callable[[Work, Tensor], None]
"""Gets a work whose heads have said what the driver has to know, and the logits [v]."""


class PipelineStage:
    """Runs works, hands the hidden states on, and asks the heads that are wanted.

    Hidden states go on to the next stage also where an exit has given the token: so the caches
    there are those of the full model, without any catch-up.

    Args:
        runner: the stage's layers, as a model of its own.
        place: of this process.
        first_exit: exits on the stages before.
    """

    def __init__(self, runner: SegmentRunner, place: Place, first_exit: int) -> None:
        self.runner, self.place, self.first_exit = runner, place, first_exit
        self._sends: list[tuple[distributed.Work, Tensor]] = []
        self._scorers: dict[int, TextScorer] = {}

    def run(self, messages: Sequence[Sequence[Work]], report: Report) -> list[Work]:
        """Run the works of several messages as one batch.

        Args:
            messages: as they came, and as the hidden states will.
            report: called as soon as a head has been asked.

        Returns:
            What is left to do for the next stage, in the order in which the hidden states are on
            their way to it.
        """
        batch = Batch()
        for works in messages:
            batch.add(works)
        spans, order = batch.in_order()
        works = [batch.works[i] for i in order]
        with torch.inference_mode():
            hidden = None
            if not self.place.is_first_stage:
                counts = [sum(work.num_rows for work in message) for message in messages]
                rows = torch.cat([self._receive(count) for count in counts]).split(
                    [work.num_rows for work in batch.works]
                )
                hidden = torch.cat([rows[i] for i in order])
            for work in works:
                if work.clear:
                    self.runner.clear(work.slot)
            for span in spans:
                self.runner.truncate(span.slot, span.start)
            tokens = [token for work in works for token in work.tokens]
            model = self.runner.model
            for index in range(len(model.segments)):
                hidden = self.runner.run(index, spans, tokens, hidden)
                if index < len(model.exits):
                    works = self._ask_exit(index, works, report)
            assert hidden is not None
            if self.place.is_last_stage:
                self._ask_final(hidden, works, report)
                return []
            self._send(hidden)
        return [replace(work, tokens=()) for work in works]

    @torch.inference_mode()
    def score(self, order: Message) -> list[PrefixScore]:
        """Run a piece of a text through, with caches of its own.

        Args:
            order: see `order_message`.

        Returns:
            The scores of which the heads here are sure.
        """
        key, length, piece = order["key"], order["length"], piece_of(order)
        if piece.start == 0:
            self._scorers[key] = TextScorer(
                self.runner.model,
                length,
                rule_of(order),
                self.first_exit,
                self.place.is_last_stage,
            )
        hidden = None if self.place.is_first_stage else self._receive(len(piece.tokens))
        scores, hidden = self._scorers[key].run(piece, hidden)
        if not self.place.is_last_stage:
            self._send(hidden)
        if piece.end == length:
            self.forget(key)
        return scores

    def forget(self, key: int) -> None:
        """No further piece of a request's prompt will come."""
        self._scorers.pop(key, None)

    def finish(self) -> None:
        """Wait until the next stage has got everything."""
        for sent, _ in self._sends:
            sent.wait()
        self._sends = []

    def _ask_exit(self, index: int, works: list[Work], report: Report) -> list[Work]:
        head = self.first_exit + index
        waiting = [i for i, work in enumerate(works) if work.asks and work.asks[0] == head]
        while waiting:
            # The block of an exit comes forward by one position of a sequence at a time.
            now = waiting
            if self.runner.model.exits[index].head.block is not None:
                now = list({works[i].slot: i for i in reversed(waiting)}.values())[::-1]
            ends = [Span(works[i].slot, works[i].start, works[i].end) for i in now]
            self._conclude(head, works, now, self.runner.exit_logits(index, ends), report)
            waiting = [i for i in waiting if i not in now]
        return works

    def _ask_final(self, hidden: Tensor, works: list[Work], report: Report) -> None:
        ends = torch.tensor([work.num_rows for work in works]).cumsum(0) - 1
        asking = [i for i, work in enumerate(works) if work.final]
        if asking:
            rows = ends[asking].to(hidden.device)
            logits = self.runner.final_logits(hidden[rows])
            self._conclude(FINAL, works, asking, logits, report)

    def _conclude(
        self, head: int, works: list[Work], asking: list[int], logits: Tensor, report: Report
    ) -> None:
        for i, assessment in zip(asking, assess(logits), strict=True):
            finding = Finding.of(head, assessment)
            work, matters = works[i].behind(finding)
            if matters:
                told = (finding,) if work.verify else work.findings
                report(replace(work, findings=told), assessment.logits)
            works[i] = work

    def _receive(self, num_rows: int) -> Tensor:
        model = self.runner.model
        hidden = torch.empty(
            num_rows, model.architecture.hidden_size, dtype=model.dtype, device=model.device
        )
        source = self.place.rank - self.place.stage_size
        distributed.recv(hidden, source, group=self.place.group)
        return hidden

    def _send(self, hidden: Tensor) -> None:
        self._sends = [(sent, kept) for sent, kept in self._sends if not sent.is_completed()]
        hidden = hidden.clone()  # The runner may write over it before it is gone.
        target = self.place.rank + self.place.stage_size
        sent = distributed.isend(hidden, target, group=self.place.group)
        assert sent is not None
        self._sends.append((sent, hidden))
