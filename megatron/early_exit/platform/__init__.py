"""Let Megatron run on whatever machine this is.

Megatron asks for CUDA by name in a few hundred places. Without it `prepare` answers them with CPU
equivalents, so that `megatron.training.pretrain` runs over gloo; that is `cpu.py`, and on a machine
with CUDA none of it happens. What `prepare` does everywhere: it skips a build for which the wheel
has no sources, repairs the distributed optimizer where neither Transformer Engine nor Apex is
installed, and silences what nobody can act on. Entry points call it before they import anything of
Megatron."""

from __future__ import annotations

import functools
import importlib
import os
import sys

from megatron.early_exit.platform.arguments import (
    check_arguments,
    dtype_remark,
    set_argument_defaults,
)
from megatron.early_exit.platform.cpu import emulate_cuda
from megatron.early_exit.platform.machine import Platform, detect
from megatron.early_exit.platform.optimizer import repair_distributed_optimizer
from megatron.early_exit.platform.quiet import silence, silence_prints
from megatron.early_exit.platform.replace import replace

__all__ = [
    "Platform",
    "check_arguments",
    "detect",
    "dtype_remark",
    "prepare",
    "set_argument_defaults",
]


@functools.cache
def prepare() -> Platform:
    """Make Megatron usable on this machine and say what was found.

    Call it first, before `megatron.core` or `megatron.training` are imported (later works too, but
    starts slower). Calling it again does nothing more.

    Raises:
        RuntimeError: the installed torch or Megatron lacks something that is replaced here.
    """
    platform = detect()
    silence()
    if not any("fsdp" in argument for argument in sys.argv):
        # Megatron asserts this with tensor parallelism, and the contrary with FSDP; it orders
        # communication before computation.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if platform.device == "cpu":
        emulate_cuda()
    _skip_dataset_helper_build()
    repair_distributed_optimizer()
    silence_prints()
    return platform


def _skip_dataset_helper_build() -> None:
    """Skip the build of Megatron's data set helper: the wheel brings it compiled, not its sources.

    The build would end the process for want of a Makefile, with or without a GPU."""
    utils = importlib.import_module("megatron.core.datasets.utils")
    importlib.import_module("megatron.core.datasets.helpers_cpp")
    replace(utils, "compile_helpers", lambda: None)
