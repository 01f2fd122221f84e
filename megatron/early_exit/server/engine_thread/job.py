"""One request of a client on its way through the engine's thread."""

import time
from collections.abc import Callable, Iterator, Sequence
from queue import Empty, SimpleQueue

from megatron.early_exit.inference.engine.request import Request
from megatron.early_exit.inference.modes.head_output import NOT_FINITE
from megatron.early_exit.inference.params import SamplingParams
from megatron.early_exit.inference.results import GeneratedToken, GenerationResult
from megatron.early_exit.server.http.errors import ApiError, engine_error

_POLL_S = 1.0
"""How often it is looked whether the client is still there."""
_PATIENCE_S = 2.0
"""How long after its time a job may still be told so by the engine's thread."""

_PACE_S = 0.02
"""Least time between two events of a stream: each wakes a thread that the engine yields to."""

Tokens = list[tuple[int, GeneratedToken]]
"""New tokens, each with the index of its sequence."""


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


class Job:
    """Sequences that a client asks for together.

    The engine's thread fills it, a thread of the web server reads it.

    Args:
        prompts: the token ids of each sequence.
        params: how to continue each.
        seconds: until it is given up.
        is_streamed: tokens are wanted as they come, not only at the end.

    Attributes:
        requests: the engine's, when it has begun.
        deadline: by `time.monotonic`.
    """

    def __init__(
        self,
        prompts: Sequence[list[int]],
        params: Sequence[SamplingParams],
        seconds: float,
        is_streamed: bool,
    ) -> None:
        self.prompts, self.params, self.is_streamed = prompts, params, is_streamed
        self.requests: list[Request] = []
        self.deadline = time.monotonic() + seconds
        self._seconds = seconds
        self._news: SimpleQueue[Tokens | ApiError | None] = SimpleQueue()
        self._unfinished = len(prompts)
        self._is_over = False
        self._held: Tokens = []
        self._next_news = 0.0

    @property
    def size(self) -> int:
        """Number of sequences."""
        return len(self.prompts)

    @property
    def num_tokens(self) -> int:
        """Tokens that the engine has generated so far."""
        return sum(len(request.tokens) for request in self.requests)

    def begin(self, requests: list[Request]) -> None:
        """Record that the engine has taken in all sequences."""
        self.requests = requests
        self._news.put([])

    def add(self, tokens: Tokens, now: float) -> None:
        """Add the new tokens of a step, which ended at `now`, in seconds by `time.monotonic`; those
        that come within a moment go out together."""
        if self.is_streamed:
            self._held += tokens
            if now >= self._next_news:
                self._hand_over()
                self._next_news = now + _PACE_S

    def _hand_over(self) -> None:
        if self._held:
            self._news.put(self._held)
            self._held = []

    def end_one(self, request: Request) -> bool:
        """Record that a sequence has ended; returns whether it was the last one."""
        self._unfinished -= 1
        if request.error is not None:
            self.fail(_of_request(request.error))
        elif self._unfinished == 0:
            self._close(None)
        return self._unfinished == 0

    def fail(self, error: ApiError) -> None:
        """End the job with an error: there will be no answer, or no more of it."""
        self._close(error)

    def expire(self) -> None:
        """End the job because its time is over."""
        self.fail(self._late())

    def _late(self) -> ApiError:
        message = f"there is no whole answer after {self._seconds:g} seconds, the server's limit"
        return ApiError(504, message, code="timeout")

    def _close(self, end: ApiError | None) -> None:
        if not self._is_over:
            self._is_over = True
            self._hand_over()
            self._news.put(end)

    def wait_for_begin(self, is_gone: Callable[[], bool]) -> None:
        """Wait until the engine has taken it in.

        Raises:
            ApiError: it has not.
            ClientGone: the client has not waited for it.
        """
        self._next(is_gone)

    def tokens(self, is_gone: Callable[[], bool]) -> Iterator[Tokens]:
        """The tokens as they come, where they are streamed; else nothing, and it ends at the end.

        Raises:
            ApiError: there is no whole answer.
            ClientGone: the client has not waited for it.
        """
        while (news := self._next(is_gone)) is not None:
            yield news

    def results(self) -> list[GenerationResult]:
        """The answers, in order; only to be asked for after the job has ended well."""
        return [request.result() for request in self.requests]

    def _next(self, is_gone: Callable[[], bool]) -> Tokens | None:
        while True:
            try:
                news = self._news.get(timeout=_POLL_S)
            except Empty:
                if is_gone():
                    raise ClientGone from None
                if time.monotonic() > self.deadline + _PATIENCE_S:
                    raise self._late() from None
                continue
            if isinstance(news, ApiError):
                raise news
            return news


def _of_request(reason: str) -> ApiError:
    if reason == NOT_FINITE:
        return ApiError(500, f"the model cannot answer: {reason}", code="not_finite")
    return engine_error(reason)
