"""The number formats in which the decoding benchmarks run on this machine's CPU."""

import torch

from megatron.early_exit.hardware.dtypes import DTYPES, dtype_speed

BENCHMARKED = ("fp32", "bf16")


def benchmarked_dtypes() -> list[str]:
    """fp32, and bf16 if it is fast; otherwise a line says that it is left out."""
    speed = dtype_speed(torch.bfloat16)
    if speed.is_fast:
        return list(BENCHMARKED)
    print(f"bf16 is left out, --dtype bf16 measures it all the same: {speed.finding}", flush=True)
    return [name for name in BENCHMARKED if DTYPES[name] != speed.dtype]
