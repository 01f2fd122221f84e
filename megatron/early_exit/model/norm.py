"""Layer norm and RMS norm on PyTorch's own kernels, for layers without Transformer Engine or Apex.

Unlike Megatron's wrapper around `torch.nn` they work with sequence parallelism and with gains that
are centred around zero. Parameters carry Megatron's names, so checkpoints fit either."""

from __future__ import annotations

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch.nn import functional


class TorchNorm(torch.nn.Module):
    """Normalise the last dimension: RMSNorm (arXiv 1910.07467) or LayerNorm (arXiv 1607.06450).

    `config.normalization` picks which. Any shape [..., hidden_size] is kept.

    Raises:
        ValueError: `config.normalization` is neither of the two.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        if config.normalization not in ("LayerNorm", "RMSNorm"):
            raise ValueError(
                f"--normalization {config.normalization} is not supported by local layers; "
                "use LayerNorm or RMSNorm"
            )
        self.config = config
        self.hidden_size = hidden_size
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.empty(hidden_size))
        self.bias: torch.nn.Parameter | None = None
        if config.normalization == "LayerNorm":
            self.bias = torch.nn.Parameter(torch.empty(hidden_size))
        self.reset_parameters()
        for parameter in self.parameters():
            # Megatron sums the gradients of marked parameters over the tensor-parallel group: each
            # rank sees only its part of the sequence.
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def reset_parameters(self) -> None:
        """Initialise as plain normalisation, without a change of scale or an offset."""
        gain = 0.0 if self.config.layernorm_zero_centered_gamma else 1.0
        torch.nn.init.constant_(self.weight, gain)
        if self.bias is not None:
            torch.nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [..., hidden_size]; the result has its shape and dtype."""
        weight = self.weight + 1 if self.config.layernorm_zero_centered_gamma else self.weight
        if self.bias is not None:
            return functional.layer_norm(x, (self.hidden_size,), weight, self.bias, self.eps)
        return functional.rms_norm(x, (self.hidden_size,), weight, self.eps)
