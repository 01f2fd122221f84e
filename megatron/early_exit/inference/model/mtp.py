"""The depths of Megatron's multi-token-prediction module: the head that looks further ahead.

Depth k of row i takes the hidden state of that row at depth k - 1, which for depth 1 is what the
final head projects, and the embedding of token i + k. It predicts token i + k + 1 (DeepSeek-V3,
arXiv 2412.19437). No layer of the backbone runs for it.

Shapes: r rows, h hidden size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.early_exit.inference.model.linear import Function
from megatron.early_exit.inference.model.passes import Pass
from megatron.early_exit.inference.model.segment import Segment


@dataclass(frozen=True, slots=True)
class MtpLayer:
    """One layer of the module; it may serve several depths, each with a cache of its own."""

    embedding_norm: Function
    hidden_norm: Function
    joint_projection: Function
    """[r, 2 h] -> [r, h], of the embedding next to the hidden state, both normalised."""
    block: Segment
    final_norm: Function

    def __call__(self, embeddings: Tensor, hidden: Tensor, this: Pass) -> Tensor:
        """Hidden states at a depth, from embeddings [r, h] and hidden states [r, h] at the one
        before.

        Returns:
            [n, h], of the rows that the pass wants results of.
        """
        both = torch.cat((self.embedding_norm(embeddings), self.hidden_norm(hidden)), dim=-1)
        return self.final_norm(self.block(self.joint_projection(both), this))
