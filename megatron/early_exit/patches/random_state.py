"""Replaces Megatron's access to a GPU's random state, which bypasses torch's public functions, by
that to the CPU's."""

import torch
from megatron.core.tensor_parallel import random

from megatron.early_exit.patches.replace import replace


def use_cpu_random_state() -> None:
    """Make Megatron use the CPU's random state instead of a GPU's."""
    replace(
        random,
        "_get_cuda_rng_state",
        lambda device=None, clone=False, graph_safe=False: torch.get_rng_state(),
    )
    replace(
        random,
        "_set_cuda_rng_state",
        lambda new_state, device=None, graph_safe=False: torch.set_rng_state(new_state),
    )
