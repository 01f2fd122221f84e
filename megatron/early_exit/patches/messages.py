"""Filters for messages of Megatron and torch about which users cannot do anything.

The lists are meant to stay short: each entry is one message that is known to be harmless here. A
warning or log record that another version words differently is shown again."""

import builtins
import importlib
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

_NOT_DISTRIBUTED = "torch.distributed is disabled, unavailable or uninitialized"

# How each Python warning starts.
WARNINGS = (
    # Said once for every module that could use them; the start-up line already tells.
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    "Only transformer-engine>=1.7.0 supports MoE experts",
    # Models that this package never builds.
    "MimoModelConfig is experimental",
    # Megatron always asks the data loader for it.
    "'pin_memory' argument is set as true but no accelerator is found",
    # Between Megatron's optimizer and checkpoint code and torch's.
    "The .grad attribute of a Tensor that is not a leaf Tensor is being accessed",
    "Please use DTensor instead and we are deprecating ShardedTensor",
    _NOT_DISTRIBUTED,
    "The argument order of load has been changed",
    # Collectives of torch that have new names since 2.14 and that Megatron calls by the old ones.
    "`torch.distributed.all_gather_into_tensor` is deprecated",
    "`torch.distributed.reduce_scatter_tensor` is deprecated",
)

# What PyTorch says when it compiles for a CPU on a machine that has CUDA's compiler but no GPU.
CUDA_REMARK = ("torch.utils.cpp_extension", "No CUDA runtime is found")

# The logger of each log record, and how its message starts.
LOG_RECORDS = (
    ("megatron.core.models.gpt.gpt_model", "GPTModel IS DEPRECATED"),
    # On a CPU the "GPU" and the CPU random number generators are one.
    ("megatron.core.tensor_parallel.random", "CPU RNG state changed within GPU RNG context"),
    ("megatron.core.rerun_state_machine", "RerunStateMachine initialized in mode"),
    ("megatron.core.rerun_state_machine", "Setting RerunStateMachine mode"),
    ("megatron.core.rerun_state_machine", "Result validation enabled"),
    ("megatron.core.dist_checkpointing.strategies.torch", "MCore's async save is deprecated"),
    CUDA_REMARK,
)

# What a module prints, and how it starts.
PRINTS = (
    # Said on every run with the ordinary pipeline schedule.
    ("megatron.training.arguments", "WARNING: Setting args.overlap_p2p_comm and"),
)


def silence() -> None:
    """Filter out the warnings and log records listed above, and nothing else."""
    for start in WARNINGS:
        warnings.filterwarnings("ignore", message=re.escape(start))
    for logger, start in LOG_RECORDS:
        logging.getLogger(logger).addFilter(_Unlike(start))


def silence_cuda_remark() -> None:
    """Filter out `CUDA_REMARK` alone. Call it before anything is compiled."""
    logger, start = CUDA_REMARK
    logging.getLogger(logger).addFilter(_Unlike(start))


@contextmanager
def without_distributed_warning() -> Iterator[None]:
    """Filter out the warning that torch.distributed is not initialised, for callers that do not
    need it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=re.escape(_NOT_DISTRIBUTED))
        yield


def silence_prints() -> None:
    """Filter out the lines listed above; imports the modules that print them.

    Raises:
        RuntimeError: a module prints no such line any more.
    """
    for name, start in PRINTS:
        module = importlib.import_module(name)
        with open(str(module.__file__), encoding="utf-8") as source:
            if start not in source.read():
                raise RuntimeError(
                    f"{name} no longer prints {start!r}: this version of Megatron is not supported"
                )
        module.print = _print_unlike(start)  # type: ignore[attr-defined]


def _print_unlike(start: str) -> Callable[..., None]:
    def print_unlike(*values: object, **options: Any) -> None:
        if not str(values[0] if values else "").startswith(start):
            builtins.print(*values, **options)

    return print_unlike


@dataclass(frozen=True)
class _Unlike(logging.Filter):
    """Passes all records except those whose message starts in one way; a logger adds equal filters
    once."""

    start: str

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.start)
