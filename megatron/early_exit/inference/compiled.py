"""Layers compiled for a single row, the case in which a token costs most.

With one row, half of what PyTorch does around the products of a small model is calling kernels. Its
compiler makes a layer a few loops instead, each over a whole weight matrix in the plain layout,
with all that lies between the products inside them. One layer is compiled, and serves all.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatron.early_exit.checkpoint.architecture import Architecture
from megatron.early_exit.inference.layers import Attention, Mlp
from megatron.early_exit.inference.passes import Pass
from megatron.early_exit.inference.rotary import RotaryTable

_SHORTEST = 2
"""A length of 1 would make the compiler take lengths for constants."""


class LayerCompiler:
    """Compiles a layer of a model, when it is first run.

    Args:
        architecture: shape of the model.
        rotary: the rotary table, if the model has rotary embeddings.
    """

    def __init__(self, architecture: Architecture, rotary: RotaryTable | None) -> None:
        self._turns = None if rotary is None else rotary.real_turns

        def layer(
            weights: Mapping[str, Tensor],
            cache: Tensor,
            hidden: Tensor,
            seen: Tensor,
            turns: Tensor | None,
        ) -> Tensor:
            this = _RowPass(cache, architecture, seen, turns)
            attention = Attention(architecture, weights, "self_attention.", 0)
            return Mlp(architecture, weights, "mlp.")(attention(hidden, this))

        # Weights are arguments, so it does not matter of which layer.
        self._layer = torch.compile(layer, fullgraph=True)
        self._positions = torch.arange(architecture.max_position_embeddings)

    def run(
        self,
        layers: Sequence[Mapping[str, Tensor]],
        hidden: Tensor,
        caches: Sequence[Tensor],
        end: int,
    ) -> Tensor:
        """Take a row through layers.

        Args:
            layers: the tensors of each, see `CompiledLayers`.
            hidden: [1, h], its residual stream.
            caches: of each layer [positions, 2 ng, hn], for the row's sequence.
            end: the position behind the row's.
        """
        seen = self._positions[:end]
        torch._dynamo.mark_dynamic(seen, 0)
        for weights, cache in zip(layers, caches, strict=True):
            hidden = self._layer(weights, cache, hidden, seen, self._turns)
        return hidden


class CompiledLayers:
    """Consecutive whole layers of a segment, for passes over one row.

    Args:
        compiler: of the model's layers.
        layers: the tensors of each, named like those of layer N behind `decoder.layers.N.`; those
            of the attention as `arrange` gives them.
    """

    def __init__(self, compiler: LayerCompiler, layers: Sequence[Mapping[str, Tensor]]) -> None:
        self._compiler, self._layers = compiler, layers

    @staticmethod
    def serve(this: Pass) -> bool:
        """Whether a pass is over a single position, and not the first."""
        (_, start, end), *others = this.spans
        return not others and end == start + 1 and end >= _SHORTEST

    def __call__(self, hidden: Tensor, this: Pass) -> Tensor:
        """Residual stream [1, h] in front of the layers -> behind them."""
        slot, _, end = this.spans[0]
        # The attention of a layer that another segment began comes last.
        caches = this.cache.by_slot[slot][: len(self._layers)]
        return self._compiler.run(self._layers, hidden, caches, end)


class _RowPass:
    """What `Pass` is, for one row and in operations that a compiler sees through.

    Args:
        cache: [positions, 2 ng, hn], of the attention and the row's sequence.
        architecture: shape of the model.
        seen: [t], the positions up to the row's own.
        turns: see `RotaryTable.real_turns`.
    """

    results: Tensor | None = None

    def __init__(
        self, cache: Tensor, architecture: Architecture, seen: Tensor, turns: Tensor | None
    ) -> None:
        self._cache, self._seen = cache, seen
        self._turns = None if turns is None else turns[seen[-1:]]
        self._num_heads = architecture.num_attention_heads
        self._num_groups = architecture.num_query_groups

    def attend(self, attention: int, qkv: Tensor, scale: float | None) -> Tensor:
        """See `Pass`."""
        size = self._cache.shape[-1]
        rows = qkv.view(1, -1, size)
        turned, values = rows.split((self._num_heads + self._num_groups, self._num_groups), dim=1)
        if self._turns is not None:
            turned = self._turn(turned)
        queries, keys = turned.split((self._num_heads, self._num_groups), dim=1)
        self._cache[self._seen[-1:]] = torch.cat((keys, values), dim=1)
        window = self._cache[: self._seen.shape[0]].transpose(0, 1).float()
        all_keys, all_values = window.split(self._num_groups)
        # [ng, np / ng, 1, hn] and [ng, 1, t, hn]: a sum over entries, then one over positions.
        grouped = queries.float().unflatten(1, (self._num_groups, -1))[0].unsqueeze(2)
        scale = size**-0.5 if scale is None else scale
        scores = (grouped * all_keys.unsqueeze(1)).sum(dim=-1) * scale
        weights = torch.softmax(scores, dim=-1).unsqueeze(-1)
        attended = (weights * all_values.unsqueeze(1)).sum(dim=2)
        return attended.reshape(1, -1).to(qkv.dtype)

    def _turn(self, heads: Tensor) -> Tensor:
        """[1, heads, hn], pairs of neighbours turned like complex numbers."""
        assert self._turns is not None
        even, odd = heads.float().unflatten(2, (-1, 2)).unbind(-1)
        real, imaginary = self._turns.unbind(-1)
        turned = torch.stack((even * real - odd * imaginary, even * imaginary + odd * real), dim=-1)
        return turned.flatten(2).to(heads.dtype)
