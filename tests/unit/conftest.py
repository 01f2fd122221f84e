"""Fixtures of the unit tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers.single_process import model_parallel


@pytest.fixture(scope="module")
def process_groups() -> Iterator[None]:
    """Megatron's process groups for all tests of a file, which asks for them by `usefixtures`."""
    with model_parallel():
        yield
