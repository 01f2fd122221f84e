"""Layers compiled for steps of decoding.

Half of what PyTorch does around the products of a small model is calling kernels. Its compiler
makes a layer a few loops instead. With one row or two each is over a whole weight matrix in the
plain layout, which takes the time that the memory needs; with several the products remain those
with packed weights, and what lies between two of them is a loop. A few layers are compiled as one
function of their weights, which serves all.

Shapes: r rows, each a position of some sequence; h hidden size; ng key-value heads, hn head size.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType

import torch
from torch import Tensor

from megatron.early_exit.checkpoint.architecture import Architecture
from megatron.early_exit.inference.model.kv_cache import KVCache
from megatron.early_exit.inference.model.layers import Attention, Mlp
from megatron.early_exit.inference.model.linear import MOST_LOOP_ROWS, Function
from megatron.early_exit.inference.model.passes import Pass
from megatron.early_exit.inference.model.quantized import is_quantized
from megatron.early_exit.inference.model.rotary import RotaryTable
from megatron.early_exit.inference.model.rows_pass import Places, RowsPass
from megatron.early_exit.inference.model.traced_attention import TracedPlaces
from megatron.early_exit.patches.messages import silence_cuda_remark

SHORTEST = 2
"""A length of 1 would make the compiler take lengths for constants."""

_MOST_ROWS = 64
"""Beyond, the plain layers' attention is the faster one."""

_TYPICAL_ROWS, _TYPICAL_POSITIONS = 8, 128
"""Of the first calls: the compiler decides by them which loops the threads divide."""

_TOGETHER = (5, 4)
"""Layers that are compiled as one: each call takes some microseconds, each layer a second. The
first of these that divides the number of layers leaves no rest to compile besides."""

_VECTOR_BITS = {"AVX2": 256, "AVX512": 512}

_Group = Callable[..., Tensor]
"""Takes a hidden state through some layers."""


@dataclass(frozen=True, slots=True)
class _Kind:
    """What a compiled function assumes of the tensors that it is called with.

    Attributes:
        size: number of layers.
        num_rows: how many rows there are; 0 where that stays open.
        has_slots: the caches are of several sequences.
        shape: of each cache.
        stride: of each cache.
    """

    size: int
    num_rows: int
    has_slots: bool
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class LayerCompiler:
    """Compiles layers of a model, when they are first run.

    Args:
        architecture: shape of the model.
        rotary: the rotary table, if the model has rotary embeddings.
        device: of the weights.
        reduce: see `TensorParallel.traceable_reduce`; None where layers are whole.

    Attributes:
        positions: [most positions], 0, 1, 2, ...
    """

    def __init__(
        self,
        architecture: Architecture,
        rotary: RotaryTable | None,
        device: torch.device,
        reduce: Function | None = None,
    ) -> None:
        silence_cuda_remark()
        self._architecture = architecture
        self._turns = None if rotary is None else rotary.real_turns
        self.positions = torch.arange(architecture.max_position_embeddings, device=device)

        def group(
            layers: Sequence[Mapping[str, Tensor]],
            caches: Sequence[Tensor],
            hidden: Tensor,
            places: Places,
            turns: Tensor | None,
        ) -> Tensor:
            if not torch.compiler.is_compiling():
                raise RuntimeError("the compiler of PyTorch is turned off in this process")
            for weights, cache in zip(layers, caches, strict=True):
                this = RowsPass(cache, architecture, places, turns)
                attention = Attention(architecture, weights, "self_attention.", 0, reduce)
                hidden = Mlp(architecture, weights, "mlp.", reduce)(attention(hidden, this))
            return hidden

        # Weights are arguments, so it does not matter of which layers.
        self._group = group
        self._unguarded: dict[_Kind, _Group] = {}

    def rows_pass(self, cache: Tensor, places: Places) -> RowsPass:
        """What an attention of the model needs that runs over the same rows, but is not compiled;
        its `cache` is [slots, places, 2 ng, hn], for `places` see `RowsPass`."""
        return RowsPass(cache, self._architecture, places, self._turns)

    def run(
        self,
        layers: Sequence[Mapping[str, Tensor]],
        caches: Sequence[Tensor],
        hidden: Tensor,
        places: Places,
        has_fixed_rows: bool = False,
    ) -> Tensor:
        """Take rows through layers.

        Args:
            layers: the tensors of each, see `CompiledLayers`.
            caches: of each layer [slots, places, 2 ng, hn]; of the only row's sequence alone where
                `places` have no slots.
            hidden: [r, h], the residual stream; contiguous, as are all tensors of `places`.
            places: of the rows.
            has_fixed_rows: the layers are compiled for just this number of rows, as they always are
                for one row.
        """
        size = next((one for one in _TOGETHER if len(layers) % one == 0), _TOGETHER[-1])
        for first in range(0, len(layers), size):
            group = slice(first, first + size)
            function = self._function(len(layers[group]), caches[0], hidden, places, has_fixed_rows)
            hidden = function(layers[group], caches[group], hidden, places, self._turns)
        return hidden

    def _function(
        self, size: int, cache: Tensor, hidden: Tensor, places: Places, has_fixed_rows: bool
    ) -> _Group:
        """The function for a number of layers.

        PyTorch would look at every tensor in every call, whether it is what the function was
        compiled for: for a small model that takes as long as its layers. `_Kind` says all that may
        differ but for the numbers of rows and positions, the only ones that may stay open, so
        nothing is looked at.
        """
        has_slots = places.slots is not None
        num_rows = len(hidden) if has_fixed_rows or len(hidden) == 1 else 0
        kind = _Kind(size, num_rows, has_slots, cache.shape, cache.stride())
        function = self._unguarded.get(kind)
        if function is None:
            _leave_open(hidden, places, has_fixed_rows=num_rows > 0)
            function = torch.compile(
                self._new_group(f"group_{len(self._unguarded)}"),
                fullgraph=True,
                # Packed weights have no strides that a call could look at.
                options={
                    "guard_filter_fn": torch.compiler.skip_all_guards_unsafe,
                    "size_asserts": False,
                    **_vector_options(),
                },
            )
            self._unguarded[kind] = function
        return function

    def _new_group(self, name: str) -> _Group:
        """The group of layers as a function that has not been compiled yet. PyTorch goes by the
        code object, and refuses to compile one ever again that it has compiled often."""
        group = self._group
        code = group.__code__.replace(co_name=f"{name}_of_{id(self)}")
        return FunctionType(code, globals(), "group", None, group.__closure__)


