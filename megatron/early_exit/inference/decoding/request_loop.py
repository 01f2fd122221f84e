"""What the loops that schedule requests have in common: how requests come and go."""

from abc import ABC, abstractmethod

from megatron.early_exit.inference.decoding.fair_queue import FairQueue
from megatron.early_exit.inference.decoding.request import Request
from megatron.early_exit.inference.decoding.results import GeneratedToken
from megatron.early_exit.inference.decoding.scheduler import Scheduler
from megatron.early_exit.inference.decoding.scoring import PrefixScore, TextScores


class RequestLoop(ABC):
    """Takes requests in and lets them go; how they get their tokens is a subclass's own.

    Args:
        scheduler: gives out the slots.

    Attributes:
        requests: those under way, by their keys.
        unscored: those prompts of theirs that are to be scored first.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.requests: dict[int, Request] = {}
        self.unscored: dict[int, TextScores] = {}
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
            self.scheduler.add(request.key, request.length, request.group)
        else:
            self.unscored[request.key] = request.scoring
            self._to_score.add(request.key, request.group)

    def cancel(self, key: int) -> None:
        """End a request that is under way; nothing happens where there is none."""
        request = self.requests.pop(key, None)
        if request is not None:
            request.cancel()
            self.unscored.pop(key, None)
            self._to_score.remove(key)
            self.scheduler.remove(key)

    @abstractmethod
    def step(self) -> list[tuple[Request, GeneratedToken]]:
        """Bring requests forward by one batch, and the scoring of prompts by one piece.

        Returns:
            The tokens that came of it. A request that failed has none, and an `error`.
        """

    def _next_to_score(self) -> int | None:
        """Whose prompt has a piece that is to be scored now; None where there is none.

        A prompt is scored to its end, and then one of another group has its turn.
        """
        key = self._in_scoring
        current = None if key is None else self.unscored.get(key)
        if current is None or current.is_given:
            self._in_scoring = self._to_score.take()
        return self._in_scoring

    def _take_scores(self, request: Request, scores: list[PrefixScore]) -> None:
        """The next piece of a prompt has been scored."""
        request.take_scores(scores)
        if self.unscored[request.key].is_complete:
            del self.unscored[request.key]
        if request.is_finished:
            self.cancel(request.key)
        elif request.key not in self.unscored:
            self.scheduler.add(request.key, request.length, request.group)
