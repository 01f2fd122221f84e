"""The layers and heads of the model.

Shapes: b batch, s positions, h hidden size, n heads, d size of a head, v vocabulary.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache

from .configuration_early_exit import EarlyExitConfig


@dataclass(frozen=True)
class Place:
    """The rotary embeddings and the attention mask for the positions of a pass.

    Attributes:
        cos, sin: [b or 1, 1, s, d], of the rotary embeddings.
        mask: [b or 1, 1, s, all positions], True where a position looks at another; None where a
            single one looks at all.
    """

    cos: Tensor
    sin: Tensor
    mask: Tensor | None


class RMSNorm(nn.Module):
    """RMSNorm (arXiv 1910.07467) over the last dimension, with a gain."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [..., size]."""
        return functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention with rotary embeddings."""

    def __init__(self, config: EarlyExitConfig, number: int) -> None:
        super().__init__()
        width, size = config.hidden_size, config.head_dim
        queries, keys = config.num_attention_heads * size, config.num_key_value_heads * size
        self.number, self.head_size = number, size
        self.q_proj = nn.Linear(width, queries, bias=config.qkv_bias)
        self.k_proj = nn.Linear(width, keys, bias=config.qkv_bias)
        self.v_proj = nn.Linear(width, keys, bias=config.qkv_bias)
        self.o_proj = nn.Linear(queries, width, bias=config.linear_bias)
        self.q_norm = RMSNorm(size, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(size, config.rms_norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, place: Place, cache: DynamicCache | None) -> Tensor:
        """Attend from [b, s, h] to the cache and themselves; returns [b, s, h].

        Args:
            x: normalised hidden states, [b, s, h].
            place: positions of the tokens, and what they may see.
            cache: keys and values of earlier tokens, which is extended; None for a text of its own.
        """
        queries, keys, values = (
            projection(x).unflatten(-1, (-1, self.head_size)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        queries, keys = turn(queries, place), turn(keys, place)
        if cache is not None:
            keys, values = cache.update(keys, values, self.number)
        attended = functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=place.mask, enable_gqa=True
        )
        return self.o_proj(attended.transpose(1, 2).flatten(2))


def turn(heads: Tensor, place: Place) -> Tensor:
    """Rotary embeddings on [b, n, s, d]: entry i turns with entry i + d / 2."""
    first, second = heads.chunk(2, dim=-1)
    return heads * place.cos + torch.cat((-second, first), dim=-1) * place.sin


class Mlp(nn.Module):
    """A gated MLP."""

    def __init__(self, config: EarlyExitConfig) -> None:
        super().__init__()
        width, inner, bias = config.hidden_size, config.intermediate_size, config.linear_bias
        self.gate_proj = nn.Linear(width, inner, bias=bias)
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """The MLP of [b, s, h]."""
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """A transformer layer; its halves can be run one without the other."""

    def __init__(self, config: EarlyExitConfig, number: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, number)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = Mlp(config)

    def attend(self, x: Tensor, place: Place, cache: DynamicCache | None) -> Tensor:
        """The first half, [b, s, h] -> [b, s, h]."""
        return x + self.self_attn(self.input_layernorm(x), place, cache)

    def feed(self, x: Tensor) -> Tensor:
        """The second half, [b, s, h] -> [b, s, h]."""
        return x + self.mlp(self.post_attention_layernorm(x))


class Exit(nn.Module):
    """The head of an exit, from the residual stream to the logits: [mlp] [block] [norm]
    [projection]."""

    def __init__(self, config: EarlyExitConfig, number: int) -> None:
        super().__init__()
        self.mlp = self.block = self.norm = self.projection = None
        self.vocab_size = config.exit_vocab_size
        if config.use_exit_mlp:
            self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
            self.mlp = Mlp(config)
        if config.use_exit_block:
            self.block = Layer(config, number)
        if config.use_exit_norm:
            self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if config.untie_exit_output_weights:
            self.projection = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, x: Tensor, place: Place, cache: DynamicCache, shared: Tensor) -> Tensor:
        """Logits [b, 1, v] at the last position.

        Args:
            x: [b, s, h], every position that a block has not seen yet.
            place: where they are.
            cache: for the block.
            shared: [v, h], the projection where the exit has none.
        """
        if self.block is None:
            x = x[:, -1:]
        if self.mlp is not None:
            x = x + self.mlp(self.post_attention_layernorm(x))
        if self.block is not None:
            x = self.block.feed(self.block.attend(x, place, cache)[:, -1:])
        if self.norm is not None:
            x = self.norm(x)
        if self.projection is not None:
            return self.projection(x)
        logits = functional.linear(x, shared[: self.vocab_size])
        num_others = len(shared) - logits.shape[-1]
        return functional.pad(logits, (0, num_others), value=-math.inf) if num_others else logits


def find_place(
    config: EarlyExitConfig,
    hidden: Tensor,
    seen: int,
    positions: Tensor | None = None,
    attention_mask: Tensor | None = None,
) -> Place:
    """The `Place` of a hidden state [b, s, h] that follows `seen` positions.

    Args:
        config: of the model.
        hidden: the residual stream, for its size, dtype and device.
        seen: positions that the layers to run have been over already.
        positions: [b, s]; by default they go on from there.
        attention_mask: [b, seen + s], 0 where there is padding; None is none.
    """
    order = torch.arange(seen + hidden.shape[1], device=hidden.device)
    own = order[seen:]
    angles = _angles(config, (own[None] if positions is None else positions).to(hidden.device))
    cos, sin = (part[:, None].to(hidden.dtype) for part in (angles.cos(), angles.sin()))
    if len(own) == 1 and attention_mask is None:
        return Place(cos, sin, None)
    mask = (own[:, None] >= order)[None]
    if attention_mask is not None:
        # Padding looks at itself: a row with nothing to look at has no softmax.
        mask = (mask & attention_mask[:, None].bool()) | (own[:, None] == order)
    return Place(cos, sin, mask[:, None])


def _angles(config: EarlyExitConfig, positions: Tensor) -> Tensor:
    """[b, s] -> [b, s, d], in radians."""
    exponents = torch.arange(0, config.head_dim, 2, device=positions.device).float()
    frequencies = 1.0 / config.rotary_base ** (exponents / config.head_dim)
    if config.rotary_llama3_factor is not None:
        # Llama 3.1 (arXiv 2407.21783): by turns within its first context of 8192 positions.
        turns = 8192 * frequencies / (2 * math.pi)
        kept = ((turns - 1) / 3).clamp(0, 1)
        frequencies = frequencies * (kept + (1 - kept) / config.rotary_llama3_factor)
    places = positions.float() / (config.rotary_linear_factor or 1.0)
    return (places[..., None] * frequencies).repeat(1, 1, 2)
