"""Makes torch create and keep tensors on the CPU where Megatron asks for "cuda"."""

from collections.abc import Callable
from typing import Any

import torch

from megatron.early_exit.patches.replace import replace, wrap

CPU = torch.device("cpu")

# Tensor factories that Megatron calls with the literal `device="cuda"`.
FACTORIES = ("empty", "empty_like", "ones", "rand", "tensor", "zeros")


def keep_tensors_on_cpu() -> None:
    """Keep tensors and modules on the CPU, with the type names that Megatron checks for."""
    # PyTorch's device contexts remember at their first use which functions they are about. They
    # would remember the wrappers, and let the functions inside these pass.
    with CPU:
        torch.arange(0)
    for name in FACTORIES:
        wrap(torch, name, _on_cpu)
    replace(torch.Tensor, "cuda", lambda self, *args, **kwargs: self)
    replace(torch.nn.Module, "cuda", lambda self, device=None: self)
    wrap(torch.Tensor, "type", _with_cuda_names)


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a tensor factory so that `device="cuda"` means the CPU."""

    def create(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("device") == "cuda":
            kwargs["device"] = CPU
        return factory(*args, **kwargs)

    return create


def _with_cuda_names(tensor_type: Callable[..., Any]) -> Callable[..., Any]:
    """Return the type name `torch.cuda.FloatTensor`, which Megatron asserts for gradients."""

    def cuda_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        found = tensor_type(self, *args, **kwargs)
        return found.replace("torch.", "torch.cuda.", 1) if isinstance(found, str) else found

    return cuda_type
