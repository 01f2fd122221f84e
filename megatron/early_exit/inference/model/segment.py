"""A run of half layers through which a batch goes at once."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron.early_exit.inference.model.compiled import CompiledLayers
from megatron.early_exit.inference.model.graphs import GraphedLayers
from megatron.early_exit.inference.model.layers import HalfLayer
from megatron.early_exit.inference.model.passes import Pass

_ATTENTION_ON_GPUS = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
"""cuDNN builds a plan for every new shape, which takes tens of milliseconds, and a step of decoding
has a new one nearly always."""


@dataclass(frozen=True, slots=True)
class Segment:
    """The half layers between two cuts; or the layer that an exit has of its own."""

    steps: tuple[HalfLayer, ...]
    attentions: range
    """Their numbers, which are those of the layers."""
    compiled: CompiledLayers | GraphedLayers | None = None
    """Its whole layers, for the passes that they serve; all of it where steps are captured."""
    compiled_steps: tuple[HalfLayer | CompiledLayers | GraphedLayers, ...] = ()
    """The same with those, and the half layers that there may be at the ends."""

    def __call__(self, hidden: Tensor, this: Pass) -> Tensor:
        """Residual stream [r, h] at the start of the segment -> at its end."""
        if hidden.is_cuda:
            with sdpa_kernel(_ATTENTION_ON_GPUS):
                return self._run(hidden, this)
        return self._run(hidden, this)

    def run_holding(self, hidden: Tensor, this: Pass, held: Tensor) -> Tensor:
        """The same with rows whose residual stream is held [r]: it does not change, whatever the
        half layers make of it."""
        for step in self.steps:
            hidden = torch.where(held[:, None], hidden, step(hidden, this))
        return hidden

    def takes_tokens(self, this: Pass) -> bool:
        """Whether its input are the tokens of a pass, for `run_tokens`: what has been captured
        begins with their embedding."""
        layers = self.compiled
        return isinstance(layers, GraphedLayers) and layers.takes_tokens and layers.serves(this)

    def run_tokens(self, tokens: Sequence[int], this: Pass) -> Tensor:
        """Tokens, one for each row of a pass -> the residual stream [r, h] behind the segment."""
        assert isinstance(self.compiled, GraphedLayers)
        return self.compiled.run_tokens(tokens, this)

    def _run(self, hidden: Tensor, this: Pass) -> Tensor:
        is_compiled = self.compiled is not None and self.compiled.serves(this)
        for step in self.compiled_steps if is_compiled else self.steps:
            hidden = step(hidden, this)
        return hidden
