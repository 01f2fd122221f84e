"""Let Megatron run on whatever machine this is.

Megatron asks for CUDA by name in a few hundred places. On a machine that has it this module only
tells what was found; elsewhere `prepare` answers those places with CPU equivalents (one pass of
patches, no per-operation hook) so that `megatron.training.pretrain` runs over gloo. Entry points
call `prepare` before they import anything of Megatron; no other module knows about devices."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import logging
import os
import resource
import sys
import types
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

CPU = torch.device("cpu")

# Tensor factories that Megatron calls with the literal `device="cuda"`.
FACTORIES = ("empty", "empty_like", "ones", "rand", "tensor", "zeros")
TENSOR_TYPES = ("FloatTensor", "HalfTensor", "BFloat16Tensor", "LongTensor", "IntTensor")

# Warnings that nobody who starts a run can act on: (start of the message, category).
SILENCED_WARNINGS: tuple[tuple[str, type[Warning]], ...] = ()
# Log records of the same kind: (logger, start of the message).
SILENCED_LOGS: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Platform:
    """What this machine offers to Megatron."""

    device: Literal["cuda", "cpu"]
    backend: Literal["nccl", "gloo"]
    transformer_engine: bool
    """Transformer Engine can be imported and has a GPU to run on."""
    apex: bool
    """Apex's fused gradient accumulation kernel can be imported."""
    compiled_fusions: bool
    """Megatron's `torch.compile`d element-wise fusions are used."""

    @property
    def transformer_impl(self) -> Literal["transformer_engine", "local"]:
        """The value of `--transformer-impl` that is best here."""
        return "transformer_engine" if self.transformer_engine else "local"

    def describe(self) -> str:
        """One line for the start of a run."""
        layers = (
            "Transformer Engine layers"
            if self.transformer_engine
            else "local layers (PyTorch attention and norms)"
        )
        fusions = "compiled fusions" if self.compiled_fusions else "no compiled fusions"
        return f"platform: {self.device}, {self.backend}, {layers}, {fusions}"


def detect() -> Platform:
    """Look at the machine; changes nothing."""
    cuda = torch.cuda.is_available()
    return Platform(
        device="cuda" if cuda else "cpu",
        backend="nccl" if cuda else "gloo",
        transformer_engine=cuda and importlib.util.find_spec("transformer_engine") is not None,
        apex=cuda and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None,
        compiled_fusions=cuda,
    )


@functools.cache
def prepare() -> Platform:
    """Make Megatron usable on this machine and say what was found.

    Call it first, before `megatron.core` or `megatron.training` are imported. Calling it again
    does nothing more.

    Raises:
        RuntimeError: the installed torch or Megatron lacks something that is replaced here.
    """
    platform = detect()
    _silence()
    # Megatron asserts this with tensor parallelism; it orders communication before computation.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if platform.device == "cpu":
        _patch_torch_cuda()
        _patch_tensors()
        _disable_compilation()
        _patch_megatron()
    _patch_dataset_helpers()
    return platform


def set_argument_defaults(parser: ArgumentParser, platform: Platform) -> None:
    """Change the defaults of Megatron's flags to what the machine can do.

    For use inside `extra_args_provider`. Megatron's own `args_defaults` only fills in arguments
    that are None, so most switches can only be set on the parser."""
    defaults: dict[str, object] = {
        "distributed_backend": platform.backend,
        "transformer_impl": platform.transformer_impl,
    }
    if not platform.transformer_engine:
        defaults |= {
            "no_persist_layer_norm": True,
            "masked_softmax_fusion": False,
            "apply_rope_fusion": False,
            "gradient_accumulation_fusion": platform.apex,
        }
    if not platform.compiled_fusions:
        defaults |= {
            "bias_gelu_fusion": False,
            "bias_swiglu_fusion": False,
            "bias_dropout_fusion": False,
        }
    known = {action.dest for action in parser._actions}
    if missing := sorted(defaults.keys() - known):
        raise RuntimeError(f"Megatron no longer has the arguments {', '.join(missing)}")
    parser.set_defaults(**defaults)


