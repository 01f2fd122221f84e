"""The server ends, is killed, breaks or has clients that go away: who is told what, and when."""

from __future__ import annotations

import json
import logging
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlparse

import pytest
import requests
import torch

from megatron.early_exit.inference import EarlyExitEngine, SamplingParams
from tests.helpers.server_process import free_port, server_process, wait_until
from tests.helpers.speed import patient
from tests.helpers.text_checkpoint import save_text_checkpoint
from tests.helpers.text_server import text_server
from tests.helpers.warm_ranks import WarmRanks
from tools.run_early_exit_text_generation_server import main

PROMPT = "the 7 quick brown"
GREEDY = {"temperature": 0, "ignore_eos": True, "mode": "full"}
SHORT = {"prompt": PROMPT, "max_tokens": 3, **GREEDY}
LONG = {"prompt": PROMPT, "n": 16, "max_tokens": 80, **GREEDY}
"""Half a second or more where sequences run one by one."""
ENDLESS = {**LONG, "prompt": [PROMPT] * 6, "max_tokens": 200}
"""Ten seconds or more; of its 96 sequences 95 wait."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_text_checkpoint(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def engine(checkpoint):
    return EarlyExitEngine.from_checkpoint(checkpoint)


@pytest.fixture(scope="module")
def servers():
    with WarmRanks("serving") as ranks:
        yield ranks


def begun_stream(server, body):
    """A stream that has brought its first event, and its further lines."""
    response = server.post(body={**body, "stream": True}, stream=True)
    lines = (line for line in response.iter_lines() if line)
    assert next(lines).startswith(b"data: {")
    return response, lines


def event(line):
    return json.loads(line.removeprefix(b"data: "))


def assert_error(body, code, *parts):
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["code"] == code
    for part in parts:
        assert part in body["error"]["message"]


# --- signals ---------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_is_under_way_is_finished_before_the_end(
    checkpoint, engine, servers, tmp_path, number
):
    flags = ["--max-batch-size", "1", "--shutdown-timeout", str(patient(100))]
    with (
        server_process(checkpoint, tmp_path, *flags, ranks=servers) as server,
        ThreadPoolExecutor() as pool,
    ):
        _, lines = begun_stream(server, LONG)
        whole = pool.submit(server.post, LONG)
        wait_until(lambda: server.health().json()["num_requests_waiting"] > 16)
        server.signal(number)
        wait_until(lambda: server.health().status_code == 503)
        assert server.health().json()["reason"] == "the server is about to stop"
        refused = server.post(SHORT)
        assert refused.status_code == 503
        assert_error(refused.json(), "shutting_down")
        *_, last = lines
        assert last == b"data: [DONE]"
        (expected,) = engine.generate(PROMPT, SamplingParams(max_tokens=80, ignore_eos=True))
        assert whole.result().status_code == 200
        texts = {choice["text"] for choice in whole.result().json()["choices"]}
        assert texts == {expected.text}
        assert server.wait() == 0
        assert "Traceback" not in server.log.read_text()


def test_what_takes_too_long_is_given_up_at_the_end(checkpoint, servers, tmp_path):
    flags = ["--max-batch-size", "1", "--shutdown-timeout", "0.3"]
    with (
        server_process(checkpoint, tmp_path, *flags, ranks=servers) as server,
        ThreadPoolExecutor() as pool,
    ):
        _, lines = begun_stream(server, ENDLESS)
        whole = pool.submit(server.post, LONG)
        wait_until(lambda: server.health().json()["num_requests_waiting"] > 95)
        server.signal(signal.SIGTERM)
        *_, last = lines
        assert_error(event(last), "shutting_down")
        assert whole.result().status_code == 503
        assert_error(whole.result().json(), "shutting_down")
        assert server.wait() == 0
        assert "Traceback" not in server.log.read_text()


def test_a_killed_server_is_missed_at_once_and_can_be_started_again(checkpoint, servers, tmp_path):
    again = {"ranks": servers, "port": free_port()}
    with (
        server_process(checkpoint, tmp_path, "--max-batch-size", "1", **again) as server,
        ThreadPoolExecutor() as pool,
    ):
        _, lines = begun_stream(server, ENDLESS)
        whole = pool.submit(server.post, LONG)
        wait_until(lambda: server.health().json()["num_requests_waiting"] > 95)
        server.signal(signal.SIGKILL)
        with pytest.raises(requests.ConnectionError):
            whole.result()
        with pytest.raises(requests.exceptions.ChunkedEncodingError):
            list(lines)
        assert server.wait() == -signal.SIGKILL
    with server_process(checkpoint, tmp_path, **again) as server:
        assert server.post(SHORT).status_code == 200


# --- a broken engine -------------------------------------------------------------------------


def test_an_engine_that_breaks_is_told_to_all(checkpoint):
    with (
        text_server(checkpoint, max_batch_size=1) as server,
        ThreadPoolExecutor() as pool,
    ):

        def post(body, **options):
            return server.post("/v1/completions", body, **options)

        stream = post({**ENDLESS, "stream": True}, stream=True)
        lines = (line for line in stream.iter_lines() if line)
        next(lines)
        whole = pool.submit(post, LONG)
        wait_until(lambda: server.worker.num_waiting > 95)

        def breaks():
            raise RuntimeError("a cable is loose")

        server.worker.engine.step = breaks
        *_, last = lines
        # What the exception says is for the log.
        reason = "RuntimeError"
        assert_error(event(last), "engine_failed", reason)
        assert whole.result().status_code == 503
        assert_error(whole.result().json(), "engine_failed", reason)
        refused = post(SHORT)
        assert refused.status_code == 503
        assert_error(refused.json(), "engine_failed", reason)
        health = server.get("/health")
        assert health.status_code == 503
        assert health.json()["status"] == "failed"
        assert health.json()["reason"] == "the engine has failed: RuntimeError"


def test_damaged_weights_spoil_only_the_requests_that_meet_them(checkpoint):
    with (
        text_server(checkpoint) as server,
        ThreadPoolExecutor() as pool,
    ):
        engine = server.worker.engine
        (token,) = engine.tokenizer.encode("Z")
        with torch.inference_mode():
            engine.model.word_embeddings[token] = torch.nan

        def post(body, **options):
            return server.post("/v1/completions", body, **options)

        expected = post(LONG).json()["choices"]
        other = pool.submit(post, LONG)
        wait_until(lambda: server.worker.num_running > 0)
        spoiled = {**SHORT, "prompt": "quick Z"}
        for body in (spoiled, {**spoiled, "echo": True, "logprobs": 1}):
            failed = post(body)
            assert failed.status_code == 500
            assert_error(failed.json(), "not_finite", "not finite")
        # The other prompt of the same request cannot be answered by itself.
        assert post({**SHORT, "prompt": [PROMPT, "quick Z"]}).status_code == 500
        *_, last = (
            line for line in post({**spoiled, "stream": True}).content.split(b"\n\n") if line
        )
        assert_error(event(last), "not_finite")
        assert server.get("/health").status_code == 200
        text = post(SHORT).json()["choices"][0]["text"]
        assert text
        assert expected[0]["text"].startswith(text)
        assert other.result().json()["choices"] == expected
        assert server.worker.num_running == server.worker.num_waiting == 0


# --- clients that go away --------------------------------------------------------------------


def sent(url, body):
    """A connection on which a request is under way."""
    place, data = urlparse(url), json.dumps(body)
    connection = socket.create_connection((place.hostname, place.port))
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {place.hostname}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    connection.sendall((head + data).encode())
    return connection


def num_cancelled(server):
    name = 'early_exit:request_success_total{finished_reason="cancelled"}'
    lines = server.get("/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


@pytest.mark.parametrize("stream", [False, True])
def test_clients_that_go_away_free_their_places(checkpoint, stream):
    with text_server(checkpoint, max_batch_size=1) as server:
        worker = server.worker
        first = sent(server.url, {**ENDLESS, "stream": stream})
        wait_until(lambda: worker.num_running == 1)
        second = sent(server.url, {**LONG, "stream": stream})
        wait_until(lambda: worker.num_waiting > 95)
        # One that waits for its turn, then one that has it.
        second.close()
        # Requests take turns: a sequence of its may have ended before.
        wait_until(lambda: num_cancelled(server) > 0)
        assert num_cancelled(server) <= 16
        assert worker.num_running == 1
        # To close the sending half only looks the same.
        first.shutdown(socket.SHUT_WR)
        wait_until(lambda: worker.num_running == worker.num_waiting == 0)
        first.close()
        assert num_cancelled(server) > 16
        assert server.post("/v1/completions", SHORT).status_code == 200


# --- the command line ------------------------------------------------------------------------


@pytest.fixture
def log_as_before():
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--load", "/no/such"], "/no/such"),
        (["--port", "70000"], "--port 70000 is out of range, allowed: 0 to 65535"),
        (["--max-waiting", "-1"], "--max-waiting -1 is out of range, allowed: 0 or more"),
        (["--max-sequences", "0"], "--max-sequences 0 is out of range, allowed: 1 or more"),
        (["--max-body-bytes", "10"], "--max-body-bytes 10 is out of range, allowed: 1024 or more"),
        (["--num-draft-tokens", "0"], "--num-draft-tokens 0 is out of range, allowed: 1 to 1024"),
        (["--shutdown-timeout", "-1"], "--shutdown-timeout -1.0 is out of range, allowed: 0"),
        (["--request-timeout", "0"], "--request-timeout 0.0 is out of range, allowed: above 0"),
        (["--early-exit-threshold", "2"], "--early-exit-threshold 2.0 is out of range, allowed: 0"),
        (
            ["--draft-confidence", "nan"],
            "--draft-confidence nan is out of range, allowed: 0 (off) to",
        ),
        (["--exit-layers", "2"], "--exit-layers 2 is unknown, allowed: 1 3"),
        (["--draft-exit-layer", "2"], "--draft-exit-layer 2 is out of range, allowed: 1 3"),
        (["--max-batch-size", "0"], "max_batch_size 0 is out of range, allowed: 1 or more"),
        (["--max-model-len", "999"], "max_sequence_length 999 is out of range, allowed: 1 to 256"),
        (["--tensor-model-parallel-size", "2"], "tensor"),
        (["--device", "moon"], "moon"),
    ],
)
@pytest.mark.usefixtures("log_as_before")
def test_what_cannot_be_served_is_one_sentence(checkpoint, capsys, flags, message):
    assert main(["--load", str(checkpoint), "--port", "0", *flags]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    *progress, last = err.splitlines()
    assert last.startswith("error: ")
    assert message in last
    # What is said of loading before.
    assert all(json.loads(line)["level"] == "info" for line in progress)


def test_numbers_are_checked_before_a_model_is_loaded(capsys):
    assert main(["--load", "/no/such", "--max-waiting", "-1"]) == 2
    assert "--max-waiting -1 is out of range" in capsys.readouterr().err


def test_a_port_that_is_taken_is_one_sentence_before_a_model_is_loaded(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        # It may be free the next time.
        assert main(["--load", "/no/such", "--port", str(port)]) == 75
    error = capsys.readouterr().err
    message = f"error: --host 127.0.0.1 --port {port} cannot be used: [Errno 98] Address"
    assert error.startswith(message)
    assert error.count("\n") == 1
