"""Derives what each stage of a model with exits costs, from its shape and the hardware.

Matrix products run at a given share of the accelerator's peak; what is bound by memory there is
counted for the logits only, whose cross entropy passes over them several times. Tensor parallelism
adds two gathers and two scatters of the hidden state to each layer and pass, within the node.
Weights are kept in bf16, gradients in fp32, and Adam's states in fp32, divided over the replicas:
6 + 12 / d bytes for each parameter (Megatron's distributed optimizer).
"""

from dataclasses import dataclass

from megatron.early_exit.config import EarlyExitConfig
from megatron.early_exit.pipeline.simulation.costs import CostModel, StageCost
from megatron.early_exit.pipeline.simulation.hardware import Accelerator
from megatron.early_exit.pipeline.simulation.layout import Layout
from megatron.early_exit.pipeline.simulation.model_shape import ModelShape

# Bytes moved for each logit: forward writes bf16, reads it for the maximum, reads it and writes
# fp32 for the softmax; backward reads the softmax and writes a bf16 gradient.
_LOGIT_TRAFFIC_FORWARD = 2 + 2 + 2 + 4
_LOGIT_TRAFFIC_BACKWARD = 4 + 2
# Bytes kept for each logit until backward, the fp32 softmax; and beside it while it is computed.
_LOGIT_KEPT = 4
_LOGIT_EXTRA = 2


@dataclass(frozen=True, kw_only=True)
class ExitExecution:
    """How the losses of exits are computed.

    Attributes:
        deferred: in the backward phase, so that no logits live between forward and backward.
        chunk_tokens: tokens whose logits exist at a time, if deferred; None for all.
    """

    deferred: bool = True
    chunk_tokens: int | None = None


def model_costs(
    shape: ModelShape,
    layout: Layout,
    accelerator: Accelerator,
    exits: EarlyExitConfig,
    execution: ExitExecution,
    achieved_share: float = 0.5,
) -> CostModel:
    """What each stage costs.

    Args:
        shape: of the model.
        layout: of its stages.
        accelerator: that it runs on.
        exits: of the model.
        execution: how the losses of exits are computed.
        achieved_share: of the accelerator's peak, in matrix products. Measured on A100s for whole
            steps: 0.42 to 0.57 (arXiv 2205.05198, table 5).

    Raises:
        ValueError: the layout has other layers than the model, or an exit is beyond them.
    """
    if sum(layout.layers_per_stage) != shape.num_layers:
        raise ValueError(
            f"layers_per_stage {layout.layers_per_stage} has {sum(layout.layers_per_stage)} "
            f"layers, allowed: the {shape.num_layers} of the model"
        )
    exits.validate(shape.num_layers, shape.vocab_size)
    derive = _Derivation(shape, layout, accelerator, exits, execution, achieved_share)
    stages = range(layout.num_stages)
    return CostModel(
        stages=tuple(derive.stage(stage) for stage in stages),
        transfer_s=tuple(derive.transfer_s(stage) for stage in stages[:-1]),
    )


