"""Layers compiled for steps in which every sequence has a single position.

Half of what PyTorch does around the products of a small model is calling kernels. Its compiler
makes a layer a few loops instead: with one row each is over a whole weight matrix in the plain
layout, with all that lies between the products inside them. A few layers are compiled as one
function of their weights, which serves all.

Shapes: r rows, each the position of a sequence of its own; h hidden size, np query heads, ng
key-value heads, hn head size, t positions that are looked at.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType

import torch
from torch import Tensor

from megatron.early_exit.checkpoint.architecture import Architecture
from megatron.early_exit.inference.compute.layers import Attention, Mlp
from megatron.early_exit.inference.compute.passes import Pass
from megatron.early_exit.inference.compute.rotary import RotaryTable

SHORTEST = 2
"""A length of 1 would make the compiler take lengths for constants."""

_MOST_TOGETHER = 4
"""Layers that are compiled as one: each call takes some microseconds, each layer a second."""

_Group = Callable[..., Tensor]
"""Takes a hidden state through some layers."""


@dataclass(frozen=True, slots=True)
class _Kind:
    """What layers that are compiled for one row take for granted, besides the model.

    Attributes:
        size: number of layers.
        shape: of each cache.
        stride: of each cache.
    """

    size: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class LayerCompiler:
    """Compiles layers of a model, when they are first run.

    Args:
        architecture: shape of the model.
        rotary: the rotary table, if the model has rotary embeddings.
        device: of the weights.

    Attributes:
        positions: [most positions], 0, 1, 2, ...
    """

    def __init__(
        self, architecture: Architecture, rotary: RotaryTable | None, device: torch.device
    ) -> None:
        self._turns = None if rotary is None else rotary.real_turns
        self.positions = torch.arange(architecture.max_position_embeddings, device=device)

        def group(
            layers: Sequence[Mapping[str, Tensor]],
            caches: Sequence[Tensor],
            hidden: Tensor,
            rows: Rows,
        ) -> Tensor:
            for weights, cache in zip(layers, caches, strict=True):
                this = _RowsPass(cache, architecture, *rows)
                attention = Attention(architecture, weights, "self_attention.", 0)
                hidden = Mlp(architecture, weights, "mlp.")(attention(hidden, this))
            return hidden

        # Weights are arguments, so it does not matter of which layers.
        self._group = group
        self._for_kind: dict[_Kind, _Group] = {}
        self._for_rows = torch.compile(self._new_group("rows"), fullgraph=True)

    def run(
        self,
        layers: Sequence[Mapping[str, Tensor]],
        caches: Sequence[Tensor],
        hidden: Tensor,
        slots: Tensor | None,
        positions: Tensor,
        end: int,
    ) -> Tensor:
        """Take rows through layers.

        Args:
            layers: the tensors of each, see `CompiledLayers`.
            caches: of each layer [slots, positions, 2 ng, hn].
            hidden: [r, h], the residual stream.
            slots: [r], of the rows; None where the caches are of the only row's sequence alone.
            positions: [r], of the rows.
            end: a position behind that of every row.
        """
        seen = self.positions[:end]
        rows = (slots, positions, seen, self._turns)
        for first in range(0, len(layers), _MOST_TOGETHER):
            group = slice(first, first + _MOST_TOGETHER)
            if slots is None:
                size = len(layers[group])
                function = self._for_one_row(_Kind(size, caches[0].shape, caches[0].stride()), seen)
            else:
                function = self._for_rows
                changing = (seen, hidden, slots, positions) if len(hidden) > 1 else (seen,)
                for tensor in changing:
                    torch._dynamo.mark_dynamic(tensor, 0)
            hidden = function(layers[group], caches[group], hidden, rows)
        return hidden

    def _for_one_row(self, kind: _Kind, seen: Tensor) -> _Group:
        """The function for passes over one row of one sequence.

        PyTorch would look at every tensor in every call, whether it is what the function was
        compiled for: for a small model that takes as long as its layers. `_Kind` says all that may
        differ but for the length of `seen`, the only one that stays open, so nothing is looked at.
        """
        function = self._for_kind.get(kind)
        if function is None:
            function = torch.compile(
                self._new_group(f"row_{len(self._for_kind)}"),
                fullgraph=True,
                options={"guard_filter_fn": torch.compiler.skip_all_guards_unsafe},
            )
            self._for_kind[kind] = function
            torch._dynamo.mark_dynamic(seen, 0)
        return function

    def _new_group(self, name: str) -> _Group:
        """The group of layers as a function that has not been compiled yet. PyTorch goes by the
        code object, and refuses to compile one ever again that it has compiled often."""
        group = self._group
        code = group.__code__.replace(co_name=f"{name}_of_{id(self)}")
        return FunctionType(code, globals(), "group", None, group.__closure__)


Rows = tuple[Tensor | None, Tensor, Tensor, Tensor | None]
"""Slots [r] or None, positions [r], all positions [t] that are looked at, and the rotary turns."""


class CompiledLayers:
    """Consecutive whole layers of a segment, for passes over one row.

    Args:
        compiler: of the model's layers.
        layers: the tensors of each, named like those of layer N behind `decoder.layers.N.`; those
            of the attention as `arrange` gives them.
    """

    def __init__(self, compiler: LayerCompiler, layers: Sequence[Mapping[str, Tensor]]) -> None:
        self._compiler, self._layers = compiler, layers

    def serves(self, this: Pass) -> bool:
        """Whether a pass is over a single position, and not the first."""
        (_, start, end), *others = this.spans
        return not others and end == start + 1 and end >= SHORTEST

    def __call__(self, hidden: Tensor, this: Pass) -> Tensor:
        """Residual stream [1, h] in front of the layers -> behind them."""
        slot, start, end = this.spans[0]
        # The attention of a layer that another segment ends comes last.
        caches = this.cache.by_slot[slot][: len(self._layers)]
        position = self._compiler.positions[start:end]
        return self._compiler.run(self._layers, caches, hidden, None, position, end)


class _RowsPass:
    """What `Pass` is, in operations that a compiler sees through.

    Args:
        cache: [slots, positions, 2 ng, hn], of the attention.
        architecture: shape of the model.
        slots: [r], of the rows; None where there is one row and one slot.
        positions: [r], of the rows.
        seen: [t], the positions that are looked at, up to the last row's or further.
        turns: see `RotaryTable.real_turns`.
    """

    results: Tensor | None = None

    def __init__(
        self,
        cache: Tensor,
        architecture: Architecture,
        slots: Tensor | None,
        positions: Tensor,
        seen: Tensor,
        turns: Tensor | None,
    ) -> None:
        self._cache, self._seen = cache, seen
        self._slots, self._positions = slots, positions
        self._turns = None if turns is None else turns[positions]
        self._num_heads = architecture.num_attention_heads
        self._num_groups = architecture.num_query_groups

    def attend(self, attention: int, qkv: Tensor, scale: float | None) -> Tensor:
        """See `Pass`."""
        size, groups = self._cache.shape[-1], self._num_groups
        heads = qkv.view(qkv.shape[0], -1, size)
        turned, values = heads.split((self._num_heads + groups, groups), dim=1)
        if self._turns is not None:
            turned = self._turn(turned, self._turns)
        queries, keys = turned.split((self._num_heads, groups), dim=1)
        window = self._keep(torch.cat((keys, values), dim=1))
        all_keys, all_values = window.transpose(1, 2).float().split(groups, dim=1)
        # [r, ng, np / ng, 1, hn] and [r, ng, 1, t, hn]: a sum over entries, one over positions.
        grouped = queries.float().unflatten(1, (groups, -1)).unsqueeze(3)
        scale = size**-0.5 if scale is None else scale
        scores = (grouped * all_keys.unsqueeze(2)).sum(dim=-1) * scale
        unseen = self._seen > self._positions[:, None]
        scores = scores.masked_fill(unseen[:, None, None], -torch.inf)
        weights = torch.softmax(scores, dim=-1).unsqueeze(-1)
        attended = (weights * all_values.unsqueeze(2)).sum(dim=3)
        return attended.flatten(1).to(qkv.dtype)

    def _keep(self, new: Tensor) -> Tensor:
        """Put keys and values [r, 2 ng, hn] into the cache; returns what they attend to,
        [r, t, 2 ng, hn]."""
        if self._slots is None:
            self._cache[:, self._positions] = new
            return self._cache[:, : self._seen.shape[0]]
        self._cache[self._slots, self._positions] = new
        return self._cache[self._slots[:, None], self._seen]

    @staticmethod
    def _turn(heads: Tensor, turns: Tensor) -> Tensor:
        """[r, heads, hn], pairs of neighbours turned like complex numbers."""
        even, odd = heads.float().unflatten(2, (-1, 2)).unbind(-1)
        real, imaginary = turns.unbind(-1)
        turned = torch.stack((even * real - odd * imaginary, even * imaginary + odd * real), dim=-1)
        return turned.flatten(2).to(heads.dtype)
