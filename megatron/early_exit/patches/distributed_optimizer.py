"""Megatron's `DistributedOptimizer`: how it saves and loads its state.

Over torch's own Adam it cannot resume. Torch keeps a step count for each parameter, Transformer
Engine and Apex one for all. Without these two, on a GPU as on a CPU, Megatron 0.19 asks a new
optimizer for the step count before there is one, gives all parameters one shared step tensor, which
torch then advances once for each of them, and looks for steps among the tensors of the fully
reshardable format, which has them elsewhere.

That format of 0.19.2 has another fault: Megatron gathers a buffer of parameters without the padding
at the end of its buckets, but cuts the parameters out of it at their places with that padding.
Where a bucket before the last one is padded (whenever its size is no multiple of 128 and of the
data-parallel size), the optimizer state of all parameters after it is saved shifted, with no more
than a warning.
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
"""The repair of the fully reshardable format fits this version; another one may have no need of it,
or of another."""


def repair_torch_steps() -> None:
    """Let state over torch's own Adam load, where neither Transformer Engine nor Apex is there."""
    if distrib_optimizer.HAVE_APEX_OR_TE:
        return
    wrap(DistributedOptimizer, "state_dict", _with_initial_state, "self")
    wrap(DistributedOptimizer, "load_state_dict", _with_own_steps, "self, state_dict")
    setter = "_set_main_param_and_optimizer_states"
    wrap(DistributedOptimizer, setter, _without_step, "self, model_param, tensors")


@functools.cache
def repair_fully_reshardable_format() -> None:
    """Make every distributed optimizer save and load what belongs to each parameter.

    Calling it again does nothing more.

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
    """Give an optimizer that took no step the state it will start with, before it is asked."""

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
    """Copy the shared step for every parameter after loading."""

    def wrapper(self: Any, loaded: Any) -> Any:
        result = load_state_dict(self, loaded)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()
        return result

    return wrapper


def _without_step(set_states: Callable[..., Any]) -> Callable[..., Any]:
    """Let a parameter's loaded state have no step of its own: the step is restored apart."""

    def wrapper(self: Any, parameter: Any, tensors: dict[str, Any]) -> Any:
        return set_states(self, parameter, {"step": None, **tensors})

    return wrapper


def _without_steps(load: Callable[..., Any]) -> Callable[..., Any]:
    """Keep the steps away while the tensors of all parameters load."""

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
    """Let the parameters' places in each buffer be those without padding between buckets."""
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
