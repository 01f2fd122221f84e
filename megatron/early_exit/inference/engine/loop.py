"""The loop that takes requests to their ends, whatever runs their batches."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Protocol

import torch

from megatron.early_exit.inference.engine.failures import is_usable, release
from megatron.early_exit.inference.engine.fair_queue import FairQueue
from megatron.early_exit.inference.engine.request import Request
from megatron.early_exit.inference.engine.scheduler import Scheduler
from megatron.early_exit.inference.engine.scoring import PrefixScore, TextScores
from megatron.early_exit.inference.modes.mode import Next, Outcome, SampledToken
from megatron.early_exit.inference.results import GeneratedToken
from megatron.early_exit.inference.sequence import Sequence


class Loop(Protocol):
    """What takes requests to their ends, see `DecodingLoop`."""

    def submit(self, request: Request) -> None:
        """Take a request, which runs as soon as there is room for it."""

    def cancel(self, key: int) -> None:
        """End the request with this key; nothing happens if it has ended."""

    def step(self) -> list[tuple[Request, GeneratedToken]]:
        """Run one batch; returns the tokens that it gave, each with its request."""


class DecodingLoop(ABC):
    """Continuous batching: requests come and go between any two batches.

    What one request decides never depends on the others that happen to be in its batch. A subclass
    runs the batches, in this process or over the stages of a pipeline.

    Args:
        scheduler: gives out the slots.
        device: where the model is.

    Attributes:
        requests: those under way, by their keys.
        unscored: those prompts of theirs that are to be scored first.
    """

    def __init__(self, scheduler: Scheduler, device: torch.device) -> None:
        self.scheduler, self.device = scheduler, device
        self.requests: dict[int, Request] = {}
        self.unscored: dict[int, TextScores] = {}
        self._tokens: list[tuple[Request, GeneratedToken]] = []
        self._to_score = FairQueue()
        self._in_scoring: int | None = None

    def submit(self, request: Request) -> None:
        """Take in a request.

        It starts when its prompt has been scored, if it is to be, and a slot is free. It needs
        nothing where it is finished.
        """
        if request.is_finished:
            return
        self.requests[request.key] = request
        if request.scoring is None:
            self.scheduler.add(request.sequence)
        else:
            self.unscored[request.key] = request.scoring
            self._to_score.add(request.key, request.sequence.group)

    def cancel(self, key: int) -> None:
        """End a request that is under way; nothing happens where there is none."""
        request = self.requests.pop(key, None)
        if request is not None:
            request.cancel()
            self.unscored.pop(key, None)
            self._to_score.remove(key)
            self.scheduler.remove(key)

    def step(self) -> list[tuple[Request, GeneratedToken]]:
        """Bring requests forward by one batch, and the scoring of prompts by one piece.

        Returns:
            The tokens that came of it. A request that failed has none, and an `error`.
        """
        self._tokens = []
        self._advance()
        return self._tokens

    @abstractmethod
    def _advance(self) -> None:
        """Do what `step` does."""

    def _continue(self, request: Request, outcome: Outcome, segment: int) -> None:
        """Give the request the tokens that its mode has answered, and start on what it needs next.

        A request that needs to go deeper is where it has to be already.

        Args:
            segment: of the whole model, behind which is the head that the answer comes from.
        """
        if outcome is Next.DEEPER:
            return
        sequence = request.sequence
        if outcome is not Next.DRAFTED:
            for sampled in outcome:
                if sequence.propagates:
                    sequence.leave(segment)
                self._tokens.append((request, request.take(sampled)))
                self._announce(request, sampled)
                if request.is_finished:
                    self.cancel(request.key)
                    return
            self._begin_token(request)
        self.scheduler.go_on(sequence)
        self._requeue(sequence)

    def _begin_token(self, request: Request) -> None:
        """Queue the last token of a request for its way through the model."""
        sequence = request.sequence
        sequence.truncate(sequence.length - 1)
        self._rewind(sequence)
        request.mode.start(sequence.num_pending)

    def _fail(self, key: int, reason: str, error: Exception | None = None) -> None:
        """End a request with an error; what its slot has cached is not to be trusted."""
        if (sequence := self.scheduler.running.get(key)) is not None:
            self._discard(sequence)
        if (request := self.requests.get(key)) is not None:
            request.fail(reason, error)
            self._announce_failure(request)
        self.cancel(key)

    def _can_go_on(self, error: Exception) -> bool:
        """Release what an exception holds; returns whether the device still computes."""
        release(error, self.device)
        return is_usable(self.device)

    @abstractmethod
    def _rewind(self, sequence: Sequence) -> None:
        """Rewind the caches of a sequence to the position of its last token, which is run next."""

    @abstractmethod
    def _discard(self, sequence: Sequence) -> None:
        """Discard what the slot of a sequence has cached: it may even be NaN."""

    def _requeue(self, sequence: Sequence) -> None:
        """Put a sequence in front of the first segment again."""
        return

    def _announce(self, request: Request, sampled: SampledToken) -> None:
        """Record the token that a request has got."""
        return

    def _announce_failure(self, request: Request) -> None:
        """Record that a request has failed."""
        return

    def _next_to_score(self) -> int | None:
        """The key of the request whose prompt is scored next; None where there is none.

        A prompt is scored to its end, and then one of another group has its turn.
        """
        key = self._in_scoring
        current = None if key is None else self.unscored.get(key)
        if current is None or current.is_given:
            self._in_scoring = self._to_score.take()
        return self._in_scoring

    def _take_scores(self, request: Request, scores: Iterable[PrefixScore]) -> None:
        """Add the scores of the next piece of a prompt."""
        request.take_scores(scores)
        if self.unscored[request.key].is_complete:
            del self.unscored[request.key]
        if request.is_finished:
            self.cancel(request.key)
        elif request.key not in self.unscored:
            self.scheduler.add(request.sequence)
