"""In which number format a model is computed."""

import math
import os

import torch
from torch import distributed

from megatron.early_exit.checkpoint.architecture import Architecture
from megatron.early_exit.checkpoint.weights import weight_shapes
from megatron.early_exit.config import EarlyExitConfig
from megatron.early_exit.hardware.dtypes import NAMES, dtype_speed, forced_dtypes, say_once
from megatron.early_exit.hardware.resources import available_memory
from megatron.early_exit.inference.distributed.process_groups import RankInfo

_FP32_BYTES = 4
_COPIES_ON_A_CPU = 2
"""Of each matrix, while it is brought into the layout of a CPU's products."""


def decide_dtype(
    asked: torch.dtype | None,
    architecture: Architecture,
    early_exit: EarlyExitConfig,
    device: torch.device,
    rank_info: RankInfo | None = None,
) -> torch.dtype:
    """The format that was asked for, else the model's own, else fp32 where that one is slow.

    A line says where the machine made a difference. Of several processes the first one decides for
    all, and says it; all must call this together.

    Args:
        asked: None leaves it to the machine.
        architecture, early_exit: the whole model.
        device: where it is computed.
        rank_info: of this process; None where there is only one.

    Raises:
        ValueError: the variable that says which formats are fast has an unknown value.
    """
    forced_dtypes()
    stored: torch.dtype = getattr(torch, architecture.params_dtype)
    if rank_info is not None and rank_info.rank > 0:
        return _told(rank_info, None)
    dtype, line = asked or stored, None
    if dtype in NAMES and not (speed := dtype_speed(dtype, device)).is_fast:
        name = NAMES[dtype]
        ranks = 1 if rank_info is None else rank_info.num_ranks
        needed = _bytes_in_fp32(architecture, early_exit, device, ranks)
        if asked is not None:
            line = f"{speed.finding}; dtype fp32 may be faster"
        elif needed > (available := _available_memory(device)):
            line = (
                f"computing in {name}, as the model is stored, although {speed.finding}: fp32 "
                f"needs {needed / 1e9:.1f} GB of memory, of which {available / 1e9:.1f} are left"
            )
        else:
            line = f"computing in fp32, not in {name} as the model is stored: {speed.finding}"
            dtype = torch.float32
    if line is not None:
        say_once(line)
    return dtype if rank_info is None else _told(rank_info, dtype)


def _told(rank_info: RankInfo, dtype: torch.dtype | None) -> torch.dtype:
    """What the first process has decided."""
    box = [dtype]
    distributed.broadcast_object_list(box, src=0, group=rank_info.group)
    assert box[0] is not None
    return box[0]


def _bytes_in_fp32(
    architecture: Architecture, early_exit: EarlyExitConfig, device: torch.device, ranks: int
) -> float:
    """Most memory that the weights of this machine's processes take."""
    numbers = sum(math.prod(shape) for shape in weight_shapes(architecture, early_exit).values())
    copies = _COPIES_ON_A_CPU if device.type == "cpu" else 1
    # A GPU is one process's own, a machine's memory is shared by all that run on it.
    here = 1 if device.type != "cpu" else int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    return numbers * _FP32_BYTES * copies * min(here, ranks) / ranks


def _available_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return available_memory()
