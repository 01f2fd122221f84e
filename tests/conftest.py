"""What holds for every test: one thread per process, no network, GPU tests only where one is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

# Before torch is imported, and for the processes that tests start: ranks share two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nothing that a test checks depends on a measurement, and nothing is computed slowly for it.
os.environ.setdefault("EARLY_EXIT_FAST_DTYPES", "fp32")
os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="disabled", TOKENIZERS_PARALLELISM="false")

import pytest
from hypothesis import settings

from megatron.early_exit.process_family import start_family
from tests.helpers.speed import patient

if TYPE_CHECKING:
    from tests.helpers.warm_ranks import WarmRanks

settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")

# pytest-timeout reads it, here and in the workers of pytest-xdist. The file's own `timeout` is for
# whoever runs a test without this file.
os.environ.setdefault("PYTEST_TIMEOUT", f"{patient(300):.0f}")

HERE = Path(__file__).parent


def pytest_configure() -> None:
    """Servers and ranks end with the tests, however these end."""
    start_family()


@pytest.fixture(scope="session")
def ranks() -> Iterator[WarmRanks]:
    """Starts training commands quickly; all tests share what takes seconds to import."""
    from tests.helpers.warm_ranks import WarmRanks

    with WarmRanks() as ranks:
        yield ranks


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keeps tests of a file together, which share what takes long to prepare, and skips what needs
    a GPU."""
    for item in items:
        file = item.path.relative_to(HERE)
        if file.parts[0] != "unit":
            item.add_marker(pytest.mark.xdist_group(file.stem))
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_items and not _has_gpu():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Says so where pytest-xdist does not keep together what it should."""
    grouped = [item for item in session.items if item.get_closest_marker("xdist_group")]
    if session.config.getoption("loadgroup", False) and grouped and "@" not in grouped[0].nodeid:
        raise pytest.UsageError("this pytest-xdist keeps no tests together with this pytest")


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
