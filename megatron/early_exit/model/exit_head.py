"""The exit heads, which turn a hidden state of the backbone into logits over the vocabulary.

The branch of an exit is [mlp] -> [block] -> [norm] -> output projection. Its modules are built from
the specs of the backbone's own layers, so that the heads run on the same implementation as the
backbone (Transformer Engine or local).
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
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint
from torch import Tensor
from torch.nn import Parameter

from megatron.early_exit.config import EarlyExitConfig
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
        """Call `criterion` with the branch output and the projection weight.

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
        tied_weight: Tensor | None,
        layer_kwargs: dict[str, Any],
    ) -> Result:
        """Run the branch on a hidden state and call `criterion` with its output.

        Args:
            hidden: [s, b, h], or [s / tp, b, h] with sequence parallelism: the residual stream
                after layer `position`; with an exit MLP, the one before that layer's MLP.
            criterion: see `Criterion`.
            tied_weight: the word embedding, where exits are tied.
            layer_kwargs: attention mask and rotary embeddings, as passed to the backbone's layers.
        """
        return self.projection(self.branch(hidden, layer_kwargs), criterion, tied_weight)

    def branch(self, hidden: Tensor, layer_kwargs: dict[str, Any]) -> Tensor:
        """Everything before the projection, [s, b, h] -> [s, b, h].

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
    head.pre_mlp_layernorm = specs.pre_mlp_layernorm(config=head.config, **_norm_sizes(head))
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
    head.norm = around.norm(config=head.config, **_norm_sizes(head))


def _run_norm(head: ExitHead, hidden: Tensor, layer_kwargs: dict[str, Any]) -> Tensor:
    return head.norm(hidden)


def _norm_sizes(head: ExitHead) -> dict[str, Any]:
    return {"hidden_size": head.config.hidden_size, "eps": head.config.layernorm_epsilon}


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


class ExitHeads(MegatronModule):
    """The heads of one model chunk; its child modules are named by position.

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
        self.tied_copy: Parameter | None = None
        """This chunk's copy of the word embedding, if the chunk has tied exits but no embedding."""
        self.find_tied_weight: Callable[[], Tensor | None] = lambda: None
        """The weight that tied exits of this chunk project with."""

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
        return {int(name): head for name, head in self.named_children()}  # type: ignore[misc]

    def forward(
        self,
        position: int,
        hidden: Tensor,
        criterion: Criterion[Result],
        layer_kwargs: dict[str, Any],
    ) -> Result:
        """Run one exit; see `ExitHead.forward`."""
        head = self.get_submodule(str(position))
        result: Result = head(hidden, criterion, self.find_tied_weight(), layer_kwargs)
        return result

    def copy_word_embedding(self) -> None:
        """Allocate this chunk's copy of the word embedding (filled by `connect_tied_weights`)."""
        rows = self.vocab_size // torch.distributed.get_world_size(self.tp_group)
        device = "cpu" if self.config.use_cpu_initialization else torch.cuda.current_device()
        shape = (rows, self.config.hidden_size)
        copy: Any = Parameter(torch.zeros(shape, dtype=self.config.params_dtype, device=device))
        copy.tensor_model_parallel, copy.partition_dim, copy.partition_stride = True, 0, 1
        copy.is_embedding_or_output_parameter = True
        copy.shared = copy.shared_embedding = True
        copy.allreduce = True
        self.tied_copy = copy

    def tied_sharded_tensor(self, key: str, copy_number: int, metadata: dict[str, Any]) -> Any:
        """The copy as a replica of the word embedding's entry `key` in a checkpoint."""
        dp_rank = torch.distributed.get_rank(metadata["dp_cp_group"])
        return make_tp_sharded_tensor_for_checkpoint(
            tensor=self.tied_copy,
            key=key,
            replica_id=(1, copy_number, dp_rank),
            allow_shape_mismatch=True,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
