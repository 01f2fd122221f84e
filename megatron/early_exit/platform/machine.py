"""What a machine offers to Megatron, found by looking at it."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True, kw_only=True)
class Platform:
    """What this machine offers to Megatron."""

    device: Literal["cuda", "cpu"]
    backend: Literal["nccl", "gloo"]
    transformer_engine: bool
    """Transformer Engine is installed and has a GPU to run on."""
    apex: bool
    """Apex's fused gradient accumulation kernel is installed."""
    num_devices: int
    """Most processes that can share this machine."""
    compiled_fusions: bool
    """Megatron's `torch.compile`d element-wise fusions pay off."""

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
        transformer_engine=cuda and _imports("transformer_engine.pytorch"),
        apex=cuda and _imports("fused_weight_gradient_mlp_cuda"),
        num_devices=torch.cuda.device_count() if cuda else sys.maxsize,
        compiled_fusions=cuda,
    )


def _imports(module: str) -> bool:
    """Whether a compiled extension is installed and fits this torch."""
    try:
        importlib.import_module(module)
    except (ImportError, OSError, RuntimeError):
        return False
    return True
