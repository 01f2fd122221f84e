"""Let Megatron run on whatever machine this is.

Megatron asks for CUDA by name in a few hundred places. On a machine that has it this package only
tells what was found; elsewhere `prepare` answers those places with CPU equivalents, so that
`megatron.training.pretrain` runs over gloo. Entry points call `prepare` before they import anything
of Megatron; no other module knows about devices."""

from __future__ import annotations

import functools
import importlib
import os

from megatron.early_exit.platform.arguments import check_arguments, set_argument_defaults
from megatron.early_exit.platform.cpu import emulate_cuda
from megatron.early_exit.platform.machine import Platform, detect
from megatron.early_exit.platform.optimizer import repair_distributed_optimizer
from megatron.early_exit.platform.quiet import silence
from megatron.early_exit.platform.replace import replace

__all__ = ["Platform", "check_arguments", "detect", "prepare", "set_argument_defaults"]


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
    # Megatron asserts this with tensor parallelism; it orders communication before computation.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if platform.device == "cpu":
        emulate_cuda()
    _skip_dataset_helper_build()
    repair_distributed_optimizer()
    return platform


def _skip_dataset_helper_build() -> None:
    """Skip the build of Megatron's data set helper: the wheel brings it compiled, not its sources.

    The build would end the process for want of a Makefile, with or without a GPU."""
    utils = importlib.import_module("megatron.core.datasets.utils")
    importlib.import_module("megatron.core.datasets.helpers_cpp")
    replace(utils, "compile_helpers", lambda: None)