@dataclass(frozen=True)
class _Derivation:
    shape: ModelShape
    layout: Layout
    accelerator: Accelerator
    exits: EarlyExitConfig
    execution: ExitExecution
    achieved_share: float

    @property
    def tokens(self) -> float:
        """Of a microbatch, for each accelerator of a tensor-parallel group."""
        whole = self.layout.microbatch_size * self.shape.seq_length
        return whole / self.layout.tensor_parallel

    def transfer_s(self, stage: int) -> float:
        """Seconds from a stage to the next."""
        hardware = self.accelerator
        leaves = self.layout.leaves_node(stage, hardware.per_node)
        link = hardware.network_bytes_per_s if leaves else hardware.node_bytes_per_s
        return self.tokens * 2 * self.shape.hidden_size / link

    def stage(self, stage: int) -> StageCost:
        num_layers = self.layout.layers_per_stage[stage]
        num_exits = self.layout.exit_stages(self.exits).count(stage)
        is_last = stage == self.layout.num_stages - 1
        deferred = self.execution.deferred
        layers_s = num_layers * self._layer_s()
        layer_products_s = num_layers * self._seconds(2 * self.shape.layer_weights)
        exit_forward_s, exit_backward_s = (num_exits * s for s in self._exit_s())
        head_forward_s, head_backward_s = self._head_s(self.shape.vocab_size) if is_last else (0, 0)
        embedding_s = self._embedding_s() if stage == 0 else 0.0

        shape, tokens = self.shape, self.tokens
        head_logits = tokens * shape.vocab_size if is_last else 0.0
        exit_logits = tokens * self._exit_vocab_size if num_exits else 0.0
        exit_kept = num_exits * (exit_logits * _LOGIT_KEPT + tokens * self._branch_bytes)
        if deferred:
            whole = shape.seq_length * self.layout.microbatch_size
            chunk = min(self.execution.chunk_tokens or whole, whole) / whole
            deferred_bytes = exit_logits * chunk * (_LOGIT_KEPT + _LOGIT_EXTRA)
            deferred_bytes += tokens * self._branch_bytes
        return StageCost(
            forward_s=layers_s
            + embedding_s
            + head_forward_s
            + (0.0 if deferred else exit_forward_s),
            # The gradients of inputs and of weights take a forward's operations each.
            backward_s=2 * layers_s
            + embedding_s
            + head_backward_s
            + exit_backward_s
            + (exit_forward_s if deferred else 0.0),
            weight_gradient_s=layer_products_s,
            local_backward_s=exit_forward_s + exit_backward_s,
            static_bytes=self._static_bytes(stage),
            activation_bytes=num_layers * tokens * shape.layer_activation_bytes
            + head_logits * _LOGIT_KEPT
            + (0.0 if deferred else exit_kept),
            weight_gradient_bytes=num_layers * tokens * shape.layer_weight_gradient_bytes,
            forward_extra_bytes=max(head_logits, 0.0 if deferred else exit_logits) * _LOGIT_EXTRA,
            backward_extra_bytes=max(
                head_logits * _LOGIT_EXTRA,
                deferred_bytes if deferred else exit_logits * _LOGIT_EXTRA,
            ),
        )

    def _seconds(self, flops_per_token: float) -> float:
        return self.tokens * flops_per_token / (self.accelerator.flops_per_s * self.achieved_share)

    def _layer_s(self) -> float:
        """A forward of one layer."""
        products = self._seconds(2 * self.shape.layer_weights + self.shape.attention_flops)
        size = self.layout.tensor_parallel
        # Each of the four collectives brings the other accelerators' tokens, or partial sums.
        received = 4 * (size - 1) * self.tokens * 2 * self.shape.hidden_size
        return products + received / self.accelerator.node_bytes_per_s

    def _head_s(self, vocab_size: int) -> tuple[float, float]:
        """Forward and backward of an output projection and its loss."""
        products = self._seconds(2 * vocab_size * self.shape.hidden_size)
        logits = self.tokens * vocab_size / self.accelerator.memory_bytes_per_s
        return (
            products + logits * _LOGIT_TRAFFIC_FORWARD,
            2 * products + logits * _LOGIT_TRAFFIC_BACKWARD,
        )

    def _exit_s(self) -> tuple[float, float]:
        """Forward and backward of one exit."""
        forward, backward = self._head_s(self._exit_vocab_size)
        branch = self._seconds(2 * self.shape.mlp_weights) if self.exits.use_exit_mlp else 0.0
        branch += self._layer_s() if self.exits.use_exit_block else 0.0
        return forward + branch, backward + 2 * branch

    def _embedding_s(self) -> float:
        """Reads a row for each token and writes it."""
        return self.tokens * 4 * self.shape.hidden_size / self.accelerator.memory_bytes_per_s

    @property
    def _exit_vocab_size(self) -> int:
        return self.exits.exit_vocab_size or self.shape.vocab_size

    @property
    def _branch_bytes(self) -> float:
        """What an exit's own MLP and block keep of a token."""
        mlp = self.shape.mlp_activation_bytes if self.exits.use_exit_mlp else 0.0
        return mlp + (self.shape.layer_activation_bytes if self.exits.use_exit_block else 0.0)

    def _static_bytes(self, stage: int) -> float:
        shape, exits = self.shape, self.exits
        num_exits = self.layout.exit_stages(exits).count(stage)
        is_last = stage == self.layout.num_stages - 1
        branch = shape.mlp_weights * exits.use_exit_mlp + shape.layer_weights * exits.use_exit_block
        weights = self.layout.layers_per_stage[stage] * shape.layer_weights + num_exits * branch
        ties_exits = num_exits > 0 and not exits.untie_exit_output_weights
        ties_head = is_last and shape.tied_embedding
        # Whatever is tied to the embedding shares one copy on the stage.
        projections = int(stage == 0 or ties_exits or ties_head)
        projections += int(is_last and not shape.tied_embedding)
        projections += num_exits * exits.untie_exit_output_weights
        weights += projections * shape.projection_weights
        bytes_per_weight = 6 + 12 / self.layout.data_parallel
        return weights / self.layout.tensor_parallel * bytes_per_weight
