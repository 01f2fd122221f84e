"""Let Megatron run on whatever machine this is.

Megatron asks for CUDA by name in a few hundred places. Without it `prepare` has them answered with
CPU equivalents, so that `megatron.training.pretrain` runs over gloo; on a machine with CUDA none of
it happens. What `prepare` does everywhere: it skips a build for which the wheel has no sources,
repairs the distributed optimizer where neither Transformer Engine nor Apex is installed, and
silences what nobody can act on. Entry points call it before they import anything of Megatron."""

from __future__ import annotations

import functools
import os
import sys

from megatron.early_exit.patches.messages import silence, silence_prints
from megatron.early_exit.patches.torch_compile import keep_functions_eager
from megatron.early_exit.patches.torch_cuda import answer_cuda_calls
from megatron.early_exit.patches.torch_tensors import keep_tensors_on_cpu
from megatron.early_exit.platform.arguments import (
    check_arguments,
    dtype_remark,
    set_argument_defaults,
)
from megatron.early_exit.platform.machine import Platform, detect

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
    # Not at the top of the file: these import Megatron, which is to find torch as it will be.
    if platform.device == "cpu":
        answer_cuda_calls()
        keep_tensors_on_cpu()
        keep_functions_eager()
        from megatron.early_exit.patches.initialization import initialize_without_cuda
        from megatron.early_exit.patches.random_state import use_cpu_random_state
        from megatron.early_exit.patches.token_dispatcher import convert_split_sizes

        use_cpu_random_state()
        convert_split_sizes()
        initialize_without_cuda()
    from megatron.early_exit.patches.dataset_helpers import skip_dataset_helper_build
    from megatron.early_exit.patches.distributed_optimizer import repair_torch_steps

    skip_dataset_helper_build()
    repair_torch_steps()
    silence_prints()
    return platform
