"""A look-ahead head on a frozen model: Megatron's multi-token-prediction module, trained alone.

Row i of depth k (1 to K) combines the hidden state of row i at depth k - 1 (at depth 0 that of the
model, behind the final norm) with the embedding of token i + k, runs one transformer layer, and
predicts token i + k + 1 with the model's own output layer (DeepSeek-V3, arXiv 2412.19437).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlock
from torch import Tensor
from torch.distributed import ProcessGroup

_BLOCK_KWARGS = (
    *("input_ids", "position_ids", "attention_mask", "rotary_pos_emb", "rotary_pos_cos"),
    *("rotary_pos_sin", "packed_seq_params", "sequence_len_offset", "padding_mask"),
)


@dataclass(frozen=True)
class LookAheadInput:
    """A microbatch at the look-ahead head of a frozen model.

    Attributes:
        block: the head.
        hidden: [s, b, h], or [s / tp, b, h] with sequence parallelism: the model's hidden states
            behind its final norm, without a graph.
        logits: [s, b, v], of the final head, this tensor-parallel rank's part of the vocabulary.
        weight: [v, h], the projection that all depths share with the final head.
        labels: [b, s], the tokens that follow each row.
        loss_mask: [b, s], which rows count; None is all.
        block_kwargs: what the block gets beside the hidden states.
        tp_group: the ranks that divide the vocabulary.
    """

    block: MultiTokenPredictionBlock
    hidden: Tensor
    logits: Tensor
    weight: Tensor
    labels: Tensor
    loss_mask: Tensor | None
    block_kwargs: dict[str, Any]
    tp_group: ProcessGroup

    @property
    def depths(self) -> int:
        """How many tokens the head looks ahead."""
        depths = self.block.config.mtp_num_layers
        assert depths is not None
        return depths

    def states(self) -> tuple[Tensor, ...]:
        """Run the head: the hidden states of each depth behind its norm, each [s, b, h]."""
        every: Tensor = self.block(hidden_states=self.hidden.detach(), **self.block_kwargs)
        return torch.chunk(every, 1 + self.depths)[1:]


class LookAheadTap(Protocol):
    """What is called with each microbatch that has run through a frozen model; training provides
    one."""

    def look_ahead(self, ahead: LookAheadInput) -> None:
        """Take a microbatch at the look-ahead head."""


def finish_frozen(
    model: Any, labels: Tensor | None, loss_mask: Tensor | None, end: dict[str, Any]
) -> Tensor:
    """End the forward pass of a frozen model: compute its logits, and hand what the look-ahead
    head needs to the model's `look_ahead_tap`.

    Args:
        model: an EarlyExitGPTModel with a look-ahead head.
        labels: [b, s], None where nothing is learned.
        loss_mask: [b, s].
        end: what GPTModel hands to the end of its forward pass.

    Returns:
        The logits [b, s, v].
    """
    hidden, tied = end["hidden_states"], None
    if model.share_embeddings_and_output_weights:
        tied = model.shared_embedding_or_output_weight()
    logits: Tensor = model.output_layer(hidden, weight=tied)[0]
    if labels is not None and model.look_ahead_tap is not None:
        kwargs = {name: end[name] for name in _BLOCK_KWARGS} | {"embedding": model.embedding}
        weight = model.output_layer.weight if tied is None else tied
        targets = (labels, loss_mask)
        model.look_ahead_tap.look_ahead(
            LookAheadInput(
                model.mtp, hidden, logits, weight, *targets, kwargs, model.pg_collection.tp
            )
        )
    return logits.transpose(0, 1)
