"""The thread that owns the engine counts steps that fail."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from megatron.early_exit.inference.engine.cache_pages import CachePages
from megatron.early_exit.server.engine_thread.metrics import Metrics
from megatron.early_exit.server.engine_thread.worker import EngineWorker


def failed_requests(count: int) -> list[Any]:
    return [SimpleNamespace(exception=RuntimeError(f"of request {i}")) for i in range(count)]


def test_a_step_in_which_many_requests_fail_is_one_failed_step() -> None:
    engine = SimpleNamespace(pages=CachePages((1,)))
    worker = EngineWorker(engine, 1, 1, Metrics())  # type: ignore[arg-type]
    for _ in range(7):
        worker._log_failures(failed_requests(12))
    with pytest.raises(RuntimeError, match="of request"):
        worker._log_failures(failed_requests(12))
