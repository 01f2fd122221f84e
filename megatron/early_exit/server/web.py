"""The web server around the application: it begins, it serves, it ends in good order."""

import logging
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import FrameType

from flask import Flask
from waitress.adjustments import Adjustments

from megatron.early_exit.server.engine_thread.worker import EngineWorker
from megatron.early_exit.server.http.connections import ConnectionLimits, Connections
from megatron.early_exit.server.settings import ServerSettings

_SPARE_THREADS = 16
"""For answers that do not wait for the engine: figures, health, errors."""
_LARGEST_BODY = 2**26
"""Bytes; larger bodies than allowed are read up to this, so that the application answers them."""
_POLL_S = 0.2
_LAST_WORDS_S = 1.0
"""Until clients have been told that the engine is lost."""
_LOG = logging.getLogger(__name__)


@contextmanager
def bound_sockets(host: str, port: int) -> Iterator[list[socket.socket]]:
    """Bind an address, one socket for each of its protocols, before there is anything to serve.

    Nobody can connect before a `WebServer` listens. Where the block ends with an exception they are
    closed, else the server has them.

    Args:
        host: address or name to listen on.
        port: 0 takes any free one.

    Raises:
        OSError: it cannot be listened on.
    """
    with ExitStack() as stack:
        found: list[socket.socket] = []
        try:
            places = socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
            for family, kind, protocol, _, place in dict.fromkeys(places):
                one = stack.enter_context(socket.socket(family, kind, protocol))
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                one.bind(place)
                found.append(one)
        except OSError as error:
            refusal = OSError(f"--host {host} --port {port} cannot be used: {error}")
            refusal.errno = error.errno
            raise refusal from error
        yield found
        stack.pop_all()


class WebServer:
    """Serves an application until a signal ends it or the engine fails.

    Args:
        app: the application.
        worker: owns the engine.
        settings: the operator's.
        sockets: see `bound_sockets`.
        max_batch_size: sequences that the engine runs at a time.
        limits: of the connections.

    Raises:
        OSError: somebody else has come to listen there.
    """

    def __init__(
        self,
        app: Flask,
        worker: EngineWorker,
        settings: ServerSettings,
        sockets: Sequence[socket.socket],
        max_batch_size: int,
        limits: ConnectionLimits | None = None,
    ) -> None:
        adj = Adjustments(
            sockets=sockets,
            # A thread is with a request until its end. There is one for all that may be under way.
            threads=max_batch_size + settings.max_waiting + _SPARE_THREADS,
            backlog=1024,
            # To learn that a client has gone away while its request is under way.
            channel_request_lookahead=1,
            max_request_body_size=max(_LARGEST_BODY, 2 * settings.max_body_bytes),
            # What a client does not read goes into a file: no thread waits for it to be read.
            outbuf_high_watermark=2**60,
            ident="early-exit",
            clear_untrusted_proxy_headers=False,
        )
        # One more than is allowed tells the application that it is too large.
        adj.kept_body_bytes = settings.max_body_bytes + 1
        refused = worker.metrics.answered
        self._connections = Connections(app, adj, sockets, limits or ConnectionLimits(), refused)
        self._worker = worker
        self._is_told_to_end = threading.Event()
        self._thread = threading.Thread(target=self._connections.run, name="web", daemon=True)

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._connections.listeners[0].effective_port)

    def start(self) -> None:
        """Begin to serve."""
        self._worker.start()
        self._thread.start()

    def run(self, grace: float) -> int:
        """Serve until the end; to be called in the main thread.

        Args:
            grace: seconds that requests get to come to their ends.

        Returns:
            The exit status.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        self.start()
        while self._is_well() and not self._is_told_to_end.wait(_POLL_S):
            pass
        if not self._is_well():
            time.sleep(_LAST_WORDS_S)
            return 1
        _LOG.info("finishing what is under way, for up to %g seconds", grace)
        self.stop(grace)
        return 0 if self._is_well() else 1

    def stop(self, grace: float) -> None:
        """Take nothing new in, and give answers `grace` seconds to be made and read."""
        until = time.monotonic() + grace
        self._worker.stop(grace)
        # At least one look: what was given up is to be told of even without any grace.
        time.sleep(_POLL_S)
        while self._is_sending() and time.monotonic() < until:
            time.sleep(_POLL_S)

    def _is_well(self) -> bool:
        return self._worker.failure is None and self._thread.is_alive()

    def _is_sending(self) -> bool:
        """Whether a connection has a request without an answer, or an answer not yet read."""
        return any(one.is_served or one.is_sending for one in self._connections.all)

    def fail(self, reason: str) -> None:
        """Tell all clients that the engine is lost, and give the answers time to go out.

        For the thread that ends the process as soon as this returns.
        """
        self._worker.fail(reason)
        time.sleep(_LAST_WORDS_S)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._is_told_to_end.set()
