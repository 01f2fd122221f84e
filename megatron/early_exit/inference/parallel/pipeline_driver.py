"""The first rank of a pipeline: admits requests, starts their tokens, and makes all choices."""

from collections import deque
from dataclasses import asdict

import torch
from torch import Tensor

from megatron.early_exit.inference.compute.spans import Span
from megatron.early_exit.inference.decoding.confidence import NOT_FINITE, Assessment
from megatron.early_exit.inference.decoding.failures import is_usable, reason_of, release
from megatron.early_exit.inference.decoding.modes import Next
from megatron.early_exit.inference.decoding.params import SamplingParams
from megatron.early_exit.inference.decoding.progress import Progress
from megatron.early_exit.inference.decoding.request import Request
from megatron.early_exit.inference.decoding.request_loop import RequestLoop
from megatron.early_exit.inference.decoding.results import GeneratedToken
from megatron.early_exit.inference.decoding.scheduler import Scheduler
from megatron.early_exit.inference.decoding.scoring import PrefixScore
from megatron.early_exit.inference.parallel.control import ControlPlane, Message
from megatron.early_exit.inference.parallel.pipeline_scores import (
    PiecesUnderWay,
    order_message,
    scores_message,
    scores_of,
)
from megatron.early_exit.inference.parallel.pipeline_stage import PipelineStage
from megatron.early_exit.inference.parallel.work import FINAL, Work

_NO_LOGITS = torch.empty(0)


