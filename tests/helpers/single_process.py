"""Megatron's process groups on one process, inside the process that runs the tests."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron.early_exit import platform


@contextmanager
def model_parallel() -> Iterator[None]:
    """The default group and Megatron's, all of size one, and Megatron's random states."""
    platform.prepare()
    from megatron.core import parallel_state, tensor_parallel

    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        parallel_state.initialize_model_parallel()
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
