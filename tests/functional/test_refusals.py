"""Runs that end early, in one sentence: their data or their numbers are bad."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron.early_exit import platform

platform.prepare()

from tests.helpers.training_runs import (  # noqa: E402
    BACKBONE,
    SCHEDULE,
    TOKENIZER,
    VOCAB,
    write_documents,
)
from tests.helpers.warm_ranks import ENTRY, WarmRanks  # noqa: E402

STEPS = ["--train-iters", 5]
DIVERGE = [*STEPS, "--lr", 1e30, "--clip-grad", 0, "--exit-layer-nums", 2]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    return write_documents(tmp_path_factory.mktemp("data"))


def errors(
    ranks: WarmRanks, folder: Path, nproc: int, *flags: object, status: int
) -> tuple[list[str], str]:
    """The sentences that a run ends with, and all its output."""
    command = [ENTRY, *BACKBONE, *TOKENIZER, *SCHEDULE, *flags]
    done = ranks.run(list(map(str, command)), nproc, folder)
    assert done.returncode == status, done.stdout[-4000:]
    assert "Traceback" not in done.stdout
    return [line for line in done.stdout.splitlines() if line.startswith("error: ")], done.stdout


def test_numbers_that_are_not_finite_end_the_run(ranks, data, tmp_path):
    (error,), _ = errors(ranks, tmp_path, 1, *data, *DIVERGE, "--rerun-mode", "disabled", status=1)
    assert "Unexpected result" in error
    assert "found NaN" in error


def test_numbers_that_are_not_finite_are_looked_into_by_default(ranks, data, tmp_path):
    flags = [*DIVERGE, "--save", tmp_path / "save", "--save-interval", 100]
    (error,), output = errors(ranks, tmp_path, 1, *data, *flags, status=16)
    assert "--rerun-mode disabled" in error
    assert "First rerun: unexpected result is reproducible" in output


def test_data_of_a_larger_vocabulary_never_reach_the_model(ranks, data, tmp_path):
    flags = ["--vocab-size", VOCAB // 2, "--make-vocab-size-divisible-by", 1]
    (error,), _ = errors(ranks, tmp_path, 1, *data, *STEPS, *flags, status=2)
    assert "--data-path" in error
    assert f"allowed: 0 to {VOCAB // 2 - 1}" in error


def test_a_share_without_documents_does_not_hang(ranks, data, tmp_path):
    (error,), _ = errors(ranks, tmp_path, 1, *data, *STEPS, "--split", "99999,1,0", status=2)
    assert "--split '99999,1,0' leaves none of the 3000 documents of" in error
    assert "for validation, allowed: a larger share, or 0" in error
