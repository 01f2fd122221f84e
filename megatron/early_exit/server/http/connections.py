"""The connections of a server: how long each may take, and who gives way where there are too many.

waitress reads requests and writes answers in one thread, so that a slow client holds no other; here
it learns to end what takes too long. New connections are always accepted; old idle ones are closed
instead.
"""

import logging
import resource
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from waitress import wasyncore
from waitress.channel import HTTPChannel
from waitress.server import TcpWSGIServer
from waitress.task import ErrorTask, ThreadedTaskDispatcher, WSGITask

from megatron.early_exit.server.http.errors import ApiError, body_too_large
from megatron.early_exit.server.http.http_parser import RequestParser
from megatron.early_exit.server.http.logs import log

_ACCEPTED_AT_A_TIME = 128
_RESERVED_THREADS = 2
_RESERVED_PATHS = ("/health", "/metrics")
_RESERVED_FILES = 512
"""Descriptors for all but connections: the model's files, large bodies, connections that have just
been accepted."""
_WANTED_FILES = 16384
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionLimits:
    """What connections may take.

    Attributes:
        max_connections: open connections. Above it idle ones are closed: first those of the
            address that has most of them, the longest idle first.
        header_timeout_seconds: from a connection's or a request's first byte to the end of its
            headers.
        keep_alive_seconds: between two requests.
        body_timeout_seconds: for a body, beside the time that `min_body_bytes_per_second` gives it.
        min_body_bytes_per_second: the rate that a longer body comes with at least.
        write_timeout_seconds: in which a client takes nothing of what waits for it.
        max_buffered_bytes: request bodies and answers not yet sent, of all connections together;
            above it the connections that have been silent for longest are closed.
    """

    max_connections: int = 2048
    header_timeout_seconds: float = 20.0
    keep_alive_seconds: float = 75.0
    body_timeout_seconds: float = 30.0
    min_body_bytes_per_second: float = 2**14
    write_timeout_seconds: float = 60.0
    max_buffered_bytes: int = 2**29


def make_room_for_files() -> int:
    """Raise the limit of open files as far as the system allows and it is of use; returns it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _WANTED_FILES if hard == resource.RLIM_INFINITY else min(_WANTED_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted
    return _WANTED_FILES if soft == resource.RLIM_INFINITY else soft


class _Task(WSGITask):  # type: ignore[misc]
    """An answer; behind a stream, too, the connection serves further requests."""

    close_on_finish: bool

    def build_response_header(self) -> bytes:
        is_last = self.close_on_finish
        head: bytes = super().build_response_header()
        asked = self.request.headers.get("CONNECTION", "").lower()
        if self.chunked_response and not is_last and asked != "close":
            self.close_on_finish = False
            head = head.replace(b"Connection: close\r\n", b"", 1)
        return head


class _Refusal(ErrorTask):  # type: ignore[misc]
    """The error response to bytes that are no valid HTTP request; closes the connection."""

    def execute(self) -> None:
        error = self.request.error
        if error.code == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
            refusal = body_too_large(self.channel.adj.kept_body_bytes - 1)
        else:
            refusal = ApiError(error.code, str(error.body), code="bad_http")
        text = refusal.body.model_dump_json().encode()
        self.status = f"{error.code} {error.reason}"
        self.response_headers.append(("Content-Type", "application/json"))
        self.set_close_on_finish()
        self.content_length = len(text)
        self.channel.server.refused(error.code)
        client = self.channel.addr[0]
        log(_LOG, "request", status=error.code, client=client, reason=refusal.logged)
        self.write(text)


class Connection(HTTPChannel):  # type: ignore[misc]
    """One connection; its times are by `time.time`, as waitress'."""

    parser_class = RequestParser
    task_class = _Task
    error_task_class = _Refusal
    num_served = 0
    served_until = 0.0

    def service(self) -> None:
        """Answer a request."""
        self.num_served += 1
        super().service()
        self.served_until = time.time()

    def write_soon(self, data: Any) -> int:
        """Queue bytes for sending. A client's silence counts from when it has something to read."""
        if not self.total_outbufs_len:
            self.last_activity = time.time()
        return int(super().write_soon(data))

    @property
    def is_sending(self) -> bool:
        """Whether something of an answer waits for its client."""
        return bool(self.total_outbufs_len)

    @property
    def is_served(self) -> bool:
        """Whether a thread answers one of its requests, or soon will."""
        return bool(self.requests)

    @property
    def idle_since(self) -> float:
        """When its last answer ended, or when it came, in seconds by `time.time`: bytes of half a
        request are no progress."""
        return max(float(self.creation_time), self.served_until)

    @property
    def num_bytes(self) -> int:
        """Bytes that are kept for it in memory or in files."""
        bodies = [getattr(one, "body_rcv", None) for one in (*self.requests, self.request)]
        return int(self.total_outbufs_len) + sum(len(one) for one in bodies if one is not None)

    def is_late(self, now: float, limits: ConnectionLimits) -> bool:
        """Whether what it waits for has taken too long.

        Args:
            now: the time in seconds, by the clock of `idle_since`.
            limits: of the server.
        """
        silence = now - self.last_activity
        if self.is_sending:
            return bool(silence > limits.write_timeout_seconds)
        if self.is_served:
            return False
        request = self.request
        if request is None:
            most = limits.keep_alive_seconds if self.num_served else limits.header_timeout_seconds
            return bool(silence > most)
        # A request that has come early begins to count when the one before it is answered.
        taken = now - max(request.began, self.served_until)
        if not request.headers_finished:
            return bool(taken > limits.header_timeout_seconds)
        rate = request.body_bytes_received / limits.min_body_bytes_per_second
        return bool(taken > limits.body_timeout_seconds + rate)


