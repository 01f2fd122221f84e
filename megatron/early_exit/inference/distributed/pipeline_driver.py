"""The first rank of a pipeline: admits requests, starts their tokens, hears what comes of them."""

from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from megatron.early_exit.inference.distributed.control import ControlPlane, Message
from megatron.early_exit.inference.distributed.draft_orders import DraftOrders, outputs_of
from megatron.early_exit.inference.distributed.pipeline_scores import (
    PiecesUnderWay,
    order_message,
    scores_message,
    scores_of,
)
from megatron.early_exit.inference.distributed.pipeline_stage import PipelineStage
from megatron.early_exit.inference.distributed.stage_pages import StagePages
from megatron.early_exit.inference.distributed.stage_task import StageTask
from megatron.early_exit.inference.engine.cache_pages import CachePages
from megatron.early_exit.inference.engine.failures import reason_of
from megatron.early_exit.inference.engine.loop import DecodingLoop
from megatron.early_exit.inference.engine.request import Request
from megatron.early_exit.inference.engine.scheduler import Scheduler
from megatron.early_exit.inference.engine.scoring import PrefixScore
from megatron.early_exit.inference.model.kv_cache import Span
from megatron.early_exit.inference.modes.head_output import NOT_FINITE, HeadOutput
from megatron.early_exit.inference.modes.mode import FINAL, MTP, Next, SampledToken
from megatron.early_exit.inference.sequence import Sequence

_NO_LOGITS = torch.empty(0)


