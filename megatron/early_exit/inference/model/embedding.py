"""What the residual stream begins with.

Shapes: r rows, each a position of some sequence; h hidden size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron.early_exit.inference.model.kv_cache import Span
from megatron.early_exit.inference.transfer import upload


class Embedding:
    """The embedding of tokens, and that of positions where the model has one.

    Args:
        words: [v, h]
        positions: [most positions, h], or None.
    """

    def __init__(self, words: Tensor, positions: Tensor | None) -> None:
        self._words, self._positions = words, positions

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Tokens [r] at positions [r] -> [r, h]; all of it on the device."""
        hidden = self._words[tokens]
        if self._positions is not None:
            hidden += self._positions[positions]
        return hidden

    def of_spans(self, tokens: Sequence[int], spans: Sequence[Span]) -> Tensor:
        """The tokens of some spans, one after another -> [r, h]"""
        hidden = self._words[upload(tokens, self._words.device)]
        table = self._positions
        if table is not None:
            hidden += torch.cat([table[start:end] for _, start, end in spans])
        return hidden
