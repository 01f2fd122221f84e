"""Calls a function on several ranks that communicate over gloo.

Ranks are forks of a process that only imports the modules whose import takes seconds."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Callable
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import torch

from megatron.early_exit import platform
from tests.helpers.speed import patient

_IMPORTED = ["megatron.early_exit.inference", "tests.helpers.huggingface_models"]


def forkserver() -> BaseContext:
    """Starts processes as forks of a process without threads."""
    multiprocessing.set_forkserver_preload(_IMPORTED)
    return torch.multiprocessing.get_context("forkserver")


def spawn(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Call `function(*args)` on every rank of a fresh gloo group; returns the ranks' results.

    The function must be at the top level of its module. What it raises is raised here, with the
    rank's traceback."""
    start_method = forkserver().get_start_method()
    with tempfile.TemporaryDirectory() as folder:
        context = torch.multiprocessing.start_processes(
            _call,
            (function, world_size, folder, args),
            nprocs=world_size,
            join=False,
            start_method=start_method,
        )
        try:
            timeout_s = patient(250)
            deadline = time.monotonic() + timeout_s
            while not context.join(timeout=1):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{function.__name__} ran longer than {timeout_s:.0f} s")
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
