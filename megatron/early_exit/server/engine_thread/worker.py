"""The thread that owns the engine.

Nothing else touches the engine: threads of the web server hand jobs in and read what comes of
them, and every job's sequences are in the engine's batches together with those of all others.
"""

import logging
import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue

from megatron.early_exit.errors import FieldError
from megatron.early_exit.inference.early_exit_engine import EarlyExitEngine
from megatron.early_exit.inference.engine.failures import reason_of, release
from megatron.early_exit.inference.engine.request import Request
from megatron.early_exit.server.engine_thread.job import Job, Tokens
from megatron.early_exit.server.engine_thread.metrics import Metrics
from megatron.early_exit.server.http.errors import ApiError, engine_error, of_field

_EXPIRY_INTERVAL_S = 0.5
_LOOK_INTERVAL_S = 0.02
_SILENCE_S = 60.0
"""Longer than any batch takes: an engine that has not come round for so long hangs."""
_MOST_FAILED_STEPS = 8
"""In a row: an engine that cannot bring anybody a token is not well, and has to be started anew."""
_LOG = logging.getLogger(__name__)


class EngineWorker:
    """Takes jobs to their ends.

    Args:
        engine: belongs to this from now on.
        max_batch_size: sequences that the engine runs at a time.
        max_waiting: so many jobs are taken in beyond the number of the sequences that run.
        metrics: counts.

    Attributes:
        failure: why the engine does not run any more; None while it does.
    """

    def __init__(
        self, engine: EarlyExitEngine, max_batch_size: int, max_waiting: int, metrics: Metrics
    ) -> None:
        self.engine, self.metrics = engine, metrics
        self.failure: str | None = None
        self._max_batch_size, self._max_waiting = max_batch_size, max_waiting
        self._commands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._running: dict[int, tuple[Job, int, Request]] = {}
        self._jobs: set[Job] = set()
        self._lock = threading.Lock()
        self._num_sequences = self._num_failed_steps = 0
        self._refuses = self._leaves = False
        self._next_expiry = self._next_look = 0.0
        self._pulse = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        metrics.watch(
            lambda: self.num_running,
            lambda: self.num_waiting,
            engine.pages,
        )

    @property
    def num_running(self) -> int:
        """Sequences in the engine's batches."""
        return min(self._num_sequences, self._max_batch_size)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for their turn."""
        return self._num_sequences - self.num_running

    def unhealthy_reason(self) -> str | None:
        """Why requests are not answered now; None where they are."""
        if self.failure is not None:
            return f"the engine has failed: {self.failure}"
        if self._refuses:
            return "the server is about to stop"
        if not self._thread.is_alive():
            return "the engine's thread has ended"
        silence = time.monotonic() - self._pulse
        if silence > _SILENCE_S:
            return f"the engine has not come round for {silence:.0f} seconds"
        return None

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Take in a job.

        Raises:
            ApiError: there is no room for it, or the server is about to stop, or has failed.
        """
        with self._lock:
            if self.failure is not None:
                raise self._failed()
            if self._refuses:
                raise ApiError(503, "the server is about to stop", code="shutting_down")
            # Whatever their sizes: they take turns, so that large ones do not keep small ones out.
            limit = self._max_batch_size + self._max_waiting
            if len(self._jobs) >= limit:
                busy = f"{len(self._jobs)} requests are under way, the server's limit is {limit}"
                raise ApiError(429, f"{busy}: try again later", code="queue_full", retry_after=1)
            self._num_sequences += job.size
            self._jobs.add(job)
            # Within the lock: whoever stops the thread finds it behind all jobs.
            self._commands.put(lambda: self._begin(job))

    def cancel(self, job: Job) -> None:
        """End a job for which nobody waits any more."""
        self._commands.put(lambda: self._drop(job))

    def stop(self, seconds: float) -> None:
        """Take nothing new in, finish what is under way, and leave the engine; what is not finished
        after so many seconds is given up."""
        with self._lock:
            self._refuses = True
        until = time.monotonic() + seconds
        while self._num_sequences and time.monotonic() < until and self._thread.is_alive():
            time.sleep(0.05)
        self._commands.put(self._leave)
        self._thread.join(max(5.0, until - time.monotonic()))

    def fail(self, reason: str) -> None:
        """Tell all clients that there will be no answer; nothing is taken in from now on."""
        with self._lock:
            self.failure = self.failure or reason
            jobs, self._jobs = self._jobs, set()
        _LOG.error("the engine has failed: %s", reason)
        for job in jobs:
            job.fail(self._failed())

    def _failed(self) -> ApiError:
        return ApiError(503, f"the engine has failed: {self.failure}", code="engine_failed")

    def _run(self) -> None:
        try:
            while not self._leaves:
                self._pulse = time.monotonic()
                self._drain_commands(wait=not self._running)
                self._expire()
                if self._running:
                    self._forward()
            self.engine.close()
        except Exception as error:
            # What it says is for the log alone: clients and /health get its kind.
            _LOG.exception("an exception in the engine's thread")
            self.fail(type(error).__name__)

    def _drain_commands(self, wait: bool) -> None:
        """Do what the other threads have asked for."""
        try:
            command = self._commands.get(wait, timeout=_EXPIRY_INTERVAL_S)
            while True:
                command()
                command = self._commands.get(False)
        except Empty:
            return

    def _begin(self, job: Job) -> None:
        requests: list[Request] = []
        try:
            for prompt, params in zip(job.prompts, job.params, strict=True):
                group = requests[0] if requests else None
                requests.append(self.engine.submit(prompt, params, group))
        except Exception as error:
            for request in requests:
                self.engine.cancel(request)
            self._forget(job, job.size)
            if isinstance(error, FieldError):
                job.fail(of_field(error))
            else:
                job.fail(self._of_exception(error))
            return
        job.begin(requests)
        for index, request in enumerate(requests):
            self._running[request.key] = (job, index, request)
        self.metrics.began(requests)
        self._end_finished()

    def _of_exception(self, error: Exception) -> ApiError:
        """Log an exception that is about one job; what it is told."""
        _LOG.error("an exception while a request was under way", exc_info=error)
        release(error, self.engine.model.device)
        return engine_error(reason_of(error))

    def _forward(self) -> None:
        news: dict[Job, Tokens] = {}
        has_end = False
        found = self.engine.step()
        for request, token in found:
            if request.key in self._running:
                job, index, _ = self._running[request.key]
                news.setdefault(job, []).append((index, token))
                self.metrics.token(request, token)
                has_end = has_end or token.finish_reason is not None
        now = time.monotonic()
        for job, tokens in news.items():
            self._hand_over(job, tokens, now)
        if found:
            self._num_failed_steps = 0
        # Those that fail, or only wanted scores, end without a token.
        if has_end or now >= self._next_look:
            self._next_look = now + _LOOK_INTERVAL_S
            self._end_finished()

    def _hand_over(self, job: Job, tokens: Tokens, now: float) -> None:
        try:
            job.add(tokens, now)
        except Exception as error:
            job.fail(self._of_exception(error))
            self._drop(job)

    def _end_finished(self) -> None:
        ended = [one for _, _, one in self._running.values() if one.is_finished]
        self._log_failures(ended)
        for request in ended:
            # One that has failed takes the others of its job along.
            if request.key in self._running:
                job, _, _ = self._running.pop(request.key)
                self.metrics.ended(request)
                is_last = job.end_one(request)
                self._forget(job if is_last else None, 1)
                if request.error is not None:
                    self._drop(job)

    def _log_failures(self, ended: list[Request]) -> None:
        """Log the exceptions of a step, each once.

        Raises:
            Exception: the last one, where there have been too many steps like this in a row.
        """
        failures = {id(one.exception): one.exception for one in ended if one.exception}
        for failure in failures.values():
            _LOG.error("an exception in a step of the engine", exc_info=failure)
        if failures:
            self._num_failed_steps += 1
            if self._num_failed_steps >= _MOST_FAILED_STEPS:
                raise failures.popitem()[1]

    def _drop(self, job: Job) -> None:
        own = [request for other, _, request in self._running.values() if other is job]
        for request in own:
            self.engine.cancel(request)
            del self._running[request.key]
            self.metrics.ended(request)
        self._forget(job, len(own))

    def _forget(self, job: Job | None, num_sequences: int) -> None:
        with self._lock:
            self._num_sequences -= num_sequences
            if job is not None:
                self._jobs.discard(job)

    def _expire(self) -> None:
        now = time.monotonic()
        if now < self._next_expiry:
            return
        self._next_expiry = now + _EXPIRY_INTERVAL_S
        for job in {job for job, _, _ in self._running.values() if now > job.deadline}:
            job.expire()
            self._drop(job)

    def _leave(self) -> None:
        self._leaves = True
        for job in list(self._jobs):
            job.fail(ApiError(503, "the server has stopped", code="shutting_down"))
            self._drop(job)
