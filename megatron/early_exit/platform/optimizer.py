"""Repair of Megatron's distributed optimizer over torch's own Adam.

Torch keeps a step count for each parameter, Transformer Engine and Apex one for all. Without these
two, on a GPU as on a CPU, Megatron 0.19 cannot resume: it asks a new optimizer for the step count
before there is one, gives all parameters one shared step tensor, which torch then advances once for
each of them, and looks for steps where the fully reshardable format has none."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

from megatron.early_exit.platform.replace import replace


def repair_distributed_optimizer() -> None:
    """Let checkpoints of the distributed optimizer load; nothing where Transformer
    Engine or Apex is installed.

    Raises:
        RuntimeError: the installed Megatron lacks a method that is wrapped here.
    """
    module = importlib.import_module("megatron.core.optimizer.distrib_optimizer")
    if module.HAVE_APEX_OR_TE:
        return
    optimizer = module.DistributedOptimizer
    replace(optimizer, "state_dict", _with_initial_state(optimizer.state_dict))
    replace(optimizer, "load_state_dict", _with_own_steps(optimizer.load_state_dict))
    setter = "_set_main_param_and_optimizer_states"
    replace(optimizer, setter, _without_step(getattr(optimizer, setter)))


def _with_initial_state(state_dict: Callable[..., Any]) -> Callable[..., Any]:
    """Give an optimizer that took no step the state it will start with, before it is asked."""

    @functools.wraps(state_dict)
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

    @functools.wraps(load_state_dict)
    def wrapper(self: Any, loaded: Any) -> Any:
        result = load_state_dict(self, loaded)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()
        return result

    return wrapper


def _without_step(set_states: Callable[..., Any]) -> Callable[..., Any]:
    """Let a parameter's loaded state have no step of its own: the step is restored apart."""

    @functools.wraps(set_states)
    def wrapper(self: Any, parameter: Any, tensors: dict[str, Any]) -> Any:
        return set_states(self, parameter, {"step": None, **tensors})

    return wrapper
