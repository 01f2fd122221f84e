"""Changes Megatron's initialisation, which requires CUDA and warms up kernels that are compiled at
first use."""

from collections.abc import Callable
from functools import partial
from typing import Any

import megatron.training
from megatron.training import initialize, training

from megatron.early_exit.patches.replace import replace, wrap


def initialize_without_cuda() -> None:
    """Allow Megatron to be initialised on a CPU."""
    for module in (initialize, training, megatron.training):
        wrap(module, "initialize_megatron", _without_cuda, "allow_no_cuda, ...")
    replace(training, "set_jit_fusion_options", lambda tp_size=None: None)


def _without_cuda(initialize_megatron: Callable[..., Any]) -> Callable[..., Any]:
    return partial(initialize_megatron, allow_no_cuda=True)
