"""Replaces functions of `torch.cuda`, which Megatron calls in hundreds of places, for a CPU.

The functions are replaced once, so no hook runs at each operation, and `torch.cuda.is_available`
still tells the truth."""

from __future__ import annotations

import contextlib
import resource
import sys
import types
from typing import Any

import psutil
import torch

from megatron.early_exit.patches.replace import replace

# Tensor types that Megatron compares with; their CPU versions have the same names in `torch`.
TENSOR_TYPES = ("FloatTensor", "HalfTensor", "BFloat16Tensor")


def answer_cuda_calls() -> None:
    """Replace functions of `torch.cuda`, for a process on a machine without CUDA."""
    stream = _Stream()
    properties = types.SimpleNamespace(name="cpu", major=0, minor=0, total_memory=0)
    # What has no meaning on a CPU does nothing, each in a function of its own: torch's tracer
    # refuses one function under two names.
    replacements: dict[str, object] = {
        "current_device": lambda: torch.device("cpu"),
        "device_count": lambda: 1,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "current_stream": lambda device=None: stream,
        "set_stream": lambda stream: None,
        "stream": lambda stream: contextlib.nullcontext(),
        "Stream": _Stream,
        "Event": _Event,
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: (0, 0),
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda new_state, device=None: torch.set_rng_state(new_state),
        "manual_seed": lambda seed: torch.default_generator.manual_seed(seed),
        "memory_allocated": lambda device=None: _memory(),
        "memory_reserved": lambda device=None: _memory(),
        "max_memory_allocated": lambda device=None: _peak_memory(),
        "max_memory_reserved": lambda device=None: _peak_memory(),
        "device_memory_used": lambda device=None: _memory(),
        "memory_stats": lambda device=None: {
            "reserved_bytes.all.current": _memory(),
            "allocated_bytes.all.current": _memory(),
            "allocated_bytes.all.peak": _peak_memory(),
            # PyTorch does not count the allocations of the CPU.
            "allocation.all.current": 0,
        },
        "reset_peak_memory_stats": lambda device=None: None,
        **{name: getattr(torch, name) for name in TENSOR_TYPES},
    }
    for name, value in replacements.items():
        replace(torch.cuda, name, value)
    replace(torch.cuda.nvtx, "range_push", lambda msg: None)
    replace(torch.cuda.nvtx, "range_pop", lambda: None)


class _Synchronous:
    """Stands in for a CUDA stream or event on a device where everything is synchronous."""

    def _nothing(self, *args: object, **kwargs: object) -> _Synchronous:
        return self

    record = record_event = synchronize = wait = wait_event = wait_stream = _nothing


class _Stream(_Synchronous):
    def __init__(self, device: Any = None, priority: int = 0, **kwargs: object) -> None:
        pass


class _Event(_Synchronous):
    def __init__(
        self,
        enable_timing: bool = False,
        blocking: bool = False,
        interprocess: bool = False,
        external: bool = False,
    ) -> None:
        pass

    def elapsed_time(self, end: _Event) -> float:
        """Milliseconds between two events; always 0, because nothing is measured."""
        return 0.0


def _peak_memory() -> int:
    """Peak resident memory of this process, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _memory() -> int:
    """Resident memory of this process, in bytes."""
    return int(psutil.Process().memory_info().rss)
