"""A model cut at its exits.

The backbone is a row of half layers: attention, MLP, attention, MLP, ... An exit cuts the row
behind the layer that it follows, or, where exits have an MLP of their own, between the attention
and the MLP of that layer. What lies between two cuts is a segment. Every position runs through the
segments in order, but not in one go: the deeper ones may lag behind.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, device, dtype
from torch.nn import functional

from megatron.early_exit.checkpoint.architecture import Architecture
from megatron.early_exit.config import EarlyExitConfig
from megatron.early_exit.inference.compute.compiled import CompiledLayers, LayerCompiler
from megatron.early_exit.inference.compute.graphs import GraphedLayers
from megatron.early_exit.inference.compute.layers import Attention, Mlp, Step, arrange
from megatron.early_exit.inference.compute.linear import Function, make_linear
from megatron.early_exit.inference.compute.norms import make_norm
from megatron.early_exit.inference.compute.packed import pack
from megatron.early_exit.inference.compute.passes import Pass
from megatron.early_exit.inference.compute.rotary import RotaryTable
from megatron.early_exit.inference.compute.tensor_parallel import TensorParallel


@dataclass(frozen=True, slots=True)
class Block:
    """The transformer layer that an exit may have; it attends over a cache of its own."""

    attention: Attention
    mlp: Mlp


@dataclass(frozen=True, slots=True)
class Head:
    """What turns the residual stream at one place into logits: [mlp] [block] [norm] projection."""

    mlp: Mlp | None
    block: Block | None
    norm: Function | None
    projection: Function
    """[n, h] -> [n, v], without padding of the vocabulary; or this rank's part of it."""
    gather: Function | None = None
    """Brings together the logits of ranks that divide the projection."""
    num_others: int = 0
    """Tokens at the end of the vocabulary that it never answers with."""

    def logits(self, hidden: Tensor, block_pass: Pass | None = None) -> Tensor:
        """Logits [n, v] from the residual stream [r, h], see `features`."""
        return self.project(self.features(hidden, block_pass))

    def features(self, hidden: Tensor, block_pass: Pass | None = None) -> Tensor:
        """What is projected, [n, h], from the residual stream [r, h].

        With a block `hidden` holds every position that the block has not seen yet, `block_pass`
        describes them, and n is the number of results that it asks for; else n is r.
        """
        if self.mlp is not None:
            hidden = self.mlp(hidden)
        if self.block is not None:
            assert block_pass is not None
            hidden = self.block.mlp(self.block.attention(hidden, block_pass))
        return hidden if self.norm is None else self.norm(hidden)

    def project(self, features: Tensor) -> Tensor:
        """Logits [n, v]."""
        logits = self.projection(features)
        if self.gather is not None:
            logits = self.gather(logits)
        if self.num_others:
            logits = functional.pad(logits, (0, self.num_others), value=-torch.inf)
        return logits


@dataclass(frozen=True, slots=True)
class ModelExit:
    """The exit behind one segment."""

    position: int
    """Number of backbone layers run before it."""
    head: Head


@dataclass(frozen=True, slots=True)
class Segment:
    """The half layers between two cuts."""

    steps: tuple[Step, ...]
    attentions: range
    """Their numbers, which are those of the layers."""
    compiled: CompiledLayers | GraphedLayers | None = None
    """Its whole layers, for the passes that they serve."""
    compiled_steps: tuple[Step | CompiledLayers | GraphedLayers, ...] = ()
    """The same with those, and the half layers that there may be at the ends."""

    def __call__(self, hidden: Tensor, this: Pass) -> Tensor:
        """Residual stream [r, h] at the start of the segment -> at its end."""
        is_compiled = self.compiled is not None and self.compiled.serves(this)
        for step in self.compiled_steps if is_compiled else self.steps:
            hidden = step(hidden, this)
        return hidden


