"""CPU equivalents for the CUDA functions that Megatron calls by name.

One pass of replacements at start-up: no hook runs at each operation, and `torch.cuda.is_available`
stays truthful for everybody who asks. A name that is no longer there raises at once."""

from __future__ import annotations

import contextlib
import functools
import importlib
import resource
import sys
import types
from collections.abc import Callable
from typing import Any

import psutil
import torch

from megatron.early_exit.platform.replace import replace

CPU = torch.device("cpu")

# Tensor factories that Megatron calls with the literal `device="cuda"`.
FACTORIES = ("empty", "empty_like", "ones", "rand", "tensor", "zeros")
# Tensor types that Megatron compares with; their CPU versions have the same names in `torch`.
TENSOR_TYPES = ("FloatTensor", "HalfTensor", "BFloat16Tensor")


def emulate_cuda() -> None:
    """Make Megatron run on the CPU; for a process on a machine without CUDA.

    Raises:
        RuntimeError: the installed torch or Megatron lacks something that is replaced here.
    """
    _patch_torch_cuda()
    _patch_tensors()
    _disable_compilation()
    _patch_megatron()


def _disable_compilation() -> None:
    """Keep Megatron's `torch.compile`d helpers eager: a CPU gains nothing from them, and compiling
    takes longer than a short run."""
    if "megatron.core.jit" in sys.modules:
        torch.compiler.set_stance("force_eager")
        return
    # Megatron captures `torch.compile` by this import, which also decorates much of its core.
    compile_function = torch.compile
    replace(torch, "compile", lambda function: function)
    try:
        jit = importlib.import_module("megatron.core.jit")
        jit.disable_jit_fuser()
    finally:
        torch.compile = compile_function


class _Stream:
    """A CUDA stream or event where everything is synchronous."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def _nothing(self, *args: object, **kwargs: object) -> _Stream:
        return self

    record = record_event = synchronize = wait = wait_event = wait_stream = _nothing

    def elapsed_time(self, end: _Stream) -> float:
        """Milliseconds between two events: none are measured."""
        return 0.0


def _peak_memory() -> int:
    """Bytes: the largest resident size that this process had."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _memory() -> int:
    """Bytes: the resident size of this process."""
    return int(psutil.Process().memory_info().rss)


def _do_nothing() -> Callable[..., None]:
    """A stand-in for a call that has no meaning on a CPU.

    Each is a function of its own: torch's tracer refuses one function under two names."""
    return lambda *args, **kwargs: None


def _patch_torch_cuda() -> None:
    """Answer `torch.cuda.*`. `is_available()` stays truthful, for all who ask it."""
    cuda = torch.cuda
    stream = _Stream()
    properties = types.SimpleNamespace(name="cpu", major=0, minor=0, total_memory=0)
    replacements: dict[str, object] = {
        "current_device": lambda: CPU,
        "device_count": lambda: 1,
        "set_device": _do_nothing(),
        "synchronize": _do_nothing(),
        "current_stream": lambda device=None: stream,
        "set_stream": _do_nothing(),
        "stream": lambda stream: contextlib.nullcontext(),
        "Stream": _Stream,
        "Event": _Stream,
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
        "reset_peak_memory_stats": _do_nothing(),
    }
    for name, value in replacements.items():
        replace(cuda, name, value)
    replace(cuda.nvtx, "range_push", _do_nothing())
    replace(cuda.nvtx, "range_pop", _do_nothing())
    for name in TENSOR_TYPES:
        replace(cuda, name, getattr(torch, name))


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a tensor factory so that `device="cuda"` means the CPU."""

    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("device") == "cuda":
            kwargs["device"] = CPU
        return factory(*args, **kwargs)

    return create


def _patch_tensors() -> None:
    """Keep tensors and modules where they are, under the names that Megatron checks for."""
    # PyTorch's device contexts remember at their first use which functions they are about. They
    # would remember the wrappers, and let the functions inside these pass.
    with CPU:
        torch.empty(0)
    for name in FACTORIES:
        replace(torch, name, _on_cpu(getattr(torch, name)))
    replace(torch.Tensor, "cuda", lambda self, *args, **kwargs: self)
    replace(torch.nn.Module, "cuda", lambda self, *args, **kwargs: self)

    tensor_type = torch.Tensor.type

    def cuda_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        found = tensor_type(self, *args, **kwargs)
        if isinstance(found, str):
            return found.replace("torch.", "torch.cuda.", 1)
        return found

    replace(torch.Tensor, "type", cuda_type)


def _patch_megatron() -> None:
    """Answer what Megatron does past the public functions of torch."""
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    replace(random, "_get_cuda_rng_state", lambda *args, **kwargs: torch.get_rng_state())
    replace(
        random,
        "_set_cuda_rng_state",
        lambda new_state, *args, **kwargs: torch.set_rng_state(new_state),
    )

    # Megatron sends split sizes as NumPy arrays, but converts them only where it copies them.
    dispatcher = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    replace(dispatcher, "maybe_move_tensor_to_cpu", _as_numpy)

    initialize = importlib.import_module("megatron.training.initialize")
    training = importlib.import_module("megatron.training.training")
    package = importlib.import_module("megatron.training")
    without_cuda = functools.partial(initialize.initialize_megatron, allow_no_cuda=True)
    for module in (initialize, training, package):
        replace(module, "initialize_megatron", without_cuda)
    # It only warms up kernels that are compiled at first use.
    replace(training, "set_jit_fusion_options", _do_nothing())


def _as_numpy(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """What Megatron makes of a tensor on a GPU: here it is on the CPU already."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor
