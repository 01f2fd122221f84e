"""Repair of how Megatron saves and loads the distributed optimizer for any layout.

Megatron 0.19.2 gathers a buffer of parameters without the padding at the end of its buckets, but
cuts the parameters out of it at their places with that padding. Where a bucket before the last one
is padded (whenever its size is no multiple of 128 and of the data-parallel size), the optimizer
state of all parameters after it is saved shifted, with no more than a warning. And with torch's own
Adam the state does not load: the step count, which is stored elsewhere, is looked for among the
tensors.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from megatron.core import __version__
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

IS_KNOWN_VERSION = __version__.partition("+")[0] == "0.19.2"
"""The repair fits this version; another one may have no need of it, or of another."""


def repair_fully_reshardable_format() -> None:
    """Make every distributed optimizer save and load what belongs to each parameter.

    Raises:
        RuntimeError: the installed megatron-core is not the version that this repairs.
    """
    if not IS_KNOWN_VERSION:
        raise RuntimeError(
            f"--dist-ckpt-optim-fully-reshardable is not supported with megatron-core {__version__}"
        )
    for method, repair in _REPAIRS.items():
        original = getattr(DistributedOptimizer, method)
        if original.__globals__ is not globals():
            setattr(DistributedOptimizer, method, functools.wraps(original)(repair(original)))


def _with_true_places(save: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        with places_without_padding(self.buffers):
            return save(self, *args, **kwargs)

    return wrapper


def _without_steps(load: Callable[..., Any]) -> Callable[..., Any]:
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


@contextmanager
def places_without_padding(buffers: list[Any]) -> Iterator[None]:
    """Let the parameters' places in each buffer be those without padding between buckets."""
    padded = [buffer.param_index_map for buffer in buffers]
    try:
        for buffer in buffers:
            shift, shifts = 0, []
            for bucket in buffer.buckets:
                shifts.append(shift)
                shift += bucket.grad_data.numel() - bucket.numel_unpadded
            buffer.param_index_map = {
                parameter: (start - shifts[bucket], end - shifts[bucket], bucket)
                for parameter, (start, end, bucket) in buffer.param_index_map.items()
            }
        yield
    finally:
        for buffer, places in zip(buffers, padded, strict=True):
            buffer.param_index_map = places


_REPAIRS = {
    "sharded_param_state_fully_reshardable": _with_true_places,
    "load_parameter_state_from_fully_reshardable": _without_steps,
}
