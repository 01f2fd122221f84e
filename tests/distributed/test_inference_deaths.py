"""Engines over several processes: where one of them dies or hangs, none is left behind."""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from megatron.early_exit.checkpoint.description import ModelDescription, write_description
from megatron.early_exit.inference import EarlyExitEngine, SamplingParams
from megatron.early_exit.inference.parallel import heartbeat
from tests.helpers.tiny_models import make_model, save_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    path, model = tmp_path_factory.mktemp("model"), make_model(exits=(1, 3), use_exit_norm=True)
    save_checkpoint(model, path)
    write_description(path, ModelDescription(model.architecture, model.early_exit, None))
    return str(path)


def decode_for_long(
    rank: int, layout: tuple[int, int], checkpoint: str, sentences: str, pause_s: float
) -> None:
    sys.stderr = open(f"{sentences}/{rank}", "w")
    heartbeat.SILENCE_S = 2.0
    store = f"file://{sentences}/store"
    torch.distributed.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=math.prod(layout)
    )
    tensor, pipeline = layout
    engine = EarlyExitEngine.from_checkpoint(
        checkpoint, device="cpu", tensor_parallel=tensor, pipeline_parallel=pipeline
    )
    Path(sentences, f"ready{rank}").touch()
    while True:
        engine.generate([[1, 2], [3]], SamplingParams(max_tokens=40))
        time.sleep(pause_s)


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
    context = torch.multiprocessing.get_context("fork")
    ranks = [
        context.Process(
            target=decode_for_long, args=(rank, layout, checkpoint, str(tmp_path), pause_s)
        )
        for rank in range(math.prod(layout))
    ]
    try:
        for rank in ranks:
            rank.start()
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("ready*"))) < len(ranks):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.5)
        os.kill(ranks[1].pid, way)
        deadline = time.monotonic() + 8
        for number, rank in enumerate(ranks):
            if number != 1:
                rank.join(max(0.0, deadline - time.monotonic()))
                assert rank.exitcode == 1
                lines = (tmp_path / str(number)).read_text().splitlines()
                who = "rank 1 of the inference engine"
                assert lines[-1] == f"error: {who} {said}, so rank {number} ends, too"
    finally:
        for rank in ranks:
            rank.kill()