class _Listener(TcpWSGIServer):  # type: ignore[misc]
    """Accepts connections at one address."""

    channel_class = Connection
    reserve: ThreadedTaskDispatcher
    refused: Callable[[int], None]
    most: int

    def readable(self) -> bool:
        """Whether to accept connections: as long as others can give way."""
        return bool(self.accepting) and len(self._map) < self.most

    def handle_accept(self) -> None:
        """Accept all that wait, up to a number: each look at the connections looks at all."""
        for _ in range(_ACCEPTED_AT_A_TIME):
            before = len(self._map)
            super().handle_accept()
            if len(self._map) == before:
                return

    def add_task(self, task: Connection) -> None:
        """Have a request answered; those that tell how the server is have threads of their own."""
        request = task.requests[0]
        is_short = request.error is not None or request.path in _RESERVED_PATHS
        (self.reserve if is_short else self.task_dispatcher).add_task(task)


class Connections:
    """All connections of a server, and the thread that attends to them.

    Args:
        app: the WSGI application.
        adj: waitress' settings.
        sockets: where to listen.
        limits: of the connections.
        refused: is told the status of an answer that the application knows nothing of.

    Raises:
        OSError: somebody else has come to listen there.
    """

    def __init__(
        self,
        app: Any,
        adj: Any,
        sockets: Sequence[Any],
        limits: ConnectionLimits,
        refused: Callable[[int], None],
    ) -> None:
        self._map: dict[int, Any] = {}
        self._limits = limits
        self._most = min(limits.max_connections, max(make_room_for_files() - _RESERVED_FILES, 64))
        self._next_look = 0.0
        self._adj = adj
        # Each request has a line of its own, whether its client stays to the end or not.
        logging.getLogger("waitress").setLevel(logging.WARNING)
        threads, reserve = ThreadedTaskDispatcher(), ThreadedTaskDispatcher()
        threads.set_thread_count(adj.threads)
        reserve.set_thread_count(_RESERVED_THREADS)
        self.listeners = []
        for one in sockets:
            where = (one.family, one.type, one.proto, one.getsockname())
            options = {"dispatcher": threads, "adj": adj, "bind_socket": False, "sockinfo": where}
            listener = _Listener(app, self._map, True, one, **options)
            listener.reserve, listener.refused = reserve, refused
            listener.most = self._most + _RESERVED_FILES // 2
            self.listeners.append(listener)

    @property
    def all(self) -> list[Connection]:
        """All connections that are open now."""
        return [one for one in list(self._map.values()) if isinstance(one, Connection)]

    def run(self) -> None:
        """Run the I/O loop; returns only when there is nothing left to listen to."""
        while self._map:
            self._close_overdue_and_excess()
            wasyncore.poll2(self._adj.asyncore_loop_timeout, self._map)

    def _close_overdue_and_excess(self) -> None:
        """End what has to be ended, between two looks at what there is to read and to write.

        Not while events are handled: the descriptor of one that is closed then could be given to a
        new connection, which the rest of the events would be taken for.
        """
        now = time.time()
        if now >= self._next_look:
            self._next_look = now + 1.0
            self._end_late(now)
        if len(self._map) > self._most:
            self._evict_idle()

    def _end_late(self, now: float) -> None:
        everyone = self.all
        late = [one for one in everyone if one.is_late(now, self._limits)]
        for one in late:
            one.handle_close()
        rest = sorted((o for o in everyone if o.connected), key=lambda one: one.last_activity)
        excess = sum(one.num_bytes for one in rest) - self._limits.max_buffered_bytes
        for one in rest:
            if excess <= 0:
                break
            if one.num_bytes:
                excess -= one.num_bytes
                one.handle_close()

    def _evict_idle(self) -> None:
        """Close so many that there is room for some time: finding them takes a look at all.

        Those that still read an answer go last; never, and unread answers would hold all places.
        """
        idle = [one for one in self.all if not one.is_served]
        per_address = Counter(one.addr[0] for one in idle)
        idle.sort(key=lambda one: (one.is_sending, -per_address[one.addr[0]], one.idle_since))
        excess = len(self._map) - self._most + self._most // 16
        for one in idle[:excess]:
            one.handle_close()
        if idle:
            log(_LOG, "connections have given way to new ones", number=len(idle[:excess]))
