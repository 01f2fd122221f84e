"""The loop that takes many requests through the segments of a model, batch by batch."""

import torch

from megatron.early_exit.inference.compute.runner import SegmentRunner
from megatron.early_exit.inference.decoding.confidence import NOT_FINITE, Assessment
from megatron.early_exit.inference.decoding.failures import is_usable, reason_of, release
from megatron.early_exit.inference.decoding.modes import DecodingMode, Next
from megatron.early_exit.inference.decoding.policy import Costs
from megatron.early_exit.inference.decoding.progress import Progress
from megatron.early_exit.inference.decoding.questions import Answers, Questions
from megatron.early_exit.inference.decoding.request import Request
from megatron.early_exit.inference.decoding.request_loop import RequestLoop
from megatron.early_exit.inference.decoding.results import GeneratedToken
from megatron.early_exit.inference.decoding.scheduler import Scheduler, Step
from megatron.early_exit.inference.decoding.scoring import TextScorer


class DecodingLoop(RequestLoop):
    """Continuous batching: requests come and go between any two batches.

    What one request decides never depends on the others that happen to be in its batch.

    Args:
        runner: the model and its caches.
        is_alone: no other process makes the same steps. Then an exception ends the requests that it
            is about, and the loop goes on; else the processes would not be at the same step any
            more, so `step` raises it. It also does where the device computes no more.
    """

    def __init__(self, runner: SegmentRunner, is_alone: bool = True) -> None:
        model = runner.model
        heads = [*(exit_.head for exit_ in model.exits), model.final_head]
        costs = Costs.of(
            model.architecture,
            [exit_.position for exit_ in model.exits],
            model.exit_vocab_size,
            len({id(head.projection) for head in heads}) == 1,
            model.device.type,
        )
        super().__init__(Scheduler(len(model.segments), runner.num_slots, costs=costs))
        self.runner = runner
        self._is_alone = is_alone
        self._scorers: dict[int, TextScorer] = {}
        self._at_work: set[int] = set()
        """Whose state is unknown if there is an exception now."""

    def cancel(self, key: int) -> None:
        """End a request that is under way; nothing happens where there is none."""
        super().cancel(key)
        self._scorers.pop(key, None)

    def step(self) -> list[tuple[Request, GeneratedToken]]:
        """Run a batch through one segment or several, and ask the heads that it has passed. And
        score a piece of a prompt.

        Returns:
            The tokens that came of it. A request that failed has none, and an `error`.
        """
        tokens: list[tuple[Request, GeneratedToken]] = []
        try:
            self._decode(tokens)
        except Exception as error:
            self._contain(error)
        try:
            self._score()
        except Exception as error:
            self._contain(error)
        return tokens

    def _decode(self, tokens: list[tuple[Request, GeneratedToken]]) -> None:
        """Run a batch, and add what comes of it to `tokens`."""
        for progress in self.scheduler.admit():
            self._start(progress)
        self._at_work = set(self.scheduler.running)
        step = self.scheduler.next()
        self._at_work = set()
        if step is None:
            return
        with torch.inference_mode():
            passed, likely, unlikely = self._run(step)
            undecided = self._decide(passed, likely.answers(), tokens)
            self._at_work = set(undecided)
            if undecided:
                self._decide(undecided, unlikely.answers(), tokens)
        self._at_work = set()

    def _start(self, progress: Progress) -> None:
        self._at_work = {progress.key}
        try:
            self.runner.truncate(progress.slot, 0)
            mode = self._mode(progress)
            mode.start(0)
            exits = [i for i in range(self.scheduler.num_segments - 1) if mode.asks(i)]
            self.scheduler.expectations.start(progress, exits, mode.asks_late)
        except Exception as error:
            self._contain(error)

    def _contain(self, error: Exception) -> None:
        """End the requests that an exception is about, with all that is kept for them.

        Raises:
            Exception: the same one, where the loop cannot go on.
        """
        failed, self._at_work = self._at_work, set()
        if not (self._is_alone and failed):
            raise error
        release(error, self.runner.model.device)
        if not is_usable(self.runner.model.device):
            raise error
        for key in failed:
            self._fail(key, reason_of(error), error)

    def _score(self) -> None:
        """Score the next piece of the prompt that waits first."""
        key = self._next_to_score()
        if key is None:
            return
        scoring, self._at_work = self.unscored[key], {key}
        if key not in self._scorers:
            length = len(scoring.tokens)
            self._scorers[key] = TextScorer(self.runner.model, length, scoring.rule)
        scores, _ = self._scorers[key].run(scoring.next_piece())
        if scoring.is_given:
            del self._scorers[key]
        self._take_scores(self.requests[key], scores)
        self._at_work = set()

    def _run(self, step: Step | None) -> tuple[dict[int, list[int]], Questions, Questions]:
        """Run a batch as far as the scheduler wants.

        Returns:
            The segments that sequences have passed, by key; the questions to the heads there; and
            those which sequences hardly get to.
        """
        likely, unlikely = Questions(self.runner), Questions(self.runner)
        passed: dict[int, list[int]] = {}
        while step is not None:
            self._at_work.update(progress.key for progress in step.sequences)
            hidden = self.runner.run(step.segment, step.spans, self._inputs(step), last=step.last)
            complete = self.scheduler.ran(step)
            first, later = [0] * len(step.spans), [0] * len(step.spans)
            for index in complete:
                progress = step.sequences[index]
                own = passed.setdefault(progress.key, [])
                counts = first if self.scheduler.expectations.is_likely(progress, own) else later
                counts[index] = self._num_asked(progress, step.last)
                own.append(step.last)
            likely.ask(step.last, step.spans, first, hidden)
            unlikely.ask(step.last, step.spans, later, hidden)
            step = self.scheduler.onward(step, complete)
        return passed, likely, unlikely

    def _inputs(self, step: Step) -> list[int] | None:
        if step.segment > 0:
            return None
        return [
            token
            for progress, (_, start, end) in zip(step.sequences, step.spans, strict=True)
            for token in self.requests[progress.key].token_ids(start, end)
        ]

    def _num_asked(self, progress: Progress, segment: int) -> int:
        """Positions that the head behind a segment is asked about."""
        if segment == self.scheduler.num_segments - 1:
            return progress.tail
        return int(self._mode(progress).asks(segment))

    def _decide(
        self,
        passed: dict[int, list[int]],
        answers: Answers,
        tokens: list[tuple[Request, GeneratedToken]],
    ) -> dict[int, list[int]]:
        """Tell the modes what the heads say, in the order of the segments. What one decides makes
        those behind it idle, even if they have been asked.

        Returns:
            The segments that are left over, by key, from the first one that has not been asked.
        """
        undecided = {}
        for key, segments in passed.items():
            progress = self.scheduler.running[key]
            for place, segment in enumerate(segments):
                if not self._num_asked(progress, segment):
                    continue
                found = answers.get((segment, progress.slot))
                if found is None:
                    undecided[key] = segments[place:]
                    break
                if self._hears(progress, segment, found, tokens):
                    break
        return undecided

    def _hears(
        self,
        progress: Progress,
        segment: int,
        found: list[Assessment],
        tokens: list[tuple[Request, GeneratedToken]],
    ) -> bool:
        """See `_hear`; an exception is about this sequence alone."""
        try:
            return self._hear(progress, segment, found, tokens)
        except Exception as error:
            others = self._at_work
            self._at_work = {progress.key}
            self._contain(error)
            self._at_work = others - {progress.key}
            return True

    def _hear(
        self,
        progress: Progress,
        segment: int,
        found: list[Assessment],
        tokens: list[tuple[Request, GeneratedToken]],
    ) -> bool:
        """Whether the sequence does not go on behind a segment, by what the head there says."""
        mode = self._mode(progress)
        if not all(one.is_finite for one in found):
            self._fail(progress.key, NOT_FINITE)
            return True
        if segment == self.scheduler.num_segments - 1:
            verdict = mode.at_end(found)
        else:
            verdict = mode.at_exit(segment, found[0])
            self.scheduler.expectations.learn(progress, segment, verdict is not Next.DEEPER)
        if verdict is not Next.DEEPER:
            self._go_on(progress, verdict, tokens)
        return verdict is not Next.DEEPER

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

    def _fail(self, key: int, reason: str, error: Exception | None = None) -> None:
        if (progress := self.scheduler.running.get(key)) is not None:
            self.runner.clear(progress.slot, progress.length)
        if (request := self.requests.get(key)) is not None:
            request.fail(reason, error)
        self.cancel(key)
