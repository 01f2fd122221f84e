"""The exit heads: what turns a backbone hidden state into logits over the vocabulary.

The branch of an exit is [mlp] -> [block] -> [norm] -> output projection. Its modules are built
from the specs of the backbone's own layers, so that whatever implementation the backbone runs on
(Transformer Engine or local), the heads run on too.
"""

from collections.abc import Callable
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
from megatron.early_exit.model.rng import seeded_rng

Result = TypeVar("Result")
Criterion = Callable[[Tensor, Tensor], Result]
"""What to do with a branch output [s, b, h] and a projection weight [v, h] (v: this tensor-parallel
rank's part of the padded vocabulary)."""

NormBuilder = Callable[..., Any]
_EXIT_SEED_STRIDE = 7919


class ExitProjection(ColumnParallelLinear):
    """Output projection of one exit; without a weight of its own when exits are tied."""

    def forward(  # type: ignore[override]
        self, hidden: Tensor, criterion: Criterion[Result], tied_weight: Tensor | None = None
    ) -> Result:
        """Hand the branch output and the projection weight to `criterion`.

        The weight is used from inside this module's call, because the distributed optimizer
        waits for gathered parameters in a hook on the call.
        """
        weight = self.weight if tied_weight is None else tied_weight
        return criterion(hidden, weight)


class ExitHead(MegatronModule):
    """The branch of one exit and its projection.

    Args:
        config: the backbone's transformer config.
        options: what the heads are made of.
        position: number of backbone layers before the exit.
        layer: a backbone layer whose specs the branch copies.
        norm: builder of the backbone's final norm.
        vocab_size: padded vocabulary size.
        pg_collection: process groups.
    """

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
        parts = layer.submodules_config
        sizes: dict[str, Any] = {
            "hidden_size": config.hidden_size,
            "eps": config.layernorm_epsilon,
        }
        self.mlp: Any = None
        self.block: TransformerLayer | None = None
        self.norm: torch.nn.Module | None = None
        self.key_map = dict(parts.sharded_state_dict_keys_map)
        if options.use_exit_mlp:
            self.pre_mlp_layernorm: Any = parts.pre_mlp_layernorm(config=config, **sizes)
            self.mlp = parts.mlp(config=config, pg_collection=pg_collection, is_mtp_layer=False)
            self.mlp_bda = build_module(parts.mlp_bda)
        if options.use_exit_block:
            self.block = TransformerLayer(
                config,
                parts,
                layer_number=position,
                pg_collection=pg_collection,
                add_layer_offset=False,
            )
        if options.use_exit_norm:
            self.norm = norm(config=config, **sizes)
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
        self.draws_random_numbers = draws and (options.use_exit_mlp or options.use_exit_block)
        """Whether the branch has dropout: in training it then needs `dropout_rng`."""

    def forward(
        self,
        hidden: Tensor,
        criterion: Criterion[Result],
        tied_weight: Tensor | None,
        layer_kwargs: dict[str, Any],
    ) -> Result:
        """Run the branch on a hidden state and hand its output to `criterion`.

        Args:
            hidden: [s, b, h], or [s / tp, b, h] with sequence parallelism: the residual stream
                after layer `position`; with an exit MLP, the one before that layer's MLP.
            criterion: see `Criterion`.
            tied_weight: the word embedding, where exits are tied.
            layer_kwargs: attention mask and rotary embeddings, as the backbone's layers get them.
        """
        return self.projection(self.branch(hidden, layer_kwargs), criterion, tied_weight)

    def branch(self, hidden: Tensor, layer_kwargs: dict[str, Any]) -> Tensor:
        """Everything before the projection, [s, b, h] -> [s, b, h]."""
        if self.mlp is not None:
            residual = hidden.float() if self.config.fp32_residual_connection else hidden
            output_and_bias = self.mlp(self.pre_mlp_layernorm(hidden))
            add = self.mlp_bda(self.training, self.config.bias_dropout_fusion)
            hidden = add(output_and_bias, residual, self.config.hidden_dropout)
        if self.block is not None:
            hidden, _ = self.block(hidden_states=hidden, **layer_kwargs)
        return hidden if self.norm is None else self.norm(hidden)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Megatron's sharded state, with the norm of the MLP under the key that a backbone layer
        gives it whichever implementation wrote it."""
        state: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        for old, new in self.key_map.items():
            for entry in state.values():
                if entry.key.startswith(prefix + old):
                    entry.key = prefix + new + entry.key.removeprefix(prefix + old)
        weight = state.get(f"{prefix}projection.weight")
        if weight is not None:
            weight.allow_shape_mismatch = True
        return {k: v for k, v in state.items() if not k.endswith("projection._extra_state")}


class ExitHeads(MegatronModule):
    """The heads of one model chunk, children named by position.

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
        """This chunk's copy of the word embedding, where it has tied exits and no embedding."""
        self.find_tied_weight: Callable[[], Tensor | None] = lambda: None
        """The weight that tied exits of this chunk project with."""

    def add(
        self,
        options: EarlyExitConfig,
        position: int,
        layer: TransformerLayer,
        norm: NormBuilder,
    ) -> None:
        """Build the head of the exit at `position` without touching the backbone's randomness."""
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
