"""A job hands tokens from the engine's thread to the one that answers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from megatron.early_exit.inference.params import SamplingParams
from megatron.early_exit.server.engine_thread import job as job_module
from megatron.early_exit.server.engine_thread.job import ClientGone, Job
from megatron.early_exit.server.http.errors import ApiError


def make_job(count: int = 2, seconds: float = 60.0, is_streamed: bool = True) -> Job:
    return Job([[1]] * count, [SamplingParams()] * count, seconds, is_streamed)


def request(error: str | None = None) -> Any:
    return SimpleNamespace(error=error, tokens=[])


def is_there() -> bool:
    return False


def test_tokens_come_in_order_and_end_with_the_last_sequence():
    job = make_job()
    job.begin([request(), request()])
    job.wait_for_begin(is_there)
    job.add([(0, "a")], now=10.0)
    assert not job.end_one(request())
    job.add([(1, "b")], now=11.0)
    assert job.end_one(request())
    assert list(job.tokens(is_there)) == [[(0, "a")], [(1, "b")]]


def test_tokens_of_a_moment_go_out_together_and_none_is_kept_back():
    job = make_job(1)
    job.add([(0, "a")], now=10.0)
    job.add([(0, "b")], now=10.001)
    job.add([(0, "c")], now=10.002)
    job.add([(0, "d")], now=10.5)
    job.add([(0, "e")], now=10.501)
    job.end_one(request())
    expected = [[(0, "a")], [(0, "b"), (0, "c"), (0, "d")], [(0, "e")]]
    assert list(job.tokens(is_there)) == expected


def test_tokens_that_nobody_streams_are_not_handed_over():
    job = make_job(1, is_streamed=False)
    job.add([(0, "a")], now=10.0)
    job.end_one(request())
    assert list(job.tokens(is_there)) == []


def test_what_came_before_a_failure_still_arrives():
    job = make_job()
    job.add([(0, "a")], now=10.0)
    job.end_one(request("the engine has run out of memory"))
    job.fail(ApiError(500, "a second one is not told"))
    tokens = job.tokens(is_there)
    assert next(tokens) == [(0, "a")]
    with pytest.raises(ApiError, match="out of memory") as failed:
        next(tokens)
    assert (failed.value.status, failed.value.body.error.code) == (500, "engine_error")


def test_one_that_waits_hears_of_the_end_of_its_time():
    job = make_job(seconds=2.5)
    job.expire()
    with pytest.raises(ApiError, match=r"no whole answer after 2\.5 seconds") as late:
        job.wait_for_begin(is_there)
    assert late.value.status == 504


def test_one_whose_engine_says_nothing_gives_up_by_itself(monkeypatch):
    monkeypatch.setattr(job_module, "_POLL_S", 0.01)
    monkeypatch.setattr(job_module, "_PATIENCE_S", 0.0)
    with pytest.raises(ApiError, match="no whole answer after 0 seconds"):
        make_job(seconds=0).wait_for_begin(is_there)


def test_a_client_that_has_gone_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(job_module, "_POLL_S", 0.01)
    with pytest.raises(ClientGone):
        make_job().wait_for_begin(lambda: True)
