"""A model cut at its exits.

The backbone is a row of half layers: attention, MLP, attention, MLP, ... An exit cuts the row
behind the layer that it follows, or, where exits have an MLP of their own, between the attention
and the MLP of that layer. What lies between two cuts is a segment. Every position runs through the
segments in order, but not in one go: the deeper ones may lag behind.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor, device, dtype

from megatron.early_exit.checkpoint.architecture import Architecture
from megatron.early_exit.checkpoint.quantization import SCALE_ENDING
from megatron.early_exit.config import EarlyExitConfig
from megatron.early_exit.inference.model.compiled import CompiledLayers, LayerCompiler
from megatron.early_exit.inference.model.embedding import Embedding
from megatron.early_exit.inference.model.exact_products import FastestLibrary
from megatron.early_exit.inference.model.gates import Gates
from megatron.early_exit.inference.model.graphs import GraphedLayers
from megatron.early_exit.inference.model.heads import BranchPart, Head, ModelExit
from megatron.early_exit.inference.model.held_states import HeldStates
from megatron.early_exit.inference.model.layers import Attention, Mlp, arrange
from megatron.early_exit.inference.model.linear import Function, make_linear
from megatron.early_exit.inference.model.mtp import MtpLayer
from megatron.early_exit.inference.model.norms import make_norm
from megatron.early_exit.inference.model.quantized import (
    TIED_PROJECTION,
    is_quantized,
    pack_quantized,
    packed_tensors,
)
from megatron.early_exit.inference.model.recorder import CudaGraphRecorder, Recorder
from megatron.early_exit.inference.model.rotary import RotaryTable
from megatron.early_exit.inference.model.segment import Segment
from megatron.early_exit.inference.model.tensor_parallel import TensorParallel


@dataclass(frozen=True, slots=True)
class _Layer:
    """A layer, the tensors of its attention, and all where it is to be compiled, see
    `CompiledLayers`."""

    halves: tuple[Attention, Mlp]
    attention: Mapping[str, Tensor]
    plain: Mapping[str, Tensor] = field(default_factory=dict)
    packed: Mapping[str, Tensor] = field(default_factory=dict)


class SegmentedModel:
    """Weights and structure of a model; holds no state of any sequence.

    Args:
        architecture: shape of the backbone, or of this rank's part.
        early_exit: its exits.
        weights: tensors by name, see `megatron.early_exit.checkpoint.weights`; some of them may be
            in 8 bits, see `megatron.early_exit.inference.weight_dtype`.
        tensor_parallel: the ranks that share the model; None where it is whole.
        compile_rows: compile the layers for steps of decoding; on a CPU that takes the memory of
            the weights again.
        begins_with_tokens: it is no later stage of a pipeline, whose input is a residual stream.
        draft_vocab_size: the multi-token-prediction module drafts the first so many tokens only;
            None is those that exits answer with, or all.

    Attributes:
        embedding: what the residual stream begins with.
        begins_with_tokens: see the arguments.
        recorder: captures steps on a GPU; None where nothing does.
        segments: n + 1 segments of a model with n exits; the last ends at the final head.
        exits: the n exits, `exits[i]` behind `segments[i]`.
        exit_vocab_size: tokens that they answer with.
        exit_measure: what their confidence is where a request does not say it.
        draft_vocab_size: tokens that the multi-token-prediction module drafts.
        gates: of the exits; None where they have none.
        mtp: the layer of each depth of the multi-token-prediction module, if the model has one.
        mtp_head: what projects the hidden states of its depths.
    """

    def __init__(
        self,
        architecture: Architecture,
        early_exit: EarlyExitConfig,
        weights: Mapping[str, Tensor],
        tensor_parallel: TensorParallel | None = None,
        compile_rows: bool = False,
        begins_with_tokens: bool = True,
        draft_vocab_size: int | None = None,
    ) -> None:
        self.architecture = architecture
        self._tensor_parallel = tensor_parallel
        self._fastest = FastestLibrary()
        self.word_embeddings = weights["embedding.word_embeddings.weight"]
        position_embeddings = weights.get("embedding.position_embeddings.weight")
        self.embedding = Embedding(self.word_embeddings, position_embeddings)
        self.begins_with_tokens = begins_with_tokens
        self.rotary: RotaryTable | None = None
        if architecture.position_embedding_type == "rope":
            self.rotary = RotaryTable(architecture, self.device)
        self.recorder = self._new_recorder() if compile_rows else None
        self._compiler = self._new_compiler() if compile_rows else None
        self._reduce: Function | None = None
        if tensor_parallel is not None:
            # What is captured runs the operators that are captured in compiled layers.
            is_captured = self.recorder is not None
            self._reduce = (
                tensor_parallel.traceable_reduce if is_captured else tensor_parallel.reduce
            )
        self._layers = [
            self._layer(weights, f"decoder.layers.{number}.", number)
            for number in range(architecture.num_layers)
        ]
        behind = -1 if early_exit.replaces_mlp else 0
        exits = (2 * position + behind for position in early_exit.positions)
        self._cuts = (0, *exits, 2 * architecture.num_layers)
        self._fused: dict[tuple[int, int], Segment] = {}
        self._held_states: dict[int, HeldStates] = {}
        self.segments = tuple(self.fused(i, i) for i in range(len(self._cuts) - 1))
        self.exit_vocab_size = early_exit.exit_vocab_size or architecture.vocab_size
        self.exit_measure = early_exit.exit_measure
        self.gates = Gates.of(early_exit, weights, architecture.layernorm_epsilon)
        # By the weights: heads that are tied share one product, which on a CPU has its own copy.
        self._projections: dict[tuple[str, int | None], Function] = {}
        final_norm = make_norm(architecture, weights, "decoder.final_layernorm.")
        output = "output_layer.weight" if "output_layer.weight" in weights else TIED_PROJECTION
        self.final_head = self._head((final_norm,), weights, output)
        self.mtp = self._mtp_layers(weights)
        # A module that was tuned beside exits has learned of their tokens alone.
        size = (draft_vocab_size or early_exit.exit_vocab_size) if self.mtp else None
        self.draft_vocab_size = size or architecture.vocab_size
        self.mtp_head = self._head((), weights, output, size)
        self.exits = tuple(
            ModelExit(position, self._exit_head(position, early_exit, weights))
            for position in early_exit.positions
        )

    @property
    def dtype(self) -> dtype:
        """The format of weights, caches and hidden states."""
        return self.word_embeddings.dtype

    @property
    def device(self) -> device:
        """Where the weights are."""
        return self.word_embeddings.device

    @property
    def has_loops(self) -> bool:
        """Whether layers are compiled for a CPU, as loops whose times depend on how many rows there
        are."""
        return self._compiler is not None and self.recorder is None

    def _new_compiler(self) -> LayerCompiler:
        shared = self._tensor_parallel
        reduce = None if shared is None else shared.traceable_reduce
        return LayerCompiler(self.architecture, self.rotary, self.device, reduce)

    def _new_recorder(self) -> Recorder | None:
        """What captures steps on the model's device; None where nothing does."""
        return CudaGraphRecorder(self.device) if self.device.type == "cuda" else None

    def fused(self, first: int, last: int) -> Segment:
        """The segments from `first` to `last` as one."""
        found = self._fused.get((first, last))
        if found is None:
            found = self._segment(self._cuts[first], self._cuts[last + 1])
            self._fused[first, last] = found
        return found

    def held_states(self, index: int) -> HeldStates | None:
        """What makes keys and values for a segment of the states of held positions; None where it
        has no attention. It has a copy of the weights that are needed, made in the first call."""
        attentions = self.segments[index].attentions
        if not attentions:
            return None
        found = self._held_states.get(index)
        if found is None:
            layers = self._layers[attentions.start : attentions.stop]
            own = [layer.attention for layer in layers]
            found = HeldStates(self.architecture, own, self.rotary)
            self._held_states[index] = found
        return found

    def _layer(self, weights: Mapping[str, Tensor], prefix: str, number: int) -> _Layer:
        """The layer with some prefix, and its number among those that share a cache."""
        own = {name: tensor for name, tensor in weights.items() if name.startswith(prefix)}
        order = None if self.rotary is None else self.rotary.order
        own |= arrange(self.architecture, own, f"{prefix}self_attention.", order)
        packed = packed_tensors(own, self._fastest)
        halves = (
            Attention(self.architecture, packed, f"{prefix}self_attention.", number, self._reduce),
            Mlp(self.architecture, packed, f"{prefix}mlp.", self._reduce),
        )
        start = f"{prefix}self_attention."
        attention = {n.removeprefix(start): t for n, t in packed.items() if n.startswith(start)}
        if self._compiler is None:
            return _Layer(halves, attention)
        # Weights that are plain, too, for a single row; those in 8 bits are packed for all.
        plain = {name: t if is_quantized(t) else own[name] for name, t in packed.items()}
        plain, packed = (
            {n.removeprefix(prefix): t for n, t in tensors.items()} for tensors in (plain, packed)
        )
        return _Layer(halves, attention, plain, packed)

    def _segment(self, start: int, end: int) -> Segment:
        """The half layers from `start` to `end`."""
        halves = [half for layer in self._layers for half in layer.halves]
        steps = tuple(halves[start:end])
        attentions = range(-(-start // 2), -(-end // 2))
        whole = self._layers[attentions.start : end // 2]
        if self._compiler is not None and self.recorder is not None:
            graphed = GraphedLayers(
                self._compiler,
                [layer.plain for layer in whole],
                self.recorder,
                self.embedding if start == 0 and self.begins_with_tokens else None,
                self._layers[start // 2].halves[1] if start % 2 else None,
                self._layers[end // 2].halves[0] if end % 2 else None,
            )
            return Segment(steps, attentions, graphed, (graphed,))
        if self._compiler is None or not whole:
            return Segment(steps, attentions)
        compiled = self._compiled(self._compiler, whole)
        around = (*steps[: start % 2], compiled, *steps[len(steps) - end % 2 :])
        return Segment(steps, attentions, compiled, around)

    def _compiled(
        self, compiler: LayerCompiler, layers: Sequence[_Layer]
    ) -> CompiledLayers | GraphedLayers:
        """What runs consecutive whole layers as compiled functions, or as captured graphs."""
        plain = [layer.plain for layer in layers]
        if self.recorder is not None:
            return GraphedLayers(compiler, plain, self.recorder)
        return CompiledLayers(compiler, plain, [layer.packed for layer in layers])

    def _mlp(self, weights: Mapping[str, Tensor], prefix: str) -> Mlp:
        own = {name: tensor for name, tensor in weights.items() if name.startswith(prefix)}
        return Mlp(self.architecture, packed_tensors(own, self._fastest), prefix, self._reduce)

    def _block(self, weights: Mapping[str, Tensor], prefix: str) -> Segment:
        """The layer with some prefix as a segment, whose cache is its own."""
        layer = self._layer(weights, prefix, 0)
        if self._compiler is None:
            return Segment(layer.halves, range(1))
        compiled = self._compiled(self._compiler, [layer])
        return Segment(layer.halves, range(1), compiled, (compiled,))

    def _mtp_layers(self, weights: Mapping[str, Tensor]) -> tuple[MtpLayer, ...]:
        """The layers of the multi-token-prediction module, one for each depth."""
        shape = self.architecture
        own = [
            self._mtp_layer(weights, f"mtp.layers.{number}.")
            for number in range(shape.mtp_stored_layers)
        ]
        return tuple(own * shape.mtp_num_layers if shape.mtp_use_repeated_layer else own)

    def _mtp_layer(self, weights: Mapping[str, Tensor], prefix: str) -> MtpLayer:
        name = f"{prefix}eh_proj.weight"
        own = {one: tensor for one, tensor in weights.items() if one.startswith(name)}
        return MtpLayer(
            self._norm(weights, f"{prefix}enorm."),
            self._norm(weights, f"{prefix}hnorm."),
            make_linear(packed_tensors(own, self._fastest)[name]),
            self._block(weights, f"{prefix}transformer_layer."),
            self._norm(weights, f"{prefix}final_layernorm."),
        )

    def _norm(self, weights: Mapping[str, Tensor], prefix: str) -> Function:
        return make_norm(self.architecture, weights, prefix)

    def _head(
        self,
        branch: tuple[BranchPart, ...],
        weights: Mapping[str, Tensor],
        projection: str,
        vocab_size: int | None = None,
    ) -> Head:
        """The head with some branch that projects with a tensor, or with its first rows."""
        shared = self._tensor_parallel
        gather: Function | None = None
        size = vocab_size or self.architecture.vocab_size
        if size == self.architecture.vocab_size:
            vocab_size = None
        if shared is not None:
            function = shared.gather if self.recorder is None else shared.traceable_gather
            gather = partial(function, vocab_size=size)
        product = self._projections.get((projection, vocab_size))
        if product is None:
            product = make_linear(self._projection(weights, projection, vocab_size))
            self._projections[projection, vocab_size] = product
        return Head(branch, product, gather, self.architecture.vocab_size - size)

    def _projection(
        self, weights: Mapping[str, Tensor], name: str, vocab_size: int | None
    ) -> Tensor:
        """What this rank multiplies with: rows of a matrix, as they are or packed in 8 bits."""
        shared = self._tensor_parallel

        def part(whole: Tensor) -> Tensor:
            rows = whole[:vocab_size]
            return rows if shared is None else shared.rows(rows)

        matrix = weights.get(name)
        if matrix is None:
            assert name == TIED_PROJECTION
            return part(self.word_embeddings)
        if is_quantized(matrix):
            scale = part(weights[f"{name}{SCALE_ENDING}"])
            return pack_quantized(part(matrix), scale, self._fastest)
        return part(matrix)

    def _exit_head(
        self, position: int, early_exit: EarlyExitConfig, weights: Mapping[str, Tensor]
    ) -> Head:
        if early_exit.share_final_head:
            return self.final_head
        prefix = f"exits.{position}."
        branch = tuple(
            BRANCH_PARTS[part.module](self, weights, f"{prefix}{part.module}.")
            for part in early_exit.branch_parts
        )
        projection = f"{prefix}projection.weight"
        if projection in weights:
            return self._head(branch, weights, projection)
        return self._head(branch, weights, TIED_PROJECTION, early_exit.exit_vocab_size)


BRANCH_PARTS: Mapping[str, Callable[[SegmentedModel, Mapping[str, Tensor], str], BranchPart]] = {
    "mlp": SegmentedModel._mlp,
    "block": SegmentedModel._block,
    "norm": SegmentedModel._norm,
}
"""How the parts of a head in front of its projection are made of a model's tensors, by the modules
of `HEAD_PARTS`; the last argument is what their names start with."""
