"""The log's line of a request answers a complaint: who, what, how it ended, and why not."""

from __future__ import annotations

import json
import logging
import socket
from urllib.parse import urlparse

import pytest

from megatron.early_exit.server.http.client_address import client_address, trusted_networks
from tests.helpers.server_process import wait_until
from tests.helpers.text_checkpoint import save_text_checkpoint
from tests.helpers.text_server import NAME, text_server

PROMPT = "the 7 quick brown"
SHORT = {"prompt": PROMPT, "max_tokens": 3, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    checkpoint = save_text_checkpoint(tmp_path_factory.mktemp("log"))
    proxies = trusted_networks("127.0.0.1")
    with text_server(checkpoint, trusted_proxies=proxies) as running:
        yield running


@pytest.fixture
def lines(caplog):
    """The lines of requests; they are written when the answer is out."""
    caplog.set_level(logging.INFO)

    def wait(count=1):
        def found():
            return [one.fields for one in caplog.records if one.getMessage() == "request"]

        wait_until(lambda: len(found()) >= count)
        return found()

    return wait


def test_an_answer_is_found_by_what_the_client_knows_of_it(server, lines):
    headers = {"X-Request-Id": "order-66/a"}
    response = server.post("/v1/completions", {**SHORT, "n": 2}, headers=headers)
    assert response.headers["X-Request-Id"] == "order-66/a"
    (line,) = lines()
    assert line["id"] == response.json()["id"]
    assert line["request_id"] == "order-66/a"
    assert (line["model"], line["mode"]) == (NAME, "self_speculative")
    assert line["finish_reasons"] == {"length": 2}
    assert line["status"] == 200
    assert line["completion_tokens"] == 6
    assert 0 < line["first_token_seconds"] <= line["seconds"]
    assert PROMPT not in json.dumps(line)


def test_a_conversation_has_its_own_kind_of_id(server, lines):
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "mode": "full"}
    response = server.post("/v1/chat/completions", body)
    (line,) = lines()
    assert line["id"] == response.json()["id"]
    assert line["id"].startswith("chatcmpl-")
    assert line["mode"] == "full"


@pytest.mark.parametrize("given", [None, "", "a b", "x" * 129, "é", '"', "a\tb"])
def test_an_id_that_is_not_fit_for_a_line_is_replaced(server, lines, given):
    headers = {} if given is None else {"X-Request-Id": given.encode()}
    response = server.get("/health", headers=headers)
    (line,) = lines()
    assert line["request_id"] == response.headers["X-Request-Id"] != given
    assert line["request_id"].isalnum()


def test_a_refusal_has_its_reason_without_what_users_write(server, lines):
    response = server.post("/v1/completions", {**SHORT, "temperature": "my secret"})
    assert response.status_code == 400
    assert "X-Request-Id" in response.headers
    (line,) = lines()
    assert line["status"] == 400
    assert line["reason"].startswith("temperature: ")
    assert "secret" not in json.dumps(line)


def test_other_refusals_have_their_reasons(server, lines):
    server.post("/v1/completions", {**SHORT, "model": "another\nline"})
    server.get("/nowhere")
    server.get("/v1/completions")
    first, *others = lines(3)
    assert first["code"] == "model_not_found"
    assert "does not exist" in first["reason"]
    assert "\n" not in json.dumps(first)
    assert [one["status"] for one in others] == [404, 405]
    assert all(one["reason"] for one in others)


@pytest.mark.parametrize("hangs_up", [False, True])
def test_a_stream_that_has_come_to_its_end_is_no_disconnect(server, lines, caplog, hangs_up):
    place, data = urlparse(server.url), json.dumps({**SHORT, "stream": True})
    head = "POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    with socket.create_connection((place.hostname, place.port), timeout=60) as connection:
        connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n{data}".encode())
        # A line of its own: the last header may end with a 0, too.
        received, end = b"", b"[DONE]" if hangs_up else b"\r\n0\r\n\r\n"
        while end not in received:
            received += connection.recv(2**16)
    (line,) = lines()
    assert line["end"] == "done"
    assert line["finish_reasons"] == {"length": 1}
    assert line["id"].encode() in received
    assert not any("isconnect" in message for message in caplog.messages)


def test_one_that_goes_away_is_a_disconnect(server, lines):
    endless = {**SHORT, "n": 16, "max_tokens": 200, "stream": True}
    response = server.post("/v1/completions", endless, stream=True)
    next(response.iter_content(16))
    response.close()
    (line,) = lines()
    assert line["end"] == "client_gone"
    assert "cancelled" in line["finish_reasons"]


def test_the_client_behind_a_proxy_is_named(server, lines):
    server.get("/health", headers={"X-Forwarded-For": "6.6.6.6, 203.0.113.9"})
    server.get("/health")
    assert [line["client"] for line in lines(2)] == ["203.0.113.9", "127.0.0.1"]


@pytest.mark.parametrize(
    ("trusted", "forwarded", "client"),
    [
        ("", "203.0.113.9", "10.0.0.1"),
        ("10.0.0.2", "203.0.113.9", "10.0.0.1"),
        ("10.0.0.0/8", "", "10.0.0.1"),
        ("10.0.0.0/8", "6.6.6.6, 203.0.113.9", "203.0.113.9"),
        ("10.0.0.0/8", "6.6.6.6, 203.0.113.9, 10.7.7.7", "203.0.113.9"),
        ("10.0.0.0/8", 'evil", 10.7.7.7', "10.7.7.7"),
        ("10.0.0.0/8", "203.0.113.9\r\nX: 1", "10.0.0.1"),
        ("*", "2001:db8::1, 10.7.7.7", "2001:db8::1"),
        ("::1, 10.0.0.1", "203.0.113.9", "203.0.113.9"),
    ],
)
def test_only_those_that_are_trusted_are_believed(trusted, forwarded, client):
    assert client_address("10.0.0.1", forwarded, trusted_networks(trusted)) == client
    assert client_address("::ffff:10.0.0.1", forwarded, trusted_networks(trusted)) in (
        client,
        "::ffff:10.0.0.1",
    )


def test_a_proxy_that_is_no_address_is_refused():
    with pytest.raises(
        ValueError, match="--forwarded-allow-ips proxy is not an address, allowed: "
    ):
        trusted_networks("10.0.0.1, proxy")
