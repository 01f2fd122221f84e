"""Run a script or a function on several ranks that talk over gloo."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron.early_exit import platform

ROOT = Path(__file__).parents[2]


def run_ranks(
    script_args: Sequence[str | Path],
    nproc: int,
    timeout_s: float = 120,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run `python script_args...` on `nproc` ranks of one machine, under torchrun's environment.

    The first rank that fails, or the end of the time, kills all. The result's `stdout` holds what
    all ranks wrote to either stream, one rank after the other; its `returncode` is that of the
    first rank that failed (-9 if time ran out).

    Ranks are started directly: torchrun's own process would cost seconds of importing torch.
    """
    common = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        **(env or {}),
    }
    command = [sys.executable, *map(str, script_args)]
    logs = [tempfile.TemporaryFile("w+", errors="replace") for _ in range(nproc)]
    ranks = [
        subprocess.Popen(
            command,
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        for rank, log in enumerate(logs)
    ]
    try:
        returncode = _wait(ranks, timeout_s)
    finally:
        _kill(ranks)
    output = []
    for rank, log in enumerate(logs):
        log.seek(0)
        output.append(f"[rank {rank}]\n{log.read()}")
        log.close()
    return subprocess.CompletedProcess(command, returncode, "\n".join(output), "")


def spawn(
    function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120
) -> list[Any]:
    """Call `function(*args)` on every rank of a fresh gloo group; returns the ranks' results.

    The function must be at the top level of its module. What it raises is raised here, with the
    rank's traceback."""
    with tempfile.TemporaryDirectory() as folder:
        context = torch.multiprocessing.spawn(
            _call, (function, world_size, folder, args), nprocs=world_size, join=False
        )
        try:
            deadline = time.monotonic() + timeout_s
            while not context.join(timeout=1):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{function.__name__} ran longer than {timeout_s} s")
        finally:
            for process in context.processes:
                process.kill()
        return [
            torch.load(Path(folder, f"result{rank}"), weights_only=False)
            for rank in range(world_size)
        ]


def _call(
    rank: int, function: Callable[..., Any], world_size: int, folder: str, args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    platform.prepare()
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
    )
    torch.save(function(*args), Path(folder, f"result{rank}"))
    torch.distributed.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait(ranks: list[subprocess.Popen[bytes]], timeout_s: float) -> int:
    """Wait for all ranks or the first failure; its status, or -9 when time runs out."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        statuses = [rank.poll() for rank in ranks]
        if failed := [status for status in statuses if status]:
            return failed[0]
        if all(status == 0 for status in statuses):
            return 0
        time.sleep(0.05)
    return -signal.SIGKILL


def _kill(ranks: list[subprocess.Popen[bytes]]) -> None:
    """End the ranks and every process they started (data loaders, checkpoint writers)."""
    for rank in ranks:
        try:
            os.killpg(rank.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
        finally:
            rank.wait()
