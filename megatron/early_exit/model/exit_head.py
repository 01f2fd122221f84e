"""The exit heads, which turn a hidden state of the backbone into logits over the vocabulary.

The branch of an exit is [mlp] -> [block] -> [norm] -> output projection. Its modules are built from
the specs of the backbone's own layers, so that the heads run on the same implementation as the
backbone (Transformer Engine or local). Or an exit has no modules of its own: then it is the model's
final norm and output layer. Beside the branch there may be a gate, which judges the hidden state.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron.early_exit.config import EarlyExitConfig
from megatron.early_exit.model.backbone_parts import BackboneParts, SharedParts
from megatron.early_exit.model.exit_gate import ExitGate
from megatron.early_exit.model.quantization import branch_context, branch_init_context
from megatron.early_exit.model.rng import seeded_rng

Result = TypeVar("Result")
Criterion = Callable[[Tensor, Tensor], Result]
"""A function of a branch output [s, b, h] and a projection weight [v, h] (v: this tensor-parallel
rank's part of the padded vocabulary)."""

NormBuilder = Callable[..., Any]
_EXIT_SEED_STRIDE = 7919


class ExitProjection(ColumnParallelLinear):
    """Output projection of one exit; it has no weight of its own if exits are tied."""

    def forward(  # type: ignore[override]
        self, hidden: Tensor, criterion: Criterion[Result], tied_weight: Tensor | None = None
    ) -> Result:
        """Call `criterion` with the branch output [s, b, h] and the projection weight [v / tp, h].

        The weight is used from inside this module's call, because the distributed optimizer
        waits for gathered parameters in a hook on the call.
        """
        weight = self.weight if tied_weight is None else tied_weight
        return criterion(hidden, weight)


class ExitHead(MegatronModule):
    """The branch of one exit and its projection.

    Args:
        config: the backbone's transformer config.
        options: the fields that determine the parts of the heads.
        position: number of backbone layers before the exit.
        layer: a backbone layer whose specs the branch copies.
        norm: builder of the backbone's final norm.
        vocab_size: padded vocabulary size.
        pg_collection: process groups.
    """

    pre_mlp_layernorm: Any
    mlp: Any
    mlp_bda: Any
    block: TransformerLayer
    gate: ExitGate
    norm: torch.nn.Module

    def __init__(
        self,
        config: TransformerConfig,
        options: EarlyExitConfig,
        position: int,
        layer: TransformerLayer,
        norm: NormBuilder,
        vocab_size: int,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(config=config)
        self.position = position
        self.tp_group = pg_collection.tp
        self.key_map = dict(layer.submodules_config.sharded_state_dict_keys_map)
        self.branch_modules = [part.module for part in options.branch_parts]
        around = Surroundings(layer, norm, pg_collection)
        with branch_init_context(config, position):
            for name in self.branch_modules:
                PARTS[name].build(self, around)
        for part in options.beside_parts:
            self.add_module(part.module, BESIDE[part.module](config))
        assert config.init_method is not None
        self.projection = ExitProjection(
            config.hidden_size,
            vocab_size,
            config=config,
            init_method=config.init_method,
            bias=False,
            skip_weight_param_allocation=not options.untie_exit_output_weights,
            tp_group=pg_collection.tp,
        )
        draws = config.hidden_dropout > 0 or config.attention_dropout > 0
        self.draws_random_numbers = draws and any(part.has_mlp for part in options.head_parts)
        """Whether the branch has dropout: in training it then needs `dropout_rng`."""

    def forward(
        self,
        hidden: Tensor,
        criterion: Criterion[Result],
        shared: SharedParts,
        layer_kwargs: dict[str, Any],
    ) -> Result:
        """Run the branch on a hidden state and call `criterion` with its output.

        Args:
            hidden: [s, b, h], or [s / tp, b, h] with sequence parallelism: the residual stream
                after layer `position`; with an exit MLP, the one before that layer's MLP.
            criterion: see `Criterion`.
            shared: what the head uses of the backbone.
            layer_kwargs: attention mask and rotary embeddings, as passed to the backbone's layers.
        """
        output = self.branch(hidden, layer_kwargs)
        if shared.norm is not None:
            output = shared.norm(output)
        return self.projection(output, criterion, shared.weight)

    def branch(self, hidden: Tensor, layer_kwargs: dict[str, Any]) -> Tensor:
        """Everything of its own before the projection, [s, b, h] -> [s, b, h].

        In FP8 or FP4 where the backbone's layer is, as the projection, like Megatron's output
        layer, never is.
        """
        with branch_context(self.config, self.position):
            for name in self.branch_modules:
                hidden = PARTS[name].run(self, hidden, layer_kwargs)
        return hidden

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Megatron's sharded state, in which the norm of the MLP has the same key as in a backbone
        layer, whichever implementation writes it."""
        state: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        for old, new in self.key_map.items():
            for entry in state.values():
                if entry.key.startswith(prefix + old):
                    entry.key = prefix + new + entry.key.removeprefix(prefix + old)
        weight = state.get(f"{prefix}projection.weight")
        if weight is not None:
            weight.allow_shape_mismatch = True
        return {k: v for k, v in state.items() if not k.endswith("projection._extra_state")}


@dataclass(frozen=True, slots=True)
class Surroundings:
    """The arguments with which the parts of a head are built; see `ExitHead`."""

    layer: TransformerLayer
    norm: NormBuilder
    pg_collection: ProcessGroupCollection


def _build_mlp(head: ExitHead, around: Surroundings) -> None:
    specs = around.layer.submodules_config
    head.pre_mlp_layernorm = build_norm(specs.pre_mlp_layernorm, head.config)
    head.mlp = specs.mlp(config=head.config, pg_collection=around.pg_collection, is_mtp_layer=False)
    head.mlp_bda = build_module(specs.mlp_bda)


def _run_mlp(head: ExitHead, hidden: Tensor, layer_kwargs: dict[str, Any]) -> Tensor:
    residual = hidden.float() if head.config.fp32_residual_connection else hidden
    output_and_bias = head.mlp(head.pre_mlp_layernorm(hidden))
    add = head.mlp_bda(head.training, head.config.bias_dropout_fusion)
    return add(output_and_bias, residual, head.config.hidden_dropout)


def _build_block(head: ExitHead, around: Surroundings) -> None:
    head.block = TransformerLayer(
        head.config,
        around.layer.submodules_config,
        layer_number=head.position,
        pg_collection=around.pg_collection,
        add_layer_offset=False,
    )


def _run_block(head: ExitHead, hidden: Tensor, layer_kwargs: dict[str, Any]) -> Tensor:
    return head.block(hidden_states=hidden, **layer_kwargs)[0]


def _build_norm(head: ExitHead, around: Surroundings) -> None:
    head.norm = build_norm(around.norm, head.config)


def _run_norm(head: ExitHead, hidden: Tensor, layer_kwargs: dict[str, Any]) -> Tensor:
    return head.norm(hidden)


def build_norm(norm: NormBuilder, config: TransformerConfig) -> Any:
    """A norm of the residual stream."""
    return norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)


@dataclass(frozen=True, slots=True)
class PartModule:
    """How a part of the branch is built into a head, and how it transforms a hidden state."""

    build: Callable[[ExitHead, Surroundings], None]
    run: Callable[[ExitHead, Tensor, dict[str, Any]], Tensor]


PARTS: Mapping[str, PartModule] = {
    "mlp": PartModule(_build_mlp, _run_mlp),
    "block": PartModule(_build_block, _run_block),
    "norm": PartModule(_build_norm, _run_norm),
}
"""The parts of `HEAD_PARTS` that come before the projection, by the names of their modules."""


BESIDE: Mapping[str, Callable[[TransformerConfig], torch.nn.Module]] = {"gate": ExitGate}
"""The parts that stand beside the branch, by the names of their modules."""


class ExitHeads(MegatronModule):
    """The heads of one model chunk, child modules that are named by position.

    Args:
        config: the backbone's transformer config.
        vocab_size: padded vocabulary size.
        pg_collection: process groups.
    """

    def __init__(
        self, config: TransformerConfig, vocab_size: int, pg_collection: ProcessGroupCollection
    ) -> None:
        super().__init__(config=config)
        self.vocab_size = vocab_size
        self.pg_collection = pg_collection
        self.tp_group = pg_collection.tp
        self.backbone = BackboneParts(config, vocab_size, pg_collection)
        """What the heads use of the backbone."""

    def add(
        self, options: EarlyExitConfig, position: int, layer: TransformerLayer, norm: NormBuilder
    ) -> None:
        """Build the head of the exit at `position` without changing the random states of the
        backbone."""
        tp_rank = torch.distributed.get_rank(self.tp_group)
        with seeded_rng(torch.initial_seed() + _EXIT_SEED_STRIDE * position, tp_rank):
            head = ExitHead(
                self.config, options, position, layer, norm, self.vocab_size, self.pg_collection
            )
        self.add_module(str(position), head)

    @property
    def heads(self) -> dict[int, ExitHead]:
        """The heads of this chunk by position."""
        named = self.named_children()
        return {int(name): head for name, head in named if isinstance(head, ExitHead)}

    def forward(
        self,
        position: int,
        hidden: Tensor,
        criterion: Criterion[Result],
        layer_kwargs: dict[str, Any],
    ) -> Result:
        """Run one exit on [s, b, h]; see `ExitHead.forward`."""
        head = self.get_submodule(str(position))
        result: Result = head(hidden, criterion, self.backbone(), layer_kwargs)
        return result
