"""Connections that are idle, half-sent, unread or no HTTP hold up nobody, and not for ever."""

from __future__ import annotations

import json
import socket
import threading
import time
from contextlib import contextmanager, suppress
from types import SimpleNamespace

import pytest
import requests
from waitress.channel import HTTPChannel

from megatron.early_exit.server.http.connections import Connection, ConnectionLimits
from megatron.early_exit.server.settings import ExitSettings, ServerSettings
from megatron.early_exit.server.web import WebServer, bound_sockets
from tests.helpers.server_process import wait_until

HEAD = b"POST /echo HTTP/1.1\r\nHost: a\r\n"
QUICK = ConnectionLimits(
    max_connections=40,
    header_timeout_seconds=0.5,
    keep_alive_seconds=0.5,
    body_timeout_seconds=0.5,
    write_timeout_seconds=0.5,
)
PATIENT = ConnectionLimits(max_connections=40)
LARGE = 2**24


class App:
    """Gives bodies back, streams, and waits, as it is asked to."""

    def __init__(self):
        self.go_on = threading.Event()
        self.closed = threading.Event()
        self.bodies = []

    def __call__(self, environ, start_response):
        path = environ["PATH_INFO"]
        body = environ["wsgi.input"].read()
        self.bodies.append(body)
        if path == "/stream":
            start_response("200 OK", [("Content-Type", "text/event-stream")])
            return self.stream(environ)
        if path == "/wait":
            self.go_on.wait(60)
        if path == "/large":
            body = bytes(LARGE)
        start_response("200 OK", [("Content-Length", str(len(body)))])
        return [body]

    def stream(self, environ):
        try:
            yield b"data: 1\n\n"
            self.go_on.wait(60)
            while environ["QUERY_STRING"] == "endless":
                yield bytes(2**16)
            yield b"data: 2\n\n"
        finally:
            self.closed.set()


@contextmanager
def web_server(limits=PATIENT, max_batch_size=1, max_waiting=1):
    """A server without an engine; its port, its application, and the statuses of refusals."""
    statuses = []
    worker = SimpleNamespace(
        metrics=SimpleNamespace(answered=statuses.append),
        failure=None,
        start=lambda: None,
        stop=lambda grace: None,
    )
    settings = ServerSettings(
        model_name="a",
        exits=ExitSettings(mode="full"),
        max_waiting=max_waiting,
        max_body_bytes=1024,
    )
    app = App()
    with bound_sockets("127.0.0.1", 0) as sockets:
        server = WebServer(app, worker, settings, sockets, max_batch_size, limits)
        server.start()
        try:
            yield SimpleNamespace(
                port=server.port, app=app, statuses=statuses, connections=server._connections
            )
        finally:
            app.go_on.set()
            server.stop(0)


def connect(server, data=b"", **options):
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    connection.sendall(data)
    return connection


def is_ended(connection):
    """Wait until the other side has closed."""
    try:
        return connection.recv(1) == b""
    except ConnectionError:
        return True


def whole_answer(connection):
    """All until the other side closes."""
    found = b""
    while piece := connection.recv(2**16):
        found += piece
    return found


def assert_serves(server):
    response = requests.get(f"http://127.0.0.1:{server.port}/health", timeout=60)
    assert response.status_code == 200


CLIENTS = {
    "idle": b"",
    "half a line": b"GET /he",
    "half of the headers": HEAD + b"X-Long: a",
    "half of a body": HEAD + b"Content-Length: 500\r\n\r\n" + b"a" * 100,
    "half of a chunk": HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nab",
}


@pytest.mark.parametrize("kind", CLIENTS)
def test_many_that_go_no_further_give_way_to_those_that_do(kind):
    with web_server() as server:
        held = [connect(server, CLIENTS[kind]) for _ in range(120)]
        assert_serves(server)
        # The first ones have given way; the last ones are still welcome.
        assert is_ended(held[0])
        wait_until(lambda: len(server.connections.all) <= 40)
        assert len(server.connections.all) > 20
        for one in held:
            one.close()
        assert_serves(server)


