"""The web server around the application: it begins, it serves, it ends in good order."""

import logging
import signal
import threading
import time
from types import FrameType

from flask import Flask
from waitress.server import create_server

from megatron.early_exit.server.settings import ServerSettings
from megatron.early_exit.server.worker import EngineWorker

_SPARE_THREADS = 16
"""For answers that do not wait for the engine: figures, health, errors."""
_POLL_S = 0.2
_LAST_WORDS_S = 1.0
"""Until clients have been sent what is under way when the process ends."""
_LOG = logging.getLogger(__name__)


class WebServer:
    """Serves an application until a signal ends it or the engine fails.

    Args:
        app: the application.
        worker: owns the engine.
        settings: the operator's.
        host: address to listen on.
        port: 0 takes any free one.
        max_batch_size: sequences that the engine runs at a time.
        grace: seconds that requests get to come to their ends.

    Raises:
        ValueError: the address cannot be listened on.
    """

    def __init__(
        self,
        app: Flask,
        worker: EngineWorker,
        settings: ServerSettings,
        host: str,
        port: int,
        max_batch_size: int,
        grace: float,
    ) -> None:
        # A thread is with a request until its end. There is one for all that may run or wait.
        threads = max_batch_size + settings.max_waiting + _SPARE_THREADS
        try:
            self._server = create_server(
                app,
                host=host,
                port=port,
                threads=threads,
                connection_limit=4 * threads,
                backlog=1024,
                # To learn that a client has gone away while its request is under way.
                channel_request_lookahead=1,
                max_request_body_size=2 * settings.max_body_bytes,
                asyncore_use_poll=True,
                ident="early-exit",
                clear_untrusted_proxy_headers=True,
            )
        except OSError as error:
            raise ValueError(f"--host {host} --port {port} cannot be used: {error}") from error
        self._worker, self._grace = worker, grace
        self._is_told_to_end = threading.Event()

    @property
    def port(self) -> int:
        """Where it listens."""
        places = getattr(self._server, "effective_listen", None)
        return int(places[0][1] if places else self._server.effective_port)

    def run(self) -> int:
        """Serve until the end; to be called in the main thread. Returns the exit status."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        self._worker.start()
        thread = threading.Thread(target=self._server.run, name="web", daemon=True)
        thread.start()
        while not self._is_told_to_end.wait(_POLL_S) and self._worker.failure is None:
            pass
        if self._worker.failure is None:
            _LOG.info("finishing what is under way, for up to %g seconds", self._grace)
            self._worker.stop(self._grace)
        # Answers that are there have yet to go out; the rest ends with the process.
        time.sleep(_LAST_WORDS_S)
        return 0 if self._worker.failure is None else 1

    def fail(self, reason: str) -> None:
        """Tell all clients that the engine is lost, and give the answers time to go out.

        For the thread that ends the process as soon as this returns.
        """
        self._worker.fail(reason)
        time.sleep(_LAST_WORDS_S)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._is_told_to_end.set()
