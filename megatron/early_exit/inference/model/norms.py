"""Norms as plain functions."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from megatron.early_exit.checkpoint.architecture import Architecture
from megatron.early_exit.inference.model.linear import Function


def make_norm(architecture: Architecture, weights: Mapping[str, Tensor], prefix: str) -> Function:
    """The norm whose tensors are `{prefix}weight` and `{prefix}bias`, [n] each, over the last
    dimension: [..., n] -> [..., n]."""
    gain = weights[f"{prefix}weight"]
    if architecture.layernorm_zero_centered_gamma:
        gain = gain + 1
    shape, eps = (gain.shape[0],), architecture.layernorm_epsilon
    if architecture.normalization == "LayerNorm":
        bias = weights[f"{prefix}bias"]
        return partial(
            functional.layer_norm, normalized_shape=shape, weight=gain, bias=bias, eps=eps
        )
    if gain.device.type == "cpu" and not torch.compiler.is_compiling():
        return _CpuRmsNorm(gain, eps)
    return partial(functional.rms_norm, normalized_shape=shape, weight=gain, eps=eps)


class _CpuRmsNorm:
    """RMSNorm (arXiv 1910.07467) of [s, ...], at a third of the cost where s is 1.

    PyTorch has no fused RMSNorm for the CPU; it takes eight operations of a microsecond each, some
    tenth of the time of a token in bf16. Its LayerNorm is fused, and the two are the same where
    the mean is zero: so the single row is normalised together with its own negative.
    """

    def __init__(self, gain: Tensor, eps: float) -> None:
        self.gain, self.eps = gain, eps
        self.shape, self.both_shape = (gain.shape[0],), (2, gain.shape[0])
        self.signs = torch.tensor([[1.0], [-1.0]], dtype=gain.dtype)
        self.both_gains = gain.expand(self.both_shape).contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        if x.dim() == 2 and x.shape[0] == 1:
            signed = x * self.signs
            both = torch.layer_norm(signed, self.both_shape, self.both_gains, None, self.eps)
            return both.narrow(0, 0, 1)
        return functional.rms_norm(x, self.shape, self.gain, self.eps)
