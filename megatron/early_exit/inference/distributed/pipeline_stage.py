"""One stage of a pipeline: a run of layers with the exits in it and the caches for them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from megatron.early_exit.inference.distributed.control import Message
from megatron.early_exit.inference.distributed.pipeline_scores import piece_of, rule_of
from megatron.early_exit.inference.distributed.process_groups import RankInfo
from megatron.early_exit.inference.distributed.stage_drafts import StageDrafts
from megatron.early_exit.inference.distributed.stage_links import StageLinks
from megatron.early_exit.inference.distributed.stage_streams import StageStreams
from megatron.early_exit.inference.distributed.stage_task import (
    HeadMessage,
    HeldRows,
    StageBatch,
    StageTask,
    rows_of,
)
from megatron.early_exit.inference.engine.cache_pages import PAGE_SIZE
from megatron.early_exit.inference.engine.graphed_heads import GraphedHeads
from megatron.early_exit.inference.engine.scoring import PrefixScore, TextScorer
from megatron.early_exit.inference.model.heads import Head
from megatron.early_exit.inference.model.kv_cache import Span
from megatron.early_exit.inference.model.page_store import PageStore
from megatron.early_exit.inference.model.runner import SegmentRunner
from megatron.early_exit.inference.modes.head_output import HeadOutput, head_outputs
from megatron.early_exit.inference.modes.measures import Judging, Streams
from megatron.early_exit.inference.modes.mode import FINAL
from megatron.early_exit.inference.transfer import upload

Report = Callable[[StageTask, Tensor], None]
"""Gets a task with outputs that the driver has to know, and the last one's logits [v]."""
HandOn = Callable[[list[StageTask]], None]
"""Gets what is left to do for the next stage, in the order of the hidden states' rows."""


