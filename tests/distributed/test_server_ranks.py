"""The server over several processes: the same texts, an orderly end, and what a death does."""

from __future__ import annotations

import json
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from megatron.early_exit.errors import as_flag
from megatron.early_exit.inference import EarlyExitEngine, SamplingParams
from tests.helpers.server_process import server_process, wait_until
from tests.helpers.text_checkpoint import save_text_checkpoint
from tests.helpers.warm_ranks import ROOT, WarmRanks

PROMPTS = ["the 7 quick brown", "pack my box"]
MODES = (
    {"mode": "full"},
    {"mode": "early_exit", "early_exit_threshold": 0.05},
    {"mode": "self_speculative", "draft_method": "exit", "draft_confidence": 0.1},
    {"mode": "self_speculative", "draft_method": "mtp", "draft_confidence": 0.01},
)
LONG = {"prompt": PROMPTS[0], "n": 4, "max_tokens": 200, "temperature": 0, "ignore_eos": True}
ENDLESS = {**LONG, "n": 16, "prompt": [PROMPTS[0]] * 6}
LAYOUTS = {
    "tensor": ("--tensor-model-parallel-size", "2", "--max-batch-size", "2"),
    "pipeline": ("--pipeline-model-parallel-size", "2", "--max-batch-size", "2"),
}
each_layout = pytest.mark.parametrize("flags", LAYOUTS.values(), ids=LAYOUTS)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_text_checkpoint(tmp_path_factory.mktemp("ranks"), depths=2)


@pytest.fixture(scope="module")
def engine(checkpoint):
    return EarlyExitEngine.from_checkpoint(checkpoint)


@pytest.fixture(scope="module")
def servers():
    with WarmRanks("serving") as ranks:
        yield ranks


@each_layout
def test_texts_are_those_of_one_process_and_the_last_is_finished(
    checkpoint, engine, tmp_path, flags
):
    with (
        server_process(checkpoint, tmp_path, *flags, num_ranks=2) as server,
        ThreadPoolExecutor() as pool,
    ):
        for mode in MODES:
            results = engine.generate(PROMPTS, SamplingParams(max_tokens=24, **mode))
            body = {"prompt": PROMPTS, "max_tokens": 24, "temperature": 0, "logprobs": 0}
            answer = server.post({**body, **mode})
            assert answer.status_code == 200, answer.text
            for choice, result in zip(answer.json()["choices"], results, strict=True):
                assert choice["text"] == result.text
                assert choice["logprobs"]["exit_layers"] == result.exit_layers
        # No layer has run for what the module has drafted.
        assert any(0 in result.exit_layers for result in results)
        # torchrun gives ranks 30 seconds, also on a machine that others use.
        last = pool.submit(server.post, {**LONG, "max_tokens": 80})
        wait_until(lambda: server.health().json()["num_requests_running"] > 0)
        # torchrun passes it on to all ranks.
        server.signal(signal.SIGTERM)
        wait_until(lambda: server.health().status_code == 503)
        (expected,) = engine.generate(PROMPTS[:1], SamplingParams(max_tokens=80, ignore_eos=True))
        assert last.result().status_code == 200
        assert {choice["text"] for choice in last.result().json()["choices"]} == {expected.text}
        server.wait()
        log = server.log.read_text()
        assert "has died" not in log
        assert "SIGKILL" not in log


def test_a_module_drafts_over_stages_for_the_command_line(checkpoint, engine, servers, tmp_path):
    output, tool = tmp_path / "answers.jsonl", ROOT / "tools" / "generate.py"
    options = {"mode": "self_speculative", "draft_confidence": 0.01, "draft_method": "mtp"}
    flags = [text for name, value in options.items() for text in (as_flag(name), str(value))]
    flags += ["--max-tokens", "24", "--prompt", PROMPTS[1], "--output", str(output)]
    found = servers.run(
        [tool, "--load", checkpoint, "--pipeline-model-parallel-size", "2", *flags], 2, tmp_path
    )
    assert found.returncode == 0, found.stdout
    (result,) = engine.generate(PROMPTS[1:], SamplingParams(max_tokens=24, **options))
    answer = json.loads(output.read_text())
    assert answer["token_ids"] == result.token_ids
    assert answer["exit_layers"] == result.exit_layers
    assert answer["statistics"]["drafts"]["mtp_accepted"] > 0


def health_until_the_end(server, found):
    """All that the server says of itself until it is gone."""
    while True:
        try:
            health = server.health()
        except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError):
            # The end can come in the middle of an answer.
            return
        found.append(health.json())
        assert health.ok == (found[-1]["status"] == "ok")
        time.sleep(0.02)


@each_layout
def test_all_hear_of_a_death(checkpoint, servers, tmp_path, flags):
    with (
        server_process(checkpoint, tmp_path, *flags, num_ranks=2, ranks=servers) as server,
        ThreadPoolExecutor() as pool,
    ):
        stream = server.post({**ENDLESS, "stream": True}, stream=True)
        lines = (line for line in stream.iter_lines() if line)
        assert next(lines).startswith(b"data: {")
        waiting = pool.submit(server.post, LONG)
        wait_until(lambda: server.health().json()["num_requests_waiting"] > 94)
        found = []
        health = pool.submit(health_until_the_end, server, found)
        wait_until(lambda: found)
        server.signal(signal.SIGKILL, rank=1)
        *_, last = lines
        reason = "rank 1 of the inference engine has died"
        assert reason in json.loads(last.removeprefix(b"data: "))["error"]["message"]
        answer = waiting.result()
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "engine_failed"
        assert reason in answer.json()["error"]["message"]
        assert server.wait() == 1
        health.result()
    # Until the end, health says so.
    begin = [one["status"] for one in found].index("failed")
    assert begin > 0
    assert all(one["status"] == "failed" and reason in one["reason"] for one in found[begin:])
