"""Repairs Megatron's token dispatcher for experts, which needs split sizes as NumPy arrays, but
converts them only if it copies them from a GPU."""

from typing import Any

import torch
from megatron.core.transformer.moe import token_dispatcher

from megatron.early_exit.patches.replace import replace


def convert_split_sizes() -> None:
    """Convert split sizes to NumPy arrays even if they are on the CPU already."""
    replace(token_dispatcher, "maybe_move_tensor_to_cpu", _as_numpy)


def _as_numpy(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor
