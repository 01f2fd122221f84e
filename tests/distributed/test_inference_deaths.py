"""Engines over several processes: where one of them dies or hangs, none is left behind."""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.early_exit.checkpoint.description import ModelDescription, write_description
from megatron.early_exit.inference import EarlyExitEngine, SamplingParams
from megatron.early_exit.inference.distributed import heartbeat
from tests.helpers.spawn import forkserver
from tests.helpers.tiny_models import make_model, save_checkpoint

END_S = 60
"""Within which ranks end: without the heartbeat they never would."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    path, model = tmp_path_factory.mktemp("model"), make_model(exits=(1, 3), use_exit_norm=True)
    save_checkpoint(model, path)
    write_description(path, ModelDescription(model.architecture, model.early_exit, None))
    return str(path)


def join(
    rank: int, layout: tuple[int, int], checkpoint: str, folder: str, **options: Any
) -> EarlyExitEngine:
    """Become one of the ranks; what it says of an end goes to a file with its number."""
    sys.stderr = open(f"{folder}/{rank}", "w")
    # The others learn from the last rank that one hangs.
    heartbeat.SILENCE_S = 4.0 if rank == math.prod(layout) - 1 else 600.0
    store = f"file://{folder}/store"
    torch.distributed.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=math.prod(layout)
    )
    tensor, pipeline = layout
    engine = EarlyExitEngine.from_checkpoint(
        checkpoint, device="cpu", tensor_parallel=tensor, pipeline_parallel=pipeline, **options
    )
    Path(folder, f"ready{rank}").touch()
    return engine


def decode_for_long(
    rank: int, layout: tuple[int, int], checkpoint: str, folder: str, pause_s: float
) -> None:
    engine = join(rank, layout, checkpoint, folder)
    while True:
        engine.generate([[1, 2], [3]], SamplingParams(max_tokens=40))
        time.sleep(pause_s)


def drive_or_follow(
    rank: int, layout: tuple[int, int], checkpoint: str, folder: str, pause_s: float
) -> None:
    engine = join(rank, layout, checkpoint, folder, has_driver=True)
    if rank > 0:
        engine.work()

    def say_last_words(sentence: str) -> None:
        with Path(folder, "last words").open("a") as file:
            file.write(f"{sentence}\n")
        time.sleep(600)

    engine.on_death(say_last_words)
    while True:
        engine.generate([[1, 2], [3]], SamplingParams(max_tokens=40))
        time.sleep(pause_s)


@contextmanager
def started(function: Callable[..., None], layout: tuple[int, int], folder: Path, *args: Any):
    """The processes of an engine that has been at work for a moment."""
    context = forkserver()
    ranks = [
        context.Process(target=function, args=(rank, layout, args[0], str(folder), *args[1:]))
        for rank in range(math.prod(layout))
    ]
    try:
        for rank in ranks:
            rank.start()
        deadline = time.monotonic() + 120
        while len(list(folder.glob("ready*"))) < len(ranks):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.5)
        yield ranks
    finally:
        for rank in ranks:
            rank.kill()


@pytest.mark.parametrize(
    ("layout", "pause_s", "way", "said"),
    [
        ((2, 1), 0, signal.SIGKILL, "has died"),
        ((1, 3), 0, signal.SIGKILL, "has died"),
        ((1, 3), 600, signal.SIGKILL, "has died"),
        ((1, 3), 0, signal.SIGSTOP, "hangs"),
    ],
    ids=["tensor", "pipeline", "idle", "hanging"],
)
def test_no_rank_outlives_another(layout, pause_s, way, said, checkpoint, tmp_path):
    with started(decode_for_long, layout, tmp_path, checkpoint, pause_s) as ranks:
        os.kill(ranks[1].pid, way)
        deadline = time.monotonic() + END_S
        for number, rank in enumerate(ranks):
            if number != 1:
                rank.join(max(0.0, deadline - time.monotonic()))
                assert rank.exitcode == 1
                lines = (tmp_path / str(number)).read_text().splitlines()
                who = "rank 1 of the inference engine"
                assert lines[-1] == f"error: {who} {said}, so rank {number} ends, too"


@pytest.mark.parametrize("layout", [(2, 1), (1, 2)], ids=["tensor", "pipeline"])
@pytest.mark.parametrize("pause_s", [0, 600], ids=["working", "idle"])
def test_a_driver_hears_of_a_followers_death_before_it_ends(layout, pause_s, checkpoint, tmp_path):
    with started(drive_or_follow, layout, tmp_path, checkpoint, pause_s) as (driver, follower):
        os.kill(follower.pid, signal.SIGKILL)
        driver.join(END_S)
        assert driver.exitcode == 1
    sentence = "rank 1 of the inference engine has died, so rank 0 ends, too\n"
    assert (tmp_path / "last words").read_text() == sentence


@pytest.mark.parametrize("layout", [(2, 1), (1, 2)], ids=["tensor", "pipeline"])
def test_followers_end_with_their_driver(layout, checkpoint, tmp_path):
    with started(drive_or_follow, layout, tmp_path, checkpoint, 600) as (driver, follower):
        os.kill(driver.pid, signal.SIGKILL)
        follower.join(END_S)
        assert follower.exitcode == 1
