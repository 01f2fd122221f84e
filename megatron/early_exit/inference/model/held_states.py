"""Keys and values of positions whose residual stream is held.

Behind the exit at which a position has left its hidden state stays as it is: what deeper layers see
of it are the keys and values that they make of that state (state propagation, arXiv 2207.07061).
All attentions of a segment make theirs of the same state, so it is normalised once, and one product
serves all of them.

Shapes: r positions, h hidden size, a attentions, np query heads, ng key-value heads, hn head size.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from megatron.early_exit.checkpoint.architecture import Architecture
from megatron.early_exit.inference.model.linear import Function, make_linear
from megatron.early_exit.inference.model.quantized import is_quantized, unpack_quantized
from megatron.early_exit.inference.model.rotary import RotaryTable

_BIAS = "linear_qkv.bias"


class HeldStates:
    """The key and value projections of the attentions of a segment, next to each other.

    In fp32 the gains of their norms are part of the weights. In other formats that would round the
    weights a second time.

    Args:
        architecture: shape of the model, or of this rank's part.
        attentions: the tensors of each, as `arrange` gives them, packed or not, named as behind
            `self_attention.`: `linear_qkv.weight` is [(np + 2 ng) hn, h], or where it is in 8 bits
            [(np + 2 ng) hn, 1], see `pack_quantized`; its bias is [(np + 2 ng) hn], the norm in
            front of it has gains [h], and the one of the keys has gains [hn].
        rotary: the rotary table, if the model has rotary embeddings.
    """

    def __init__(
        self,
        architecture: Architecture,
        attentions: Sequence[Mapping[str, Tensor]],
        rotary: RotaryTable | None,
    ) -> None:
        self._architecture, self._rotary = architecture, rotary
        weights = torch.stack([self._rows(own["linear_qkv.weight"]) for own in attentions])
        biases = [self._rows(own[_BIAS]) for own in attentions if _BIAS in own]
        gains = self._gains(attentions, "linear_qkv.layer_norm_")
        shifts = _stacked(attentions, "linear_qkv.layer_norm_bias")
        make = _folded if weights.dtype == torch.float32 else _apart
        self._project = make(weights, torch.stack(biases) if biases else None, gains, shifts)
        self._key_gains: Tensor | None = None
        self._key_shifts: Tensor | None = None
        if architecture.qk_layernorm:
            self._key_gains = self._gains(attentions, "k_layernorm.")[:, None]
            key_shifts = _stacked(attentions, "k_layernorm.bias")
            self._key_shifts = None if key_shifts is None else key_shifts[:, None]

    def __call__(self, hidden: Tensor, positions: slice | Tensor) -> Tensor:
        """Keys and values, in the order of a cache.

        Args:
            hidden: [r, h], the states.
            positions: of the rows, r.

        Returns:
            [a, r, 2 ng, hn]
        """
        shape = self._architecture
        groups = shape.num_query_groups
        heads = self._project(self._normalised(hidden))
        heads = heads.unflatten(-1, (2 * groups, shape.kv_channels))
        keys = heads.narrow(2, 0, groups)
        if self._key_gains is not None:
            normed = self._normalised(keys) * self._key_gains
            keys.copy_(normed if self._key_shifts is None else normed + self._key_shifts)
        if self._rotary is not None:
            pairs = keys.float().unflatten(3, (-1, 2))
            turned = torch.view_as_complex(pairs) * self._rotary.turns[positions].unsqueeze(1)
            keys.copy_(torch.view_as_real(turned).flatten(3))
        return heads.transpose(0, 1)

    def _normalised(self, x: Tensor) -> Tensor:
        """The norm of the architecture without its gain, over the last dimension; in fp32."""
        eps, shape = self._architecture.layernorm_epsilon, x.shape[-1:]
        wide = x.float()
        if self._architecture.normalization == "LayerNorm":
            return functional.layer_norm(wide, shape, eps=eps)
        return functional.rms_norm(wide, shape, eps=eps)

    def _gains(self, attentions: Sequence[Mapping[str, Tensor]], norm: str) -> Tensor:
        """[a, n], the gains of a norm."""
        gains = torch.stack([own[f"{norm}weight"] for own in attentions])
        return gains + 1 if self._architecture.layernorm_zero_centered_gamma else gains

    def _rows(self, tensor: Tensor) -> Tensor:
        """What of the tensors of a projection is for keys and values."""
        shape = self._architecture
        if is_quantized(tensor):
            plain = unpack_quantized(tensor)
        else:
            plain = tensor.to_dense() if tensor.is_mkldnn else tensor
        return plain[shape.num_attention_heads * shape.kv_channels :]


def _stacked(attentions: Sequence[Mapping[str, Tensor]], name: str) -> Tensor | None:
    """A tensor of each attention; None where they have none."""
    found = [own[name] for own in attentions if name in own]
    return torch.stack(found) if found else None


def _folded(
    weights: Tensor, biases: Tensor | None, gains: Tensor, shifts: Tensor | None
) -> Function:
    """A projection of each attention, with the gain and the bias of its norm: [r, h], normalised,
    -> [r, a, n].

    Args:
        weights: [a, n, h]
        biases: [a, n], if there are any.
        gains: [a, h]
        shifts: [a, h], the norms' biases, if there are any.
    """
    # Those of weights in 8 bits are in the format of the activations.
    gains = gains.float()
    biases = None if biases is None else biases.float()
    if shifts is not None:
        own = torch.einsum("anh,ah->an", weights, shifts.float())
        biases = own if biases is None else own + biases
    folded = (weights * gains[:, None]).flatten(0, 1)
    product = make_linear(folded, None if biases is None else biases.flatten())
    return lambda normed: product(normed).unflatten(1, weights.shape[:2])


def _apart(
    weights: Tensor, biases: Tensor | None, gains: Tensor, shifts: Tensor | None
) -> Function:
    """The same, by a product for each attention with what its own norm gives."""
    transposed, gains = weights.transpose(1, 2), gains.float()[:, None]
    shifts = None if shifts is None else shifts.float()[:, None]

    def project(normed: Tensor) -> Tensor:
        inputs = normed * gains
        if shifts is not None:
            inputs += shifts
        found = inputs.to(transposed.dtype) @ transposed
        if biases is not None:
            found += biases[:, None]
        return found.transpose(0, 1).contiguous()

    return project
