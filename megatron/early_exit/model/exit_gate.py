"""The gate of an exit: a guess whether its token is the final head's, before it is evaluated.

Gates are asked instead of a vocabulary, so they have to be cheap: one product with a vector. The
residual stream grows with depth and has channels that are far larger than the others; at unit RMS
the size of a layer's stream does not matter.
"""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import Module, Parameter, functional


class ExitGate(Module):
    """A linear classifier of hidden states, replicated on all tensor-parallel ranks; it starts
    undecided.

    Args:
        config: the backbone's transformer config.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self._epsilon = config.layernorm_epsilon
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        dtype = config.params_dtype
        self.weight = Parameter(torch.zeros((1, config.hidden_size), dtype=dtype, device=device))
        self.bias = Parameter(torch.zeros((1,), dtype=dtype, device=device))
        for parameter in self.parameters():
            # Megatron then sums the gradients of the parts of a sequence.
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor) -> Tensor:
        """Judge hidden states [s, b, h] as they come to the exit.

        Returns:
            [s, b] in fp32. The sigmoid of it is the probability that the exit's token is the final
            head's.
        """
        stream = hidden.float()
        size = stream.square().mean(dim=-1, keepdim=True).add(self._epsilon).rsqrt()
        return functional.linear(stream * size, self.weight.float(), self.bias.float()).squeeze(-1)
