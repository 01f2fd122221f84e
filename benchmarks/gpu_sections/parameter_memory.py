"""The memory that belongs to the parameters of a model in training, by whether they are trained."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


def parameter_memory(chunks: Iterable[nn.Module], optimizer: Any) -> dict[str, Any]:
    """Count parameters and the bytes of all that is kept for them.

    Args:
        chunks: the model.
        optimizer: Megatron's, after a step.

    Returns:
        For `frozen` and `tuned` parameters their number and bytes: of themselves, of their
        gradients, and of the optimizer's states and copies.
    """
    parameters = [one for chunk in chunks for one in chunk.parameters()]
    found = {kind: {"parameters": 0, "bytes": 0} for kind in ("frozen", "tuned")}
    seen: set[int] = set()
    for parameter in parameters:
        kind = found["tuned" if parameter.requires_grad else "frozen"]
        kind["parameters"] += parameter.numel()
        gradients = (parameter.grad, getattr(parameter, "main_grad", None))
        kind["bytes"] += _bytes((parameter, *gradients), seen)
    states = [one for torch_one in _torch_optimizers(optimizer) for one in _tensors_of(torch_one)]
    found["tuned"]["bytes"] += _bytes(states, seen)
    return dict(found)


def _torch_optimizers(optimizer: Any) -> Iterator[torch.optim.Optimizer]:
    """PyTorch's optimizers inside one of Megatron's, which may be a chain of several."""
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = getattr(one, "optimizer", one)
        if isinstance(inner, torch.optim.Optimizer):
            yield inner


def _tensors_of(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        # In bf16 these are the optimizer's own copies in fp32.
        yield from group["params"]
    for state in optimizer.state.values():
        yield from (one for one in state.values() if isinstance(one, Tensor))


def _bytes(tensors: Iterable[Tensor | None], seen: set[int]) -> int:
    """Bytes of tensors that have not been counted before; `seen` are the addresses of those that
    have been."""
    total = 0
    for tensor in tensors:
        # A gradient is a part of a buffer for many.
        if tensor is not None and tensor.numel() and tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            total += tensor.nbytes
    return total
