"""The two halves of a transformer layer, as functions over plain tensors.

No module system and no dispatch beyond torch's own: at batch 1 every operation costs about a
microsecond before it does anything, and a token passes through hundreds of them.

Shapes: r rows in a pass, h hidden size, f inner size of the MLP, np query heads, ng key-value
heads, hn head size. In a layer that ranks divide, f, np and ng are those of this rank. A matrix
[n, k] in 8 bits is given as [n, 1], see `pack_quantized`.
"""

from collections.abc import Mapping
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from megatron.early_exit.checkpoint.architecture import Architecture
from megatron.early_exit.inference.model.linear import Function, make_addition, make_linear
from megatron.early_exit.inference.model.norms import make_norm


def arrange(
    architecture: Architecture, weights: Mapping[str, Tensor], prefix: str, order: Tensor | None
) -> dict[str, Tensor]:
    """The tensors of an attention as it is computed: all queries, then all keys, then all values.

    Args:
        architecture: shape of the model.
        weights: tensors by name, queries, keys and values group by group: rows
            [ng, np / ng + 2, hn].
        prefix: what the names start with, such as `decoder.layers.0.self_attention.`.
        order: of the entries of a head, see `RotaryTable`.
    """
    per_group = architecture.num_attention_heads // architecture.num_query_groups
    groups = (architecture.num_query_groups, per_group + 2, architecture.kv_channels)
    own = {name: tensor for name, tensor in weights.items() if name.startswith(prefix)}
    for name, tensor in own.items():
        kind = name.removeprefix(prefix)
        if kind.startswith("linear_qkv.") and "layer_norm" not in kind:
            queries, keys, values = tensor.unflatten(0, groups).split((per_group, 1, 1), dim=1)
            if order is not None:
                queries, keys = queries[:, :, order], keys[:, :, order]
            parts = [part.flatten(0, 2) for part in (queries, keys, values)]
            own[name] = torch.cat(parts).contiguous()
        elif kind.startswith(("q_layernorm.", "k_layernorm.")) and order is not None:
            own[name] = tensor[order]
    return own


_ACTIVATIONS: Mapping[str, Function] = {
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "silu": functional.silu,
    "squared_relu": lambda x: functional.relu(x).square(),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


class Attending(Protocol):
    """What an attention needs of the pass that it is part of; see `Pass`."""

    results: Tensor | None

    def attend(self, attention: int, qkv: Tensor, scale: float | None) -> Tensor:
        """[r, (np + 2 ng) hn] -> [rows that need a result, np hn]"""


class Mlp:
    """x + fc2(activation(fc1(norm(x)))).

    Args:
        architecture: shape of the model.
        weights: tensors by name; `linear_fc1.weight` is [f, h], of a gated MLP [2 f, h], and
            `linear_fc2.weight` is [h, f].
        prefix: what their names start with, such as `decoder.layers.0.mlp.`.
        reduce: see `TensorParallel`; None where the layer is whole.
    """

    def __init__(
        self,
        architecture: Architecture,
        weights: Mapping[str, Tensor],
        prefix: str,
        reduce: Function | None = None,
    ) -> None:
        self.norm = make_norm(architecture, weights, f"{prefix}linear_fc1.layer_norm_")
        fc1, fc2 = f"{prefix}linear_fc1.", f"{prefix}linear_fc2."
        self.fc1 = make_linear(weights[f"{fc1}weight"], weights.get(f"{fc1}bias"))
        self.fc2 = make_addition(weights[f"{fc2}weight"], weights.get(f"{fc2}bias"), reduce)
        self.activation = _ACTIVATIONS[architecture.activation]
        self.gated = architecture.gated_linear_unit

    def __call__(self, x: Tensor, _: Attending | None = None) -> Tensor:
        """[r, h] -> [r, h]"""
        inner = self.fc1(self.norm(x))
        if self.gated:
            gate, linear = inner.chunk(2, dim=-1)
            inner = self.activation(gate).mul_(linear)
        else:
            inner = self.activation(inner)
        return self.fc2(x, inner)


class Attention:
    """x + proj(attention(norm(x))), with keys and values of earlier positions from a cache.

    Args:
        architecture: shape of the model.
        weights: tensors by name, as `arrange` gives them; `linear_qkv.weight` is
            [(np + 2 ng) hn, h], and `linear_proj.weight` is [h, np hn].
        prefix: what their names start with, such as `decoder.layers.0.self_attention.`.
        number: by which the cache knows it.
        reduce: see `TensorParallel`; None where the layer is whole.
    """

    def __init__(
        self,
        architecture: Architecture,
        weights: Mapping[str, Tensor],
        prefix: str,
        number: int,
        reduce: Function | None = None,
    ) -> None:
        self.num_heads = architecture.num_attention_heads
        self.num_groups = architecture.num_query_groups
        self.head_size = architecture.kv_channels
        self.scale = architecture.softmax_scale
        self.number = number
        self.norm = make_norm(architecture, weights, f"{prefix}linear_qkv.layer_norm_")
        qkv, proj = f"{prefix}linear_qkv.", f"{prefix}linear_proj."
        self.qkv = make_linear(weights[f"{qkv}weight"], weights.get(f"{qkv}bias"))
        self.proj = make_addition(weights[f"{proj}weight"], weights.get(f"{proj}bias"), reduce)
        self.query_norm: Function | None = None
        self.key_norm: Function | None = None
        if architecture.qk_layernorm:
            self.query_norm = make_norm(architecture, weights, f"{prefix}q_layernorm.")
            self.key_norm = make_norm(architecture, weights, f"{prefix}k_layernorm.")

    def __call__(self, x: Tensor, this: Attending) -> Tensor:
        """[r, h] -> [r, h], or only those of the rows that need a result."""
        qkv = self.qkv(self.norm(x))
        if self.query_norm is not None and self.key_norm is not None:
            heads = qkv.view(-1, self.num_heads + 2 * self.num_groups, self.head_size)
            queries = heads.narrow(1, 0, self.num_heads)
            keys = heads.narrow(1, self.num_heads, self.num_groups)
            queries.copy_(self.query_norm(queries))
            keys.copy_(self.key_norm(keys))
        attended = this.attend(self.number, qkv, self.scale)
        return self.proj(x if this.results is None else x[this.results], attended)


HalfLayer = Attention | Mlp
"""Half a layer: the residual stream [r, h] before it to the one after it."""
