"""Repairs how Megatron's `DistributedOptimizer` saves and loads its state.

With torch's own Adam (arXiv 1412.6980), the optimizer cannot resume. Torch keeps a step count for
each parameter; Transformer Engine and Apex keep one for all. Without these two, on a GPU as on a
CPU, Megatron 0.19 asks a new optimizer for its step count before there is one; it gives all
parameters one shared step tensor, which torch then advances once for each parameter; and it looks
for step counts among the tensors of the fully reshardable format, which stores them elsewhere.

That format has another bug in 0.19.2: Megatron gathers a buffer of parameters without the padding
at the end of its buckets, but slices the parameters out of it at offsets that include the padding.
If a bucket before the last one is padded (whenever its size is not a multiple of 128 and of the
data-parallel size), the optimizer state of all parameters after it is saved at shifted positions,
with only a warning.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from megatron.core import __version__
from megatron.core.optimizer import distrib_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron.early_exit.patches.replace import replaced, wrap

IS_KNOWN_VERSION = __version__.partition("+")[0] == "0.19.2"
"""The version for which the fully reshardable format is repaired; another version may need no
repair, or a different one."""


def repair_torch_steps() -> None:
    """Make the state of torch's own Adam loadable, if neither Transformer Engine nor Apex is
    installed."""
    if distrib_optimizer.HAVE_APEX_OR_TE:
        return
    wrap(DistributedOptimizer, "state_dict", _with_initial_state, "self")
    wrap(DistributedOptimizer, "load_state_dict", _with_own_steps, "self, state_dict")
    setter = "_set_main_param_and_optimizer_states"
    wrap(DistributedOptimizer, setter, _without_step, "self, model_param, tensors")


@functools.cache
def repair_fully_reshardable_format() -> None:
    """Make every distributed optimizer save and load the right state for each parameter.

    Further calls do nothing.

    Raises:
        RuntimeError: the installed megatron-core is not the version that this repairs.
    """
    if not IS_KNOWN_VERSION:
        raise RuntimeError(
            f"--dist-ckpt-optim-fully-reshardable is not supported with megatron-core {__version__}"
        )
    save = "sharded_param_state_fully_reshardable"
    parameters = "self, model_sharded_state_dict, is_loading, metadata"
    wrap(DistributedOptimizer, save, _with_true_places, parameters)
    load = "load_parameter_state_from_fully_reshardable"
    wrap(DistributedOptimizer, load, _without_steps, "self, state_dict")


def _with_initial_state(state_dict: Callable[..., Any]) -> Callable[..., Any]:
    """Initialise the state of an optimizer that has taken no step, before Megatron reads it."""

    def wrapper(self: Any) -> Any:
        if not self.optimizer.state:
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    self.optimizer.state[parameter] = {
                        "step": torch.tensor(0.0),
                        **{key: torch.zeros_like(parameter) for key in self.optimizer_state_keys},
                    }
        return state_dict(self)

    return wrapper


def _with_own_steps(load_state_dict: Callable[..., Any]) -> Callable[..., Any]:
    """After loading, give every parameter its own copy of the shared step count."""

    def wrapper(self: Any, loaded: Any) -> Any:
        result = load_state_dict(self, loaded)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()
        return result

    return wrapper


def _without_step(set_states: Callable[..., Any]) -> Callable[..., Any]:
    """Load a parameter's state without its step count, which is restored separately."""

    def wrapper(self: Any, parameter: Any, tensors: dict[str, Any]) -> Any:
        return set_states(self, parameter, {"step": None, **tensors})

    return wrapper


def _without_steps(load: Callable[..., Any]) -> Callable[..., Any]:
    """Remove the step counts while the tensors of all parameters are loaded."""

    def wrapper(self: Any, loaded: Any) -> Any:
        states = list(self.optimizer.state.values())
        steps = [state.pop("step", None) for state in states]
        try:
            return load(self, loaded)
        finally:
            for state, step in zip(states, steps, strict=True):
                if step is not None:
                    state["step"] = step

    return wrapper


def _with_true_places(save: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        with places_without_padding(self.buffers):
            return save(self, *args, **kwargs)

    return wrapper


@contextmanager
def places_without_padding(buffers: list[Any]) -> Iterator[None]:
    """Make the parameters' offsets in each buffer those without padding between buckets."""
    with ExitStack() as stack:
        for buffer in buffers:
            shift, shifts = 0, []
            for bucket in buffer.buckets:
                shifts.append(shift)
                shift += bucket.grad_data.numel() - bucket.numel_unpadded
            places = {
                parameter: (start - shifts[bucket], end - shifts[bucket], bucket)
                for parameter, (start, end, bucket) in buffer.param_index_map.items()
            }
            stack.enter_context(replaced(buffer, "param_index_map", places))
        yield