class SegmentedModel:
    """Weights and structure of a model; holds no state of any sequence.

    Args:
        architecture: shape of the backbone, or of this rank's part.
        early_exit: its exits.
        weights: tensors by name, see `megatron.early_exit.checkpoint.weights`.
        tensor_parallel: the ranks that share the model; None where it is whole.
        compile_rows: compile the layers for steps of decoding; on a CPU that takes the memory of
            the weights again.

    Attributes:
        segments: n + 1 segments of a model with n exits; the last ends at the final head.
        exits: the n exits, `exits[i]` behind `segments[i]`.
        exit_vocab_size: tokens that they answer with.
    """

    def __init__(
        self,
        architecture: Architecture,
        early_exit: EarlyExitConfig,
        weights: Mapping[str, Tensor],
        tensor_parallel: TensorParallel | None = None,
        compile_rows: bool = False,
    ) -> None:
        self.architecture = architecture
        self._tensor_parallel = tensor_parallel
        self._reduce = None if tensor_parallel is None else tensor_parallel.reduce
        self.word_embeddings = weights["embedding.word_embeddings.weight"]
        self.position_embeddings = weights.get("embedding.position_embeddings.weight")
        self.rotary: RotaryTable | None = None
        if architecture.position_embedding_type == "rope":
            self.rotary = RotaryTable(architecture, self.device)
        self._compiler = (
            LayerCompiler(architecture, self.rotary, self.device) if compile_rows else None
        )
        self._halves: list[Step] = []
        self._layers: list[Mapping[str, Tensor]] = []
        self._packed_layers: list[Mapping[str, Tensor]] = []
        for layer in range(architecture.num_layers):
            self._add_layer(layer, weights)
        behind = -1 if early_exit.use_exit_mlp else 0
        exits = (2 * position + behind for position in early_exit.positions)
        self._cuts = (0, *exits, len(self._halves))
        self._stretches: dict[tuple[int, int], Segment] = {}
        self.segments = tuple(self.stretch(i, i) for i in range(len(self._cuts) - 1))
        self.exit_vocab_size = early_exit.exit_vocab_size or architecture.vocab_size
        # One tensor for all exits, so that they share a product.
        self._answers = self.word_embeddings[: early_exit.exit_vocab_size]
        # By the weights: heads that are tied share one product, which on a CPU has its own copy.
        self._projections: dict[int, Function] = {}
        self.exits = tuple(
            ModelExit(position, self._exit_head(position, early_exit, weights))
            for position in early_exit.positions
        )
        output = weights.get("output_layer.weight", self.word_embeddings)
        final_norm = make_norm(architecture, weights, "decoder.final_layernorm.")
        self.final_head = self._head(None, None, final_norm, output)

    @property
    def dtype(self) -> dtype:
        """Of weights, caches and hidden states."""
        return self.word_embeddings.dtype

    @property
    def device(self) -> device:
        """Where the weights are."""
        return self.word_embeddings.device

    def stretch(self, first: int, last: int) -> Segment:
        """The segments from `first` to `last` as one."""
        found = self._stretches.get((first, last))
        if found is None:
            found = self._segment(self._cuts[first], self._cuts[last + 1])
            self._stretches[first, last] = found
        return found

    def _add_layer(self, layer: int, weights: Mapping[str, Tensor]) -> None:
        prefix = f"decoder.layers.{layer}."
        own = {name: tensor for name, tensor in weights.items() if name.startswith(prefix)}
        own |= self._arrange(own, f"{prefix}self_attention.")
        packed = {n: pack(t) if t.dim() == 2 else t for n, t in own.items()}
        self._halves.append(self._attention(packed, f"{prefix}self_attention.", layer))
        self._halves.append(self._mlp(packed, f"{prefix}mlp."))
        if self._compiler is not None:
            # Weights that are plain, too, for a single row.
            self._layers.append({n.removeprefix(prefix): t for n, t in own.items()})
            self._packed_layers.append({n.removeprefix(prefix): t for n, t in packed.items()})

    def _segment(self, start: int, end: int) -> Segment:
        """The half layers from `start` to `end`."""
        steps = tuple(self._halves[start:end])
        attentions = range(-(-start // 2), -(-end // 2))
        whole = slice(attentions.start, end // 2)
        layers, packed = self._layers[whole], self._packed_layers[whole]
        if self._compiler is None or not layers:
            return Segment(steps, attentions)
        compiled: CompiledLayers | GraphedLayers
        if self.device.type == "cuda":
            compiled = GraphedLayers(self._compiler, layers)
        else:
            compiled = CompiledLayers(self._compiler, layers, packed)
        around = (*steps[: start % 2], compiled, *steps[len(steps) - end % 2 :])
        return Segment(steps, attentions, compiled, around)

    def _arrange(self, weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
        order = None if self.rotary is None else self.rotary.order
        return arrange(self.architecture, weights, prefix, order)

    def _attention(self, weights: Mapping[str, Tensor], prefix: str, number: int) -> Attention:
        return Attention(self.architecture, weights, prefix, number, self._reduce)

    def _mlp(self, weights: Mapping[str, Tensor], prefix: str) -> Mlp:
        return Mlp(self.architecture, weights, prefix, self._reduce)

    def _head(
        self, mlp: Mlp | None, block: Block | None, norm: Function | None, projection: Tensor
    ) -> Head:
        shared = self._tensor_parallel
        gather = None
        if shared is not None:
            gather = partial(shared.gather, vocab_size=len(projection))
        product = self._projections.get(id(projection))
        if product is None:
            product = make_linear(projection if shared is None else shared.rows(projection))
            self._projections[id(projection)] = product
        others = self.architecture.vocab_size - len(projection)
        return Head(mlp, block, norm, product, gather, others)

    def _exit_head(
        self, position: int, early_exit: EarlyExitConfig, weights: Mapping[str, Tensor]
    ) -> Head:
        prefix = f"exits.{position}."
        mlp = block = norm = None
        if early_exit.use_exit_mlp:
            mlp = self._mlp(weights, f"{prefix}mlp.")
        if early_exit.use_exit_block:
            name = f"{prefix}block.self_attention."
            attention = self._attention(self._arrange(weights, name), name, 0)
            block = Block(attention, self._mlp(weights, f"{prefix}block.mlp."))
        if early_exit.use_exit_norm:
            norm = make_norm(self.architecture, weights, f"{prefix}norm.")
        projection = weights.get(f"{prefix}projection.weight")
        if projection is None:
            whole = early_exit.exit_vocab_size is None
            projection = self.word_embeddings if whole else self._answers
        return self._head(mlp, block, norm, projection)
