"""Core attention on PyTorch's scaled-dot-product attention, for layers without Transformer Engine.

It takes the place of Megatron's `DotProductAttention`, which builds the whole matrix of scores: the
fused kernels here need memory linear in the sequence length, and read grouped keys and values
without repeating them for every query head."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional

_LONGEST_IN_SINGLE_PRECISION = 512


class TorchAttention(MegatronModule):
    """softmax(scale * q k^T + mask) v over this rank's share of the heads.

    The softmax is always computed in fp32, so `--attention-softmax-in-fp32` is always fulfilled,
    and `--apply-query-key-layer-scaling` (which protects fp16 scores from overflow) is not needed.

    Shapes: s sequence length, b batch size, np query heads and ng key-value heads of this
    tensor-parallel rank, hn size of a head.

    Raises:
        ValueError: the configuration asks for a kind of attention that this one does not compute.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        check_attention(config)
        self.attn_mask_type = attn_mask_type
        self.softmax_scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend from query [sq, b, np, hn] to key and value [sk, b, ng, hn].

        A causal query block that is shorter than the keys is aligned with their end. If
        `attention_mask` (broadcastable to [b, np, sq, sk], true where attention is forbidden) is
        given it is the whole mask. Returns [sq, b, np * hn].

        Raises:
            ValueError: for packed sequences, an attention bias, or a mask type that needs a mask
                where none is given.
        """
        if packed_seq_params is not None:
            raise ValueError("packed sequences need --transformer-impl transformer_engine")
        if attention_bias is not None:
            raise ValueError("an attention bias needs --transformer-impl transformer_engine")
        mask_type = attn_mask_type or self.attn_mask_type
        allowed, causal = _mask(attention_mask, mask_type, query.size(0), key)
        dropout = self.dropout if self.training else 0.0
        dtype = _kernel_dtype(query)
        with _dropout_rng(dropout, self.config):
            context = functional.scaled_dot_product_attention(
                query.permute(1, 2, 0, 3).to(dtype),
                key.permute(1, 2, 0, 3).to(dtype),
                value.permute(1, 2, 0, 3).to(dtype),
                attn_mask=allowed,
                dropout_p=dropout,
                is_causal=causal,
                scale=self.softmax_scale,
                enable_gqa=query.size(2) != key.size(2),
            )
        # [b, np, sq, hn] -> [sq, b, np * hn]
        return context.permute(2, 0, 1, 3).flatten(2).to(query.dtype)


def _kernel_dtype(query: Tensor) -> torch.dtype:
    """The number format in which attention is computed.

    On a CPU the backward kernel of PyTorch's attention is up to four times slower in half
    precision than in single for short sequences, and faster again for long ones.
    """
    if query.device.type == "cpu" and query.size(0) <= _LONGEST_IN_SINGLE_PRECISION:
        return torch.float32
    return query.dtype


def check_attention(config: TransformerConfig) -> None:
    """Refuse options that only Transformer Engine's attention supports.

    Raises:
        ValueError: naming the flag.
    """
    wanted = {
        f"--context-parallel-size {config.context_parallel_size}": config.context_parallel_size > 1,
        f"--window-size {config.window_size}": config.window_size is not None,
        f"--softmax-type {config.softmax_type}": config.softmax_type != "vanilla",
        "--qk-clip": config.qk_clip,
        "--log-max-attention-logit": config.log_max_attention_logit,
    }
    for flag, is_set in wanted.items():
        if is_set:
            raise ValueError(f"{flag} needs --transformer-impl transformer_engine")


def _mask(
    attention_mask: Tensor | None, mask_type: AttnMaskType, num_queries: int, key: Tensor
) -> tuple[Tensor | None, bool]:
    """The mask of allowed pairs, broadcastable to [b, np, sq, sk], or None; and whether the kernel
    applies its own causal mask instead."""
    if attention_mask is not None:
        return attention_mask.logical_not(), False
    if mask_type == AttnMaskType.no_mask or num_queries == 1:
        return None, False
    if mask_type != AttnMaskType.causal:
        raise ValueError(f"attention of type {mask_type.name!r} needs an attention mask")
    num_keys = key.size(0)
    if num_queries == num_keys:
        return None, True
    everything = torch.ones(num_queries, num_keys, dtype=torch.bool, device=key.device)
    return everything.tril(num_keys - num_queries), False


def _dropout_rng(dropout: float, config: TransformerConfig) -> AbstractContextManager[None]:
    """Random numbers for dropout: every tensor-parallel rank drops its own heads independently.

    With sequence parallelism Megatron's transformer block already draws from such a state."""
    if dropout == 0.0 or config.sequence_parallel:
        return nullcontext()
    return tensor_parallel.get_cuda_rng_tracker().fork()