@pytest.mark.parametrize("kind", CLIENTS)
def test_one_that_goes_no_further_is_let_go_in_time(kind):
    with web_server(QUICK) as server:
        assert is_ended(connect(server, CLIENTS[kind]))
        assert_serves(server)


def test_one_that_sends_byte_by_byte_does_not_win_time():
    with web_server(QUICK) as server:
        connection = connect(server, HEAD)
        with suppress(ConnectionError):
            while True:
                connection.sendall(b"X")
                time.sleep(0.05)
        assert is_ended(connection)


def test_an_idle_connection_between_requests_is_let_go_in_time():
    with web_server(QUICK) as server:
        connection = connect(server, HEAD + b"Content-Length: 2\r\n\r\nhi")
        assert whole_answer(connection).endswith(b"\r\n\r\nhi")


def test_an_answer_that_takes_its_time_is_waited_for():
    with web_server(QUICK) as server:
        connection = connect(
            server, HEAD.replace(b"/echo", b"/wait") + b"Content-Length: 2\r\n\r\nhi"
        )
        time.sleep(1.7)
        server.app.go_on.set()
        assert whole_answer(connection).endswith(b"\r\n\r\nhi")


@pytest.mark.parametrize("path", [b"/large", b"/stream?endless"])
def test_a_client_that_does_not_read_is_let_go_in_time(path):
    with web_server(QUICK) as server:
        server.app.go_on.set()
        connection = connect(server, HEAD.replace(b"/echo", path) + b"Content-Length: 0\r\n\r\n")
        wait_until(lambda: server.connections.all and server.app.bodies)
        wait_until(lambda: not server.connections.all)
        if b"stream" in path:
            assert server.app.closed.wait(60)
        connection.close()
        assert_serves(server)


def test_unread_answers_and_bodies_have_a_limit_together():
    limits = ConnectionLimits(max_connections=40, max_buffered_bytes=2**20)
    with web_server(limits) as server:
        held = [connect(server, HEAD.replace(b"/echo", b"/large") + b"\r\n") for _ in range(4)]
        wait_until(lambda: len(server.app.bodies) == 4)
        wait_until(lambda: sum(one.num_bytes for one in server.connections.all) <= 2**20)
        for one in held:
            one.close()
        assert_serves(server)


def test_health_has_threads_of_its_own():
    with web_server() as server:
        waiting = HEAD.replace(b"/echo", b"/wait") + b"Content-Length: 0\r\n\r\n"
        held = [connect(server, waiting) for _ in range(30)]
        # More than there are threads.
        wait_until(lambda: len(server.app.bodies) >= 18)
        assert_serves(server)
        for one in held:
            one.close()


