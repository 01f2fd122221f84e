"""Activation recomputation, and random states that can be switched inside a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.checkpoint

from transformer_engine.pytorch.fp8 import FP8GlobalStateManager, fp8_autocast


@contextmanager
def activation_recompute_forward(
    activation_recompute: bool = False, recompute_phase: bool = False
) -> Iterator[None]:
    """Mark a forward pass as one that is repeated or repeats."""
    yield


def checkpoint(function: Callable[..., Any], *args: Any, **_: object) -> Any:
    """Call a function, and call it again in the backward pass, in the format of the first time."""
    recipe = FP8GlobalStateManager.recipe

    def in_format(*args: Any) -> Any:
        with fp8_autocast(enabled=recipe is not None, fp8_recipe=recipe):
            return function(*args)

    return torch.utils.checkpoint.checkpoint(in_format, *args, use_reentrant=True)


class CudaRNGStatesTracker:
    """Named random states, which are generators: the device's own is switched to one of them."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.states_: dict[str, torch.Generator] = {}
        self.seeds_: set[int] = set()

    def get_states(self) -> dict[str, torch.Generator]:
        return dict(self.states_)

    def set_states(self, states: dict[str, torch.Generator]) -> None:
        self.states_ = states

    def add(self, name: str, seed: int) -> None:
        self.seeds_.add(seed)
        self.states_[name] = torch.Generator().manual_seed(seed)

    @contextmanager
    def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
        """Draw from a named state."""
        state = self.states_[name]
        if not isinstance(state, torch.Generator):
            raise TypeError(f"graphsafe_set_state(): a Generator is needed, not {type(state)}")
        outer = torch.get_rng_state()
        torch.set_rng_state(state.get_state())
        try:
            yield
        finally:
            state.set_state(torch.get_rng_state())
            torch.set_rng_state(outer)