class PipelineDriver(DecodingLoop):
    """Runs batches over all stages.

    A token starts at the first stage as soon as the one before it is known, wherever that was:
    what earlier tokens still have to go through is in front of it at every stage.

    Args:
        stage: the first one.
        control: messages to and from the other processes.
        num_slots: sequences that run at a time.
        pages: gives memory of the caches to sequences, see `CacheBudget.pages_of_stages`.
    """

    def __init__(
        self, stage: PipelineStage, control: ControlPlane, num_slots: int, pages: CachePages
    ) -> None:
        super().__init__(Scheduler(1, num_slots, pages=pages), stage.runner.model.device)
        self.stage, self.control = stage, control
        self._stage_pages = StagePages(pages, self.scheduler, self._manage)
        self._ready: deque[Sequence] = deque()
        last = stage.rank_info.last_leader
        self._orders = DraftOrders(lambda message: control.send(last, message))
        self._pieces = PiecesUnderWay(stage.rank_info.num_stages)
        self._damaged: set[int] = set()
        """Slots whose caches are not to be trusted."""
        self._drafting: set[int] = set()
        """Requests whose exit has not said yet that their drafts are to be verified."""
        self._leaving: set[int] = set()
        """Requests whose last token has left at this stage."""
        self._verified: dict[int, list[HeadOutput]] = {}
        self._last_key = self._settled = 0
        self._is_advancing = False

    def submit(self, request: Request) -> None:
        """See `DecodingLoop`."""
        if not request.is_finished:
            self._last_key = request.key
        super().submit(request)

    def cancel(self, key: int) -> None:
        """End a request that is under way; nothing happens where there is none."""
        request = self.requests.get(key)
        if request is not None and not request.is_finished:
            self._tell({"kind": "cancelled", "key": key})
        if request is not None and key in self.scheduler.running:
            if request.sequence.generated and request.error is None:
                self._stage_pages.store(request.sequence)
            self._stage_pages.leave(key, request.sequence.slot)
        if key in self.unscored:
            self._tell_stages({"kind": "forget", "key": key})
            self.stage.forget(key)
        super().cancel(key)
        self._orders.forget(key)
        self._ready = deque(one for one in self._ready if one.key != key)
        self._drafting.discard(key)
        self._leaving.discard(key)
        self._verified.pop(key, None)
        if not self._is_advancing:
            self._settle()

    def close(self) -> None:
        """Let the stages finish the tasks that they have."""
        self._tell_stages({"kind": "close"})
        self.stage.finish()

    def _advance(self) -> None:
        """Run one batch through the first stage and score a piece of a prompt, or wait for what the
        others report."""
        self._is_advancing = True
        for sequence in self.scheduler.admit():
            self._stage_pages.begin(sequence.key)
            self._begin_token(self.requests[sequence.key])
            self._ready.append(sequence)
        is_busy = self._score() or bool(self._ready)
        self._listen(wait=bool(self.requests) and not is_busy)
        self._orders.send()
        if self._ready:
            self._run()
            self._orders.send()
        self._is_advancing = False
        self._settle()

    def _settle(self) -> None:
        """Tell which requests have ended, and that no more comes for them from this stage."""
        settled = next(iter(self.requests), self._last_key + 1) - 1
        if settled > self._settled:
            self._settled = settled
            self._tell_stages({"kind": "settled", "key": settled})

    def _score(self) -> bool:
        """Score a piece of a prompt, if there is one and not every stage has one to do; whether
        that was so."""
        if self._pieces.num_pieces >= self.stage.rank_info.num_stages:
            return False
        key = self._next_to_score()
        if key is None:
            return False
        scoring = self.unscored[key]
        piece = scoring.next_piece()
        order = order_message(key, scoring, piece)
        self._tell_stages(order)
        self._pieces.add()
        self._hear_scores(key, piece.start, 0, self.stage.score(order))
        return True

    def _hear_scores(self, key: int, start: int, stage: int, found: list[PrefixScore]) -> None:
        scores = self._pieces.hear(key, start, stage, found)
        if scores is not None and key in self.requests:
            self._tell(scores_message(key, scores))
            self._take_scores(self.requests[key], scores)

    def _run(self) -> None:
        # As many batches on their way as there are stages keep all of them busy. Sequences that
        # leave at this stage only make its own batch smaller if they are kept back.
        share = -(-len(self.scheduler.running) // self.stage.rank_info.num_stages)
        deep = [one for one in self._ready if one.key not in self._leaving][share:]
        chosen = [one for one in self._ready if one not in deep]
        self._ready = deque(deep)
        self._leaving.difference_update(one.key for one in chosen)
        ends = [self._end_of_token(one) for one in chosen]
        preempted = self._stage_pages.reserve(chosen, ends, self._ready)
        for key in preempted:
            self._orders.forget(key)
        chosen, self._ready = (
            [one for one in chosen if one.key not in preempted],
            deque(one for one in self._ready if one.key not in preempted),
        )
        if not chosen:
            return
        step = self.scheduler.batch(0, chosen)
        pairs = zip(step.sequences, step.spans, strict=True)
        tasks = [task for pair in pairs for task in self._tasks(*pair)]
        self.scheduler.ran(step)
        self._ready.extend(sequence for sequence in chosen if sequence.waiting)
        for rank in self.stage.rank_info.peers:
            batch = [[task.message() for task in tasks]]
            self.control.send(rank, {"kind": "batch", "tasks": batch})
        self.stage.run([tasks], self._conclude_here, self._hand_on)
        self._stage_pages.give_up()

    def _hand_on(self, tasks: list[StageTask]) -> None:
        rows = [task.message() for task in tasks]
        self.control.send(self.stage.rank_info.next_leader, {"kind": "rows", "tasks": rows})

    def _end_of_token(self, sequence: Sequence) -> int:
        """The end of what a sequence needs memory for until its next token is known."""
        request = self.requests[sequence.key]
        drafts = request.params.num_draft_tokens if request.mode.verifies else 0
        end = sequence.length + max(drafts - len(sequence.drafts), 0)
        return min(end, self.stage.runner.capacity)

    def _tasks(self, sequence: Sequence, span: Span) -> list[StageTask]:
        """One for each position that heads are asked about; the first has those before it."""
        ends = [*range(max(span.start + 1, sequence.num_final), span.end), span.end]
        parts = pairwise([span.start, *ends])
        return [self._task(sequence, Span(span.slot, *part)) for part in parts]

    def _task(self, sequence: Sequence, span: Span) -> StageTask:
        request = self.requests[sequence.key]
        tokens = tuple(sequence.token_ids(span.start, span.end))
        clear = span.slot in self._damaged
        self._damaged.discard(span.slot)
        load = self._stage_pages.take_load(sequence.key)
        # There are some where what the sequence had computed had to go.
        held = tuple(sequence.held(span.start, span.end))
        if span.end < sequence.num_final:
            return StageTask(sequence.key, *span, tokens, clear=clear, load=load, held=held)
        asks = any(request.mode.asks(exit_index) for exit_index in request.mode.rule.exits)
        if not asks:
            self._drafting.discard(sequence.key)
        return StageTask(
            sequence.key,
            *span,
            tokens,
            rule=request.mode.rule if asks else request.mode.rule.without_exits(),
            final=True,
            verify=request.mode.verifies,
            logits=request.params.needs_logits,
            details=request.mode.details,
            clear=clear,
            load=load,
            propagates=sequence.propagates,
            held=held,
        )

    def _listen(self, wait: bool) -> None:
        heard = self.control.receive(wait)
        while heard is not None:
            self._hear(*heard)
            heard = self.control.receive(wait=False)

    def _hear(self, message: Message, attached: bytes | None) -> None:
        if message["kind"] == "scored":
            found = scores_of(message)
            self._hear_scores(message["key"], message["start"], message["stage"], found)
            return
        logits = _NO_LOGITS
        if attached is not None:
            logits = torch.frombuffer(bytearray(attached), dtype=torch.float32)
            logits = logits.to(self.device)
        if message["kind"] == "drafted":
            outputs = outputs_of(message, logits)
            self._alone(message["key"], partial(self._take_drafts, outputs))
            return
        self._conclude(StageTask.from_message(message["task"]), logits)

    def _conclude_here(self, task: StageTask, logits: Tensor) -> None:
        self._leaving.add(task.key)
        self._conclude(task, logits)
        if task.key not in self.requests:
            self._leaving.discard(task.key)

    def _conclude(self, task: StageTask, logits: Tensor) -> None:
        """Act on what a stage reports about a head's output."""
        self._alone(task.key, partial(self._decide, task, logits))

    def _alone(self, key: int, act: Callable[[Request], None]) -> None:
        """Act on what is reported about a request, if it is under way; an exception ends it."""
        request = self.requests.get(key)
        if request is None:
            return
        try:
            act(request)
        except Exception as error:
            # It is about this request alone, and what has been told of it to the others is whole.
            if not self._can_go_on(error):
                raise
            self._fail(key, reason_of(error), error)

    def _decide(self, task: StageTask, logits: Tensor, request: Request) -> None:
        *earlier, last = task.outputs
        output = last.output(logits)
        if not output.is_finite:
            self._fail(request.key, NOT_FINITE)
        elif task.verify:
            self._speculate(request, last.head, output)
        else:
            for one in earlier:
                passed = request.mode.at_exit(one.head, one.output(_NO_LOGITS), is_taken=False)
                _agree(passed is Next.DEEPER, request)
            if last.head == FINAL:
                depth = len(request.mode.sampler.layers) - 1
                self._continue(request, request.mode.at_end([output]), depth)
            else:
                outcome = request.mode.at_exit(last.head, output, is_taken=True)
                _agree(isinstance(outcome, tuple), request)
                self._continue(request, outcome, last.head)

    def _speculate(self, request: Request, head: int, output: HeadOutput) -> None:
        """Send a draft on its way at once; it is verified when the last stage has seen it."""
        key, mode = request.key, request.mode
        if head == FINAL:
            self._verified.setdefault(key, []).append(output)
        else:
            outcome = mode.at_exit(head, output, is_taken=True)
            _agree(isinstance(outcome, Next), request)
            self._continue(request, outcome, head)
            if outcome is Next.DEEPER:
                self._drafting.discard(key)
        num_verified = len(self._verified.get(key, ()))
        if key not in self._drafting and num_verified == request.sequence.num_verified:
            self._continue(request, mode.at_end(self._verified.pop(key)), head)

    def _take_drafts(self, outputs: list[HeadOutput], request: Request) -> None:
        """Take what the multi-token-prediction module says, as far as the mode wants it; then
        verify the drafts."""
        for place, output in enumerate(outputs):
            if not output.is_finite:
                self._fail(request.key, NOT_FINITE)
                return
            # The last stage has not known where drafts end.
            if place > 0 and not request.mode.num_ahead:
                request.mode.waste(len(outputs) - place)
                break
            if request.mode.at_exit(MTP, output, True) is not Next.DRAFTED:
                request.mode.waste(len(outputs) - place - 1)
                break
        else:
            if request.mode.num_ahead:
                self._orders.add(request)
                return
        self._store_pages(request)
        self._ready.append(request.sequence)

    def _store_pages(self, request: Request) -> None:
        if not request.sequence.is_stored:
            self._stage_pages.store(request.sequence)
            self.scheduler.stop_following(request.key)

    def _manage(self, order: Message) -> None:
        self._tell_stages(order)
        self.stage.manage(order)

    def _begin_token(self, request: Request) -> None:
        # With the rows of drafts, where there are to be some.
        if request.sequence.generated and not request.mode.num_ahead:
            self._store_pages(request)
        super()._begin_token(request)
        if request.sequence.is_asking:
            self._drafting.add(request.key)

    def _rewind(self, sequence: Sequence) -> None:
        """Each stage does so itself when a task starts before the end of what it has cached."""

    def _discard(self, sequence: Sequence) -> None:
        self._damaged.add(sequence.slot)

    def _requeue(self, sequence: Sequence) -> None:
        request = self.requests[sequence.key]
        if request.mode.num_ahead:
            self._orders.add(request)
        else:
            self._ready.append(sequence)

    def _announce(self, request: Request, sampled: SampledToken) -> None:
        self._tell({"kind": "token", "key": request.key, "token": asdict(sampled)})

    def _announce_failure(self, request: Request) -> None:
        self._tell({"kind": "failed", "key": request.key, "error": request.error})

    def _tell_stages(self, message: Message) -> None:
        """Tell the ranks of this stage and the next one, which passes it on."""
        for rank in (*self.stage.rank_info.peers, self.stage.rank_info.next_leader):
            self.control.send(rank, message)

    def _tell(self, message: Message) -> None:
        for rank in range(1, self.stage.rank_info.num_ranks):
            self.control.send(rank, message)


def _agree(holds: bool, request: Request) -> None:
    """Refuse to give a token that the stages and the mode do not agree about.

    Raises:
        RuntimeError: a mode does not follow the rule that it has sent with its task.
    """
    if not holds:
        name = type(request.mode).__name__
        raise RuntimeError(f"{name} and the stages do not agree where a token leaves the model")