def test_a_connection_goes_on_behind_a_stream():
    with web_server() as server:
        server.app.go_on.set()
        with requests.Session() as session:
            url = f"http://127.0.0.1:{server.port}/stream"
            first, second = (session.get(url, timeout=60) for _ in range(2))
        for answer in (first, second):
            assert answer.content == b"data: 1\n\ndata: 2\n\n"
            assert "Connection" not in answer.headers
        assert len(server.connections.all) <= 1
        asked = connect(server, b"GET /stream HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        assert b"Connection: close" in whole_answer(asked)


def test_a_body_that_is_too_large_is_not_kept():
    with web_server() as server:
        connection = connect(server, HEAD + b"Content-Length: 3000000\r\n\r\n")
        for _ in range(29):
            connection.sendall(bytes(100_000))
        wait_until(lambda: server.connections.all)
        (held,) = server.connections.all
        # There is no request before the first bytes have been read.
        wait_until(lambda: getattr(held.request, "body_bytes_received", 0) == 2_900_000)
        assert held.num_bytes == 1025
        connection.sendall(bytes(100_000))
        assert connection.recv(15).startswith(b"HTTP/1.1 200")


def test_a_body_beyond_all_bounds_is_refused_before_it_is_sent():
    with web_server() as server:
        head = HEAD + b"Expect: 100-continue\r\nContent-Length: 1000000000\r\n\r\n"
        head, _, body = whole_answer(connect(server, head)).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 413 ")
        error = json.loads(body)["error"]
        assert error["message"] == "body: is too large, allowed: up to 1024 bytes"
        assert (error["type"], error["param"]) == ("invalid_request_error", "body")
        assert server.statuses == [413]


def test_bodies_that_are_being_answered_count():
    with web_server() as server:
        head = HEAD.replace(b"/echo", b"/wait") + b"Content-Length: 1000\r\n\r\n"
        connection = connect(server, head + bytes(1000))
        wait_until(lambda: server.app.bodies)
        assert server.connections.all[0].num_bytes == 1000
        connection.close()


def test_a_new_connection_is_not_the_first_to_give_way_because_others_sent_a_byte_later():
    with web_server() as server:
        held = [connect(server, CLIENTS["half of the headers"]) for _ in range(30)]
        wait_until(lambda: len(server.connections.all) == 30)
        good = connect(server)
        wait_until(lambda: len(server.connections.all) == 31)
        came = max(one.creation_time for one in server.connections.all)
        for one in held:
            one.sendall(b"a")
        wait_until(lambda: sum(o.last_activity > came for o in server.connections.all) == 30)
        more = [connect(server) for _ in range(20)]
        assert is_ended(held[0])
        good.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
        assert good.recv(12) == b"HTTP/1.1 200"
        for one in (*held, *more, good):
            one.close()


def test_an_address_with_few_connections_does_not_give_way_to_one_with_many():
    with web_server() as server:
        place = ("127.0.0.1", server.port)
        with socket.create_connection(place, timeout=60, source_address=("127.0.0.2", 0)) as other:
            wait_until(lambda: len(server.connections.all) == 1)
            held = [connect(server) for _ in range(120)]
            assert is_ended(held[0])
            # It has been there for longest.
            other.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
            assert other.recv(12) == b"HTTP/1.1 200"
        for one in held:
            one.close()


def test_those_that_still_read_an_answer_give_way_last():
    with web_server() as server:
        reader = connect(server, HEAD.replace(b"/echo", b"/large") + b"\r\n")
        wait_until(lambda: any(o.is_sending and not o.is_served for o in server.connections.all))
        held = [connect(server) for _ in range(100)]
        assert is_ended(held[0])
        read = reader.recv(2**16)
        while len(read) < LARGE and (piece := reader.recv(2**16)):
            read += piece
        assert len(read.partition(b"\r\n\r\n")[2]) >= LARGE - 2**16
        for one in (*held, reader):
            one.close()


def test_a_client_is_given_time_to_read_from_when_there_is_something(monkeypatch):
    seen = []
    connection = Connection.__new__(Connection)
    connection.total_outbufs_len, connection.last_activity = 0, time.time() - 600

    def write_soon(self, data):
        # As waitress does, before a thread may change.
        self.total_outbufs_len += len(data)
        seen.append(self.is_late(time.time(), PATIENT))
        return len(data)

    monkeypatch.setattr(HTTPChannel, "write_soon", write_soon)
    assert connection.write_soon(b"late, but whole") == 15
    assert seen == [False]


LENGTH, CHUNKED = b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n"
CHUNKS = b"\r\n0\r\n\r\n"
REFUSED = {
    "both lengths": HEAD + LENGTH + CHUNKED + CHUNKS,
    "both, the other way round": HEAD + CHUNKED + LENGTH + CHUNKS,
    "two lengths": HEAD + LENGTH + b"Content-Length: 6\r\n\r\nhello!",
    "the same length twice": HEAD + LENGTH + LENGTH + b"\r\nhello",
    "a list of lengths": HEAD + b"Content-Length: 5, 5\r\n\r\nhello",
    "a length with a sign": HEAD + b"Content-Length: +5\r\n\r\nhello",
    "a hexadecimal length": HEAD + b"Content-Length: 0x5\r\n\r\nhello",
    "an empty length": HEAD + b"Content-Length:\r\n\r\nhello",
    "chunked twice": HEAD + CHUNKED + CHUNKED + CHUNKS,
    "chunked, chunked": HEAD + b"Transfer-Encoding: chunked, chunked\r\n" + CHUNKS,
    "an empty encoding": HEAD + b"Transfer-Encoding:\r\n" + CHUNKS,
    "chunks in HTTP/1.0": b"POST / HTTP/1.0\r\n" + CHUNKED + CHUNKS,
    "a folded header": HEAD + b"X: a\r\n b\r\n\r\n",
    "a folded length": HEAD + b"Content-Length:\r\n 5\r\n\r\nhello",
    "a space before the colon": HEAD + b"Content-Length : 5\r\n\r\nhello",
    "no name": HEAD + b": a\r\n\r\n",
    "a bare line feed": HEAD + b"X: a\nContent-Length: 5\r\n\r\nhello",
    "a bare carriage return": HEAD + b"X: a\rb\r\n\r\n",
    "a NUL": HEAD + b"X: a\x00b\r\n\r\n",
    "no host": b"GET / HTTP/1.1\r\n\r\n",
    "two hosts": HEAD + b"Host: b\r\n\r\n",
    "a host with a space": b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n",
    "no host, and a body on demand": (
        b"POST /echo HTTP/1.1\r\nExpect: 100-continue\r\n" + LENGTH + b"\r\n"
    ),
    "no first line": b"hello\r\n\r\n",
    "a chunk's size that is no number": HEAD + CHUNKED + b"\r\nxyz\r\n",
    "a chunk's size with a sign": HEAD + CHUNKED + b"\r\n-5\r\nhello",
    "a chunk's size with 0x": HEAD + CHUNKED + b"\r\n0x5\r\nhello",
    "a chunk without its end": HEAD + CHUNKED + b"\r\n5\r\nhelloworld\r\n",
    "a chunk's extension without end": HEAD + CHUNKED + b"\r\n5;" + b"a" * 2000,
    "a trailer without end": HEAD + CHUNKED + b"\r\n0\r\n" + b"X: a\r\n" * 4000,
}
SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n"


@pytest.fixture(scope="module")
def server():
    with web_server() as running:
        yield running


@pytest.mark.parametrize("kind", REFUSED)
def test_what_could_be_understood_in_two_ways_is_refused(server, kind):
    served, refused = len(server.app.bodies), len(server.statuses)
    # What stands behind it is not taken for a request either.
    answer = b""
    try:
        answer = whole_answer(connect(server, REFUSED[kind] + SMUGGLED))
    except ConnectionError:
        # The answer is lost where the client was still sending.
        wait_until(lambda: len(server.statuses) > refused)
    if answer:
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.split()[1] == b"400"
        assert b"Connection: close" in head
        assert json.loads(body)["error"]["message"]
    assert server.statuses[refused:] == [400]
    assert len(server.app.bodies) == served


def test_other_encodings_are_refused(server):
    asked = connect(server, HEAD + b"Transfer-Encoding: gzip, chunked\r\n" + CHUNKS + SMUGGLED)
    assert whole_answer(asked).startswith(b"HTTP/1.1 501 ")


@pytest.mark.parametrize(
    "body", [LENGTH + b"\r\nhello", CHUNKED + b"\r\n2;a=b\r\nhe\r\n3\r\nllo\r\n0\r\nX: a\r\n\r\n"]
)
def test_what_is_right_is_served_twice(server, body):
    connection = connect(server, (HEAD + body) * 2)
    served = b""
    while served.count(b"hello") < 2:
        served += connection.recv(2**16)
    connection.close()