def _vector_options() -> dict[str, int]:
    """How wide vectors are on this CPU, in bits.

    PyTorch finds it out by itself, but does not keep code of different widths apart: in a folder of
    compiled code that machines of two kinds share, one took the loops of the other, and computed
    wrong numbers without a word (2.14). Options it does keep apart.
    """
    width = _VECTOR_BITS.get(torch.backends.cpu.get_cpu_capability())
    return {} if width is None else {"cpp.simdlen": width}


def _leave_open(hidden: Tensor, places: Places, has_fixed_rows: bool) -> None:
    """The number of positions is not what a function is compiled for; that of rows may be."""
    rows = [] if has_fixed_rows else [hidden]
    for tensor in rows + places.open_sizes(has_fixed_rows):
        torch._dynamo.mark_dynamic(tensor, 0)


class CompiledLayers:
    """Consecutive whole layers of a segment on a CPU.

    Args:
        compiler: of the model's layers.
        layers: the tensors of each, named like those of layer N behind `decoder.layers.N.`; those
            of the attention as `arrange` gives them. Matrices are [outputs, inputs], or where they
            are in 8 bits [outputs, 1], see `pack_quantized`; biases and gains are [entries].
        packed: the same, packed for several rows; the shapes stay.
    """

    def __init__(
        self,
        compiler: LayerCompiler,
        layers: Sequence[Mapping[str, Tensor]],
        packed: Sequence[Mapping[str, Tensor]],
    ) -> None:
        self._compiler, self._layers, self._packed = compiler, layers, packed
        in_8_bits = any(is_quantized(tensor) for layer in layers for tensor in layer.values())
        self._most_plain = 1 if in_8_bits else MOST_LOOP_ROWS

    def warm_up(self, cache: KVCache, hidden_size: int) -> None:
        """Compile everything that passes over a cache may need: for a single row, for two, and for
        several."""
        end = min(cache.capacity, _TYPICAL_POSITIONS)
        if end < SHORTEST:
            return
        # In a short cache some rows are the same.
        positions = torch.arange(end - _TYPICAL_ROWS, end) % end
        hidden = cache.data.new_zeros(len(positions), hidden_size)
        self._run_one(hidden[:1], cache, 0, end)
        slots = torch.zeros_like(positions)
        for count in sorted({self._most_plain, _TYPICAL_ROWS} - {1}):
            self._run_several(hidden[:count], cache, slots[:count], positions[:count], end)

    def serves(self, this: Pass) -> bool:
        """Whether a pass is over few positions, and not only over first ones."""
        return this.count <= _MOST_ROWS and any(end >= SHORTEST for _, _, end in this.spans)

    def __call__(self, hidden: Tensor, this: Pass) -> Tensor:
        """Residual stream [r, h] in front of the layers -> behind them, the rows that ask."""
        hidden = hidden.contiguous()
        slot, start, end = this.spans[0]
        if this.count == 1:
            return self._run_one(hidden, this.cache, slot, end)
        if this.index is None:
            positions = self._compiler.positions[start:end]
            slots = torch.full_like(positions, slot)
        else:
            slots, positions = this.index
            end = max([span.end for span in this.spans])
        hidden = self._run_several(hidden, this.cache, slots, positions, end)
        return hidden if this.results is None else hidden[this.results]

    # The attention of a layer that another segment ends is the last one of a cache.

    def _run_one(self, hidden: Tensor, cache: KVCache, slot: int, end: int) -> Tensor:
        caches = cache.by_slot[slot][: len(self._layers)]
        seen = self._compiler.positions[:end]
        places = TracedPlaces(None, seen[end - 1 :], seen)
        return self._compiler.run(self._layers, caches, hidden, places)

    def _run_several(
        self, hidden: Tensor, cache: KVCache, slots: Tensor, positions: Tensor, end: int
    ) -> Tensor:
        caches = cache.by_attention[: len(self._layers)]
        places = TracedPlaces(slots, positions, self._compiler.positions[:end])
        is_plain = len(hidden) <= self._most_plain
        layers = self._layers if is_plain else self._packed
        return self._compiler.run(layers, caches, hidden, places, has_fixed_rows=is_plain)