class PipelineStage:
    """Runs tasks, hands the hidden states on, and asks the heads that are wanted.

    Hidden states go on to the next stage also where an exit has given the token: so the caches
    there are those of the full model, without any catch-up. Those that are held behind the exit go
    on as they are.

    Args:
        runner: the stage's layers, as a model of its own.
        rank_info: of this process.
        first_exit: exits on the stages before.

    Attributes:
        drafts: of the multi-token-prediction module, where that is.
    """

    def __init__(self, runner: SegmentRunner, rank_info: RankInfo, first_exit: int) -> None:
        self.runner, self.rank_info, self.first_exit = runner, rank_info, first_exit
        model = runner.model
        size = model.architecture.hidden_size
        self._links = StageLinks(rank_info, size, model.dtype, model.device)
        self._graphed_heads = GraphedHeads.of(model, rank_info.is_last_stage)
        self._scorers: dict[int, TextScorer] = {}
        self.drafts = StageDrafts(runner) if model.mtp else None
        self._store = PageStore(runner, PAGE_SIZE, keeps_for_blocks=True)

    def run(self, messages: Sequence[Sequence[StageTask]], report: Report, hand_on: HandOn) -> None:
        """Run the tasks of several messages as one batch.

        Args:
            messages: as they came, and as the hidden states that `expect` was told of do.
            report: called as soon as a head has been asked.
            hand_on: has to tell the next stage, before the hidden states are sent: a send may end
                only when they are received.
        """
        batch = StageBatch()
        for tasks in messages:
            batch.add(tasks)
        spans, order = batch.in_order()
        tasks = [batch.tasks[i] for i in order]
        with torch.inference_mode():
            hidden = None
            if self.rank_info.is_first_stage:
                streams = StageStreams.of_tokens(tasks, self.runner.model.embedding)
            else:
                rows = torch.cat([self._links.take() for _ in messages]).split(
                    [task.num_sent for task in batch.tasks]
                )
                streams, hidden = StageStreams.of_received(tasks, [rows[i] for i in order])
            for task in tasks:
                if self.drafts is not None:
                    self.drafts.begin(task.slot, task.key)
                if task.clear:
                    self.runner.clear(task.slot)
                if task.load:
                    self.runner.truncate(task.slot, 0)
                for place, number in enumerate(task.load):
                    self._store.load(number, task.slot, place)
            for span in spans:
                ahead = None if self.drafts is None else self.drafts.rewind(span)
                self.runner.truncate(span.slot, span.start, ahead=ahead)
            tokens = [token for task in tasks for token in task.tokens]
            model = self.runner.model
            for index in range(len(model.segments)):
                hidden = self._run_segment(index, spans, tasks, tokens, hidden)
                if index < len(model.exits):
                    answers = self._ask_gates(index, tasks, partial(streams.here, hidden))
                    at = partial(streams.at, hidden)
                    tasks = self._ask_exit(index, tasks, answers, at, report)
                    streams.pass_exit(hidden)
            assert hidden is not None
            if self.rank_info.is_last_stage:
                self._ask_final(hidden, tasks, partial(streams.at, hidden), report)
            else:
                # The runner may write over it before it is gone.
                hidden = hidden.clone()
                hand_on([replace(task, tokens=()) for task in tasks])
                self._links.send(streams.sent(hidden, tasks))

    def _run_segment(
        self,
        index: int,
        spans: Sequence[Span],
        tasks: Sequence[StageTask],
        tokens: Sequence[int],
        hidden: Tensor | None,
    ) -> Tensor:
        """See `SegmentRunner.run`; the hidden states of held positions stay what they are."""
        runner = self.runner
        if hidden is None or not any(task.held for task in tasks):
            return runner.run(index, spans, tokens, hidden)
        result = hidden.clone()
        parts = HeldRows.of(spans, tasks, self.first_exit + index)
        if parts.held:
            rows = upload(rows_of(parts.held, spans), hidden.device)
            runner.propagate(index, parts.held, hidden[rows])
        for asking in parts.rounds:
            rows = upload(rows_of(asking, spans), hidden.device)
            result[rows] = runner.run(index, asking, None, hidden[rows])
        return result

    def expect(self, num_rows: int) -> None:
        """Have hidden states [num_rows, h] received that the stage before sends, for one of the
        next calls of `run`."""
        self._links.expect(num_rows)

    @torch.inference_mode()
    def manage(self, order: Message) -> None:
        """Store pages and give up others, as `StagePages` says."""
        for number, slot, place in order["save"]:
            segments, blocks = self.runner.model.segments, self._store.block_lengths(slot)
            end = (place + 1) * PAGE_SIZE
            seen = [index for index, length in enumerate(blocks) if length >= end]
            self._store.save(number, slot, place, len(segments), seen)
        self._store.drop(order["drop"])
        for slot in order["release"]:
            self.runner.release(slot)
            if self.drafts is not None:
                self.drafts.leave(slot)

    @torch.inference_mode()
    def score(self, order: Message) -> list[PrefixScore]:
        """Run a piece of a text through, as an `order_message` says, with caches of its own. The
        other stages have to have the message.

        Returns:
            The scores of which the heads here are sure.
        """
        key, length, piece = order["key"], order["length"], piece_of(order)
        if piece.start == 0:
            place = (self.first_exit, self.rank_info.is_last_stage)
            self._scorers[key] = TextScorer(self.runner.model, length, rule_of(order), *place)
        scorer, hidden = self._scorers[key], None
        if not self.rank_info.is_first_stage:
            self.expect(scorer.num_received(piece))
            hidden = self._links.take()
        scores, hidden = scorer.run(piece, hidden)
        if not self.rank_info.is_last_stage:
            self._links.send(hidden.clone())
        if piece.end == length:
            self.forget(key)
        return scores

    def forget(self, key: int) -> None:
        """Drop what is kept for scoring a request's prompt: no further piece of it will come."""
        self._scorers.pop(key, None)

    def finish(self) -> None:
        """Wait until the next stage has got everything."""
        self._links.finish()

    def _ask_gates(
        self, index: int, tasks: Sequence[StageTask], here: Callable[[Sequence[int]], Tensor]
    ) -> dict[int, float]:
        """What the gate of an exit says of tasks whose rules ask it, by their places.

        Args:
            here: gives the residual stream [n, h] of the last positions of some tasks.
        """
        head = self.first_exit + index
        asking = [
            i for i, task in enumerate(tasks) if task.next_exit == head and task.rule.asks_gates
        ]
        if not asking:
            return {}
        gates = self.runner.model.gates
        assert gates is not None
        found: list[float] = gates.confidences([index] * len(asking), here(asking)).tolist()
        return dict(zip(asking, found, strict=True))

    def _ask_exit(
        self,
        index: int,
        tasks: list[StageTask],
        answers: Mapping[int, float],
        streams: Streams,
        report: Report,
    ) -> list[StageTask]:
        head = self.first_exit + index
        for i, answer in answers.items():
            if not (tasks[i].details or tasks[i].rule.takes(head, answer)):
                tasks[i] = replace(tasks[i], rule=tasks[i].rule.behind(head))
        waiting = [i for i, task in enumerate(tasks) if task.next_exit == head]
        while waiting:
            # The block of an exit comes forward by one position of a sequence at a time.
            now = waiting
            if self.runner.model.exits[index].head.block is not None:
                now = list({tasks[i].slot: i for i in reversed(waiting)}.values())[::-1]
            ends = [Span(tasks[i].slot, tasks[i].start, tasks[i].end) for i in now]
            logits, figures = self._exit_logits(index, ends)
            judging = _judging(self.runner.model.exits[index].head, tasks, now, streams)
            outputs = head_outputs(logits, figures, judging)
            outputs = [
                replace(output, confidence=answers.get(i, output.confidence))
                for i, output in zip(now, outputs, strict=True)
            ]
            self._conclude(head, tasks, now, outputs, report)
            waiting = [i for i in waiting if i not in now]
        return tasks

    def _ask_final(
        self, hidden: Tensor, tasks: list[StageTask], streams: Streams, report: Report
    ) -> None:
        ends = torch.tensor([task.num_rows for task in tasks]).cumsum(0) - 1
        asking = [i for i, task in enumerate(tasks) if task.final]
        if asking:
            rows = ends[asking].to(hidden.device)
            logits, figures = self._final_logits(hidden[rows])
            judging = _judging(self.runner.model.final_head, tasks, asking, streams)
            outputs = head_outputs(logits, figures, judging)
            self._conclude(FINAL, tasks, asking, outputs, report)

    def _exit_logits(self, index: int, spans: Sequence[Span]) -> tuple[Tensor, Tensor | None]:
        """Logits, and their figures where those come with them."""
        graphed = self._graphed_heads
        if graphed is None or not graphed.serves(len(spans)):
            return self.runner.exit_logits(index, spans), None
        return graphed.evaluate_exit(self.runner, index, spans)

    def _final_logits(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        graphed = self._graphed_heads
        if graphed is None or not graphed.serves(len(hidden)):
            return self.runner.final_logits(hidden), None
        return graphed.evaluate(self.runner.model.final_head, [hidden])

    def _conclude(
        self,
        head: int,
        tasks: list[StageTask],
        asking: list[int],
        outputs: list[HeadOutput],
        report: Report,
    ) -> None:
        for i, output in zip(asking, outputs, strict=True):
            message = HeadMessage.of(head, output)
            task, matters = tasks[i].behind(message)
            if matters:
                told = (message,) if task.verify else task.outputs
                report(replace(task, outputs=told), output.logits)
            tasks[i] = task


def _judging(
    head: Head, tasks: Sequence[StageTask], asked: Sequence[int], streams: Streams
) -> Judging | None:
    """By what a head is judged that is asked for some of the tasks."""
    measures = [tasks[i].rule.measure for i in asked]
    return Judging.by(measures, head.num_others, lambda rows: streams([asked[row] for row in rows]))
