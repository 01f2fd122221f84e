"""Small transfers between the host and a device.

On an accelerator, a copy from ordinary memory and every copy to the host wait until the device has
done all that was queued. So numbers go there from pinned memory, without waiting, and come back
together.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def upload(values: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of numbers on a device, of any shape; the host does not wait for it.

    Args:
        values: what `torch.as_tensor` takes: numbers, lists of them, or a tensor on the host.
        device: where they go.
        dtype: of the result; by default what the values suggest.
    """
    tensor = torch.as_tensor(values, dtype=dtype)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def upload_to(values: Any, target: Tensor) -> None:
    """Put numbers into a tensor of any shape on a device; the host does not wait for it.

    Args:
        values: what `torch.as_tensor` takes, in the shape of `target`.
        target: is written over.
    """
    tensor = torch.as_tensor(values, dtype=target.dtype)
    if target.device.type != "cpu":
        tensor = tensor.pin_memory()
    target.copy_(tensor, non_blocking=True)


def download(tensors: Sequence[Tensor]) -> list[list[Any]]:
    """The numbers of tensors of one dtype and any shape, nested as they are, by one transfer."""
    if len(tensors) == 1:
        return [tensors[0].tolist()]
    numbers = torch.cat([tensor.flatten() for tensor in tensors]).cpu()
    parts = numbers.split([tensor.numel() for tensor in tensors])
    return [part.view(one.shape).tolist() for part, one in zip(parts, tensors, strict=True)]
