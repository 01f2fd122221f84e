"""Requests share the engine fairly, and one that fails is alone with that."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import patch

import pytest

from megatron.early_exit.inference.model.runner import SegmentRunner
from megatron.early_exit.server.engine_thread.job import Job
from tests.helpers.server_process import wait_until
from tests.helpers.text_checkpoint import save_text_checkpoint
from tests.helpers.text_server import text_server

SHORT = {"prompt": "the 7 quick brown", "max_tokens": 3, "temperature": 0, "ignore_eos": True}
LARGE = {**SHORT, "prompt": ["the 8 quick"] * 16, "n": 8, "max_tokens": 100, "temperature": 1}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    checkpoint = save_text_checkpoint(tmp_path_factory.mktemp("sharing"))
    with text_server(checkpoint, max_batch_size=4) as running:
        yield running


def post(server, body, **options):
    return server.post("/v1/completions", body, **options)


def test_a_large_request_does_not_hold_up_a_small_one(server):
    alone = post(server, SHORT).json()["choices"][0]["text"]
    with ThreadPoolExecutor() as pool:
        large = pool.submit(post, server, {**LARGE, "stream": True}, stream=True)
        wait_until(lambda: server.worker.num_running == 4)
        events = post(server, {**SHORT, "stream": True}).text.split("\n\n")
        # Nearly all of the large one has yet to come.
        assert server.worker.num_waiting > 100
        large.result().close()
    texts = [
        json.loads(one[6:])["choices"][0]["text"] for one in events if one.startswith("data: {")
    ]
    assert "".join(texts) == alone
    wait_until(lambda: server.worker.num_running == 0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_step_that_fails_ends_its_requests_alone(server, stream):
    expected = post(server, SHORT).json()["choices"]
    original, calls = SegmentRunner.run, 0

    def run(self, *args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: 5 bytes")
        return original(self, *args, **kwargs)

    with patch.object(SegmentRunner, "run", run):
        failed = post(server, {**SHORT, "stream": stream})
    if stream:
        *_, last, _ = failed.text.split("\n\n")
        error = json.loads(last.removeprefix("data: "))["error"]
    else:
        assert failed.status_code == 500
        error = failed.json()["error"]
    assert error["code"] == "engine_error"
    assert error["message"] == "there is no whole answer: the engine has run out of memory"
    assert server.get("/health").status_code == 200
    assert post(server, SHORT).json()["choices"] == expected
    assert server.worker.num_running == server.worker.num_waiting == 0


@pytest.mark.parametrize("error", [MemoryError(), KeyError("odd")])
def test_what_goes_wrong_beside_the_engine_is_about_one_request(server, error):
    expected = post(server, SHORT).json()["choices"]
    engine = server.worker.engine
    with patch.object(engine, "submit", side_effect=error):
        failed = post(server, SHORT)
    assert failed.status_code == 500
    assert failed.json()["error"]["code"] == "engine_error"
    with patch.object(Job, "add", side_effect=error):
        failed = post(server, {**SHORT, "stream": True})
    assert "engine_error" in failed.text
    assert "[DONE]" not in failed.text
    assert post(server, SHORT).json()["choices"] == expected
    assert server.worker.num_running == server.worker.num_waiting == 0


def test_an_engine_that_brings_nobody_a_token_any_more_is_lost(tmp_path):
    checkpoint = save_text_checkpoint(tmp_path)
    with (
        text_server(checkpoint) as server,
        patch.object(SegmentRunner, "run", side_effect=RuntimeError("a cable is loose")),
    ):
        codes = [post(server, SHORT).json()["error"]["code"] for _ in range(8)]
        assert codes[:7] == ["engine_error"] * 7
        wait_until(lambda: server.worker.failure is not None)
        assert post(server, SHORT).status_code == 503
        assert server.get("/health").json()["status"] == "failed"