class PipelineDriver(RequestLoop):
    """Does what `DecodingLoop` does, over all stages.

    A token starts at the first stage as soon as the one before it is known, wherever that was:
    what earlier tokens still have to go through is in front of it at every stage.

    Args:
        stage: the first one.
        control: messages to and from the other processes.
        num_slots: sequences that run at a time.
        num_exits: of the whole model.
    """

    def __init__(
        self, stage: PipelineStage, control: ControlPlane, num_slots: int, num_exits: int
    ) -> None:
        super().__init__(Scheduler(1, num_slots))
        self.stage, self.control, self.num_exits = stage, control, num_exits
        self._ready: deque[Progress] = deque()
        self._tokens: list[tuple[Request, GeneratedToken]] = []
        self._pieces = PiecesUnderWay(stage.place.num_stages)
        self._damaged: set[int] = set()
        self._drafting: set[int] = set()
        self._leaving: set[int] = set()
        self._verified: dict[int, list[Assessment]] = {}

    def cancel(self, key: int) -> None:
        """End a request that is under way; nothing happens where there is none."""
        request = self.requests.get(key)
        if request is not None and not request.is_finished:
            self._tell({"kind": "cancelled", "key": key})
        if key in self.unscored:
            self._tell_stages({"kind": "forget", "key": key})
            self.stage.forget(key)
        super().cancel(key)
        self._ready = deque(one for one in self._ready if one.key != key)
        self._drafting.discard(key)
        self._leaving.discard(key)
        self._verified.pop(key, None)

    def step(self) -> list[tuple[Request, GeneratedToken]]:
        """Run one batch through the first stage and score a piece of a prompt, or wait for what the
        others report.

        Returns:
            The tokens that are known since. A request that failed has none, and an `error`.
        """
        for progress in self.scheduler.admit():
            self._start(progress)
        is_busy = self._score() or bool(self._ready)
        self._listen(wait=bool(self.requests) and not is_busy)
        if self._ready:
            self._run()
        tokens, self._tokens = self._tokens, []
        return tokens

    def close(self) -> None:
        """Let the stages come to the end of what they have."""
        self._tell_stages({"kind": "close"})
        self.stage.finish()

    def _score(self) -> bool:
        """Score a piece of a prompt, if there is one and not every stage has one to do; whether
        that was so."""
        if self._pieces.num_pieces >= self.stage.place.num_stages:
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
        share = -(-len(self.scheduler.running) // self.stage.place.num_stages)
        deep = [one for one in self._ready if one.key not in self._leaving][share:]
        chosen = [one for one in self._ready if one not in deep]
        self._ready = deque(deep)
        self._leaving.difference_update(one.key for one in chosen)
        step = self.scheduler.batch(0, chosen)
        works = [self._work(*pair) for pair in zip(step.sequences, step.spans, strict=True)]
        self.scheduler.ran(step)
        self._ready.extend(progress for progress in chosen if progress.waiting)
        for rank in range(1, self.stage.place.stage_size):
            batch = [[work.message() for work in works]]
            self.control.send(rank, {"kind": "batch", "works": batch})
        rest = self.stage.run([works], self._conclude_here)
        rows = [work.message() for work in rest]
        self.control.send(self.stage.place.stage_size, {"kind": "rows", "works": rows})

    def _work(self, progress: Progress, span: Span) -> Work:
        request = self.requests[progress.key]
        tokens = tuple(request.token_ids(span.start, span.end))
        clear = span.slot in self._damaged
        self._damaged.discard(span.slot)
        if span.end < progress.length:
            return Work(progress.key, *span, tokens, clear=clear)
        params = request.params
        speculative = params.mode == "self_speculative"
        return Work(
            progress.key,
            *span,
            tokens,
            asks=tuple(i for i in range(self.num_exits) if request.mode.asks(i)),
            threshold={"full": torch.inf, "early_exit": params.threshold}.get(params.mode, 0.0),
            final=True,
            verify=speculative,
            logits=_needs_logits(params),
            clear=clear,
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
            logits = logits.to(self.stage.runner.model.device)
        self._conclude(Work.from_message(message["work"]), logits)

    def _conclude_here(self, work: Work, logits: Tensor) -> None:
        self._leaving.add(work.key)
        self._conclude(work, logits)
        if work.key not in self.requests:
            self._leaving.discard(work.key)

    def _conclude(self, work: Work, logits: Tensor) -> None:
        """A stage has found out about a token."""
        request = self.requests.get(work.key)
        if request is None:
            return
        try:
            self._decide(request, work, logits)
        except Exception as error:
            # It is about this request alone, and what has been told of it to the others is whole.
            device = self.stage.runner.model.device
            release(error, device)
            if not is_usable(device):
                raise
            self._fail(request, reason_of(error), error)

    def _decide(self, request: Request, work: Work, logits: Tensor) -> None:
        *earlier, last = work.findings
        assessment = last.assessment(logits)
        if not assessment.is_finite:
            self._fail(request, NOT_FINITE)
        elif work.verify:
            self._speculate(request, last.head, assessment)
        else:
            for finding in earlier:
                request.mode.at_exit(finding.head, finding.assessment(_NO_LOGITS))
            if last.head == FINAL:
                request.mode.at_end([assessment])
            else:
                request.mode.at_exit(last.head, assessment)
            self._choose(request)

    def _speculate(self, request: Request, head: int, assessment: Assessment) -> None:
        """A draft goes on its way at once, and is verified when the last stage has seen it."""
        key, mode = request.key, request.mode
        if head == FINAL:
            self._verified.setdefault(key, []).append(assessment)
        elif mode.at_exit(head, assessment) is Next.DRAFTED:
            self._go_on(self.scheduler.running[key], request)
        else:
            self._drafting.discard(key)
        if key not in self._drafting and len(self._verified.get(key, ())) == len(mode.drafts) + 1:
            mode.at_end(self._verified.pop(key))
            self._choose(request)

    def _choose(self, request: Request) -> None:
        """The request's mode has chosen tokens: tell everyone, and start on the next one."""
        for choice in request.mode.choices:
            self._tokens.append((request, request.take(choice)))
            self._tell({"kind": "chosen", "key": request.key, "choice": asdict(choice)})
            if request.is_finished:
                self.cancel(request.key)
                return
        self._start(self.scheduler.running[request.key])

    def _start(self, progress: Progress) -> None:
        request = self.requests[progress.key]
        progress.truncate(request.length - 1)
        request.mode.start(0)
        self._drafting.add(progress.key)
        self._go_on(progress, request)

    def _go_on(self, progress: Progress, request: Request) -> None:
        self.scheduler.go_on(progress, request.length)
        self._ready.append(progress)

    def _fail(self, request: Request, reason: str, error: Exception | None = None) -> None:
        if (progress := self.scheduler.running.get(request.key)) is not None:
            self._damaged.add(progress.slot)
        request.fail(reason, error)
        self._tell({"kind": "failed", "key": request.key, "error": reason})
        self.cancel(request.key)

    def _tell_stages(self, message: Message) -> None:
        """Tell the ranks of this stage and the next one, which passes it on."""
        for rank in range(1, self.stage.place.stage_size + 1):
            self.control.send(rank, message)

    def _tell(self, message: Message) -> None:
        for rank in range(1, self.stage.place.num_ranks):
            self.control.send(rank, message)


def _needs_logits(params: SamplingParams) -> bool:
    """Whether the token or what is said of it depends on more than the largest logit."""
    return not params.takes_largest_logit or params.min_tokens > 0 or bool(params.logprobs)