def check_arguments(args: Namespace, platform: Platform) -> None:
    """Refuse flags that ask for what the machine lacks.

    Raises:
        ValueError: naming the flag, its value and what is possible here.
    """
    if args.transformer_impl != "local" and not platform.transformer_engine:
        raise ValueError(
            f"--transformer-impl {args.transformer_impl} needs a GPU and Transformer Engine, "
            "which this machine lacks; use --transformer-impl local"
        )
    if args.distributed_backend == "nccl" and platform.device == "cpu":
        raise ValueError(
            "--distributed-backend nccl needs a GPU, which this machine lacks; "
            "use --distributed-backend gloo"
        )
    for flag in ("fp8", "fp4"):
        if getattr(args, flag) and not platform.transformer_engine:
            raise ValueError(
                f"--{flag}-format {getattr(args, flag)} needs a GPU and Transformer Engine, "
                "which this machine lacks; use --bf16"
            )


def _replace(owner: object, name: str, value: object) -> None:
    """Set `owner.name`, which must exist."""
    if not hasattr(owner, name):
        label = getattr(owner, "__name__", repr(owner))
        raise RuntimeError(f"cannot run without CUDA: {label} has no attribute {name!r} any more")
    setattr(owner, name, value)


def _disable_compilation() -> None:
    """Keep Megatron's `torch.compile`d helpers eager: a CPU gains nothing from them, and compiling
    takes longer than a short run."""
    if "megatron.core.jit" in sys.modules:
        torch.compiler.set_stance("force_eager")
        return
    # Megatron captures `torch.compile` by this import, which also decorates much of its core.
    compile_function = torch.compile
    _replace(torch, "compile", lambda function: function)
    try:
        jit = importlib.import_module("megatron.core.jit")
        jit.disable_jit_fuser()
    finally:
        torch.compile = compile_function


class _Stream:
    """A CUDA stream or event where everything is synchronous."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., _Stream]:
        if name not in _STREAM_METHODS:
            raise AttributeError(name)
        return lambda *args, **kwargs: self

    def elapsed_time(self, end: _Stream) -> float:
        """Milliseconds between two events: none are measured."""
        return 0.0


_STREAM_METHODS = frozenset(
    {"record", "record_event", "synchronize", "wait", "wait_event", "wait_stream"}
)


def _peak_memory() -> int:
    """Bytes: the largest resident size that this process had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _memory() -> int:
    """Bytes: the resident size of this process."""
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


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
        "reset_peak_memory_stats": _do_nothing(),
    }
    for name, value in replacements.items():
        _replace(cuda, name, value)
    _replace(cuda.nvtx, "range_push", _do_nothing())
    _replace(cuda.nvtx, "range_pop", _do_nothing())
    for name in TENSOR_TYPES:
        _replace(cuda, name, getattr(torch, name))


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
    for name in FACTORIES:
        _replace(torch, name, _on_cpu(getattr(torch, name)))
    _replace(torch.Tensor, "cuda", lambda self, *args, **kwargs: self)
    _replace(torch.nn.Module, "cuda", lambda self, *args, **kwargs: self)

    tensor_type = torch.Tensor.type

    def cuda_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        found = tensor_type(self, *args, **kwargs)
        if isinstance(found, str):
            return found.replace("torch.", "torch.cuda.", 1)
        return found

    _replace(torch.Tensor, "type", cuda_type)


def _patch_megatron() -> None:
    """Answer what Megatron does past the public functions of torch."""
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    _replace(random, "_get_cuda_rng_state", lambda *args, **kwargs: torch.get_rng_state())
    _replace(random, "_set_cuda_rng_state", lambda new_state, *args, **kwargs: torch.set_rng_state(new_state))

    initialize = importlib.import_module("megatron.training.initialize")
    training = importlib.import_module("megatron.training.training")
    package = importlib.import_module("megatron.training")
    without_cuda = functools.partial(initialize.initialize_megatron, allow_no_cuda=True)
    for module in (initialize, training, package):
        _replace(module, "initialize_megatron", without_cuda)
    # It only warms up kernels that are compiled at first use.
    _replace(training, "set_jit_fusion_options", _do_nothing())


def _patch_dataset_helpers() -> None:
    """Skip the build of Megatron's data set helper: the wheel brings it compiled, not its sources.

    The build would end the process for want of a Makefile, with or without a GPU."""
    utils = importlib.import_module("megatron.core.datasets.utils")
    importlib.import_module("megatron.core.datasets.helpers_cpp")
    _replace(utils, "compile_helpers", _do_nothing())


def _silence() -> None:
    """Filter the warnings and log records listed at the top of this file, and nothing else."""
    for message, category in SILENCED_WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=category)
    for logger, message in SILENCED_LOGS:
        logging.getLogger(logger).addFilter(
            lambda record, start=message: not record.getMessage().startswith(start)
        )
