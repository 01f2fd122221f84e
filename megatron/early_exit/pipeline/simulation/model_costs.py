"""Derives what each stage of a model with exits costs, from its shape and the hardware.

Matrix products run at a given share of the accelerator's peak; what is bound by memory there is
counted for the logits only, whose cross entropy passes over them several times. Tensor parallelism
adds two gathers and two scatters of the hidden state to each layer and pass, within the node.
Weights are kept in bf16, gradients in fp32, and Adam's states in fp32, divided over the replicas:
6 + 12 / d bytes for each parameter (Megatron's distributed optimizer).
"""

from dataclasses import dataclass, replace
from functools import cached_property

from megatron.early_exit.config import EarlyExitConfig
from megatron.early_exit.pipeline.simulation.costs import CostModel, StageCost
from megatron.early_exit.pipeline.simulation.hardware import Accelerator
from megatron.early_exit.pipeline.simulation.layout import Layout
from megatron.early_exit.pipeline.simulation.model_shape import ModelShape
from megatron.early_exit.pipeline.simulation.stage_weights import stage_weights

# Bytes moved for each logit: forward writes bf16, reads it for the maximum, reads it and writes
# fp32 for the softmax; backward reads the softmax and writes a bf16 gradient.
_LOGIT_TRAFFIC_FORWARD = 2 + 2 + 2 + 4
_LOGIT_TRAFFIC_BACKWARD = 4 + 2
# Bytes kept for each logit until backward, the fp32 softmax; and beside it while it is computed.
_LOGIT_KEPT = 4
_LOGIT_EXTRA = 2
# Bytes of each logit's gradient, in bf16, for the gradient of the weights.
_LOGIT_GRADIENT = 2


@dataclass(frozen=True, kw_only=True)
class ExitExecution:
    """How the losses of exits are computed.

    Attributes:
        deferred: in the backward phase, so that no logits live between forward and backward.
        chunk_tokens: tokens whose logits exist at a time, if deferred; None for all.

    Raises:
        ValueError: chunk_tokens is below 1, or has no effect.
    """

    deferred: bool = True
    chunk_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.chunk_tokens is not None and (self.chunk_tokens < 1 or not self.deferred):
            raise ValueError(
                f"chunk_tokens {self.chunk_tokens} is out of range, allowed: 1 or more, for exits "
                "that are deferred"
            )


def model_costs(
    shape: ModelShape,
    layout: Layout,
    accelerator: Accelerator,
    exits: EarlyExitConfig,
    execution: ExitExecution,
    achieved_share: float = 0.5,
    pass_overhead_s: float = 0.0,
) -> CostModel:
    """What each stage costs.

    Args:
        shape: of the model.
        layout: of its stages.
        accelerator: that it runs on.
        exits: of the model.
        execution: how the losses of exits are computed.
        achieved_share: of the accelerator's peak, in matrix products. Measured on A100s for whole
            steps: 0.42 to 0.56 (arXiv 2205.05198, section 6).
        pass_overhead_s: seconds that each forward and each backward of a stage takes beside its
            work, to start kernels and messages.

    Raises:
        ValueError: the layout has other layers than the model, an exit is beyond them, or
            achieved_share is not a share.
    """
    if not 0 < achieved_share <= 1:
        raise ValueError(
            f"achieved_share {achieved_share} is out of range, allowed: above 0, up to 1"
        )
    if sum(layout.layers_per_stage) != shape.num_layers:
        raise ValueError(
            f"layers_per_stage {layout.layers_per_stage} has {sum(layout.layers_per_stage)} "
            f"layers, allowed: the {shape.num_layers} of the model"
        )
    exits.validate(shape.num_layers, shape.vocab_size)
    derive = _Derivation(
        shape, layout, accelerator, exits, execution, achieved_share, pass_overhead_s
    )
    exit_stages = layout.exit_stages(exits)
    weights = stage_weights(shape, layout, exits)
    stages = range(layout.num_stages)
    return CostModel(
        stages=tuple(
            derive.stage(stage, exit_stages.count(stage), weights[stage]) for stage in stages
        ),
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
    pass_overhead_s: float

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

    def stage(self, stage: int, num_exits: int, weights: float) -> StageCost:
        """What a stage with so many exits and weights costs."""
        parts = [self.layer] * self.layout.layers_per_stage[stage]
        parts += [self.exit] * num_exits
        if stage == 0:
            parts.append(self._embedding())
        if stage == self.layout.num_stages - 1:
            parts.append(self._head())
        parts.append(
            StageCost(
                forward_s=self.pass_overhead_s,
                backward_s=self.pass_overhead_s,
                static_bytes=weights * (6 + 12 / self.layout.data_parallel),
            )
        )
        return StageCost.combined(parts)

    @cached_property
    def layer(self) -> StageCost:
        """What one layer costs."""
        shape = self.shape
        products_s = self._seconds(2 * shape.layer_weights)
        # Each of the four collectives brings the other accelerators' tokens, or partial sums.
        received = 4 * (self.layout.tensor_parallel - 1) * self.tokens * 2 * shape.hidden_size
        rest_s = self._seconds(shape.attention_flops) + received / self.accelerator.node_bytes_per_s
        return StageCost(
            forward_s=products_s + rest_s,
            # The gradients of inputs and of weights take a forward's operations each.
            backward_s=2 * (products_s + rest_s),
            weight_gradient_s=products_s,
            activation_bytes=self.tokens * shape.layer_activation_bytes,
            weight_gradient_bytes=self.tokens * shape.layer_weight_gradient_bytes,
        )

    def _embedding(self) -> StageCost:
        """Reads a row for each token and writes it; in backward, the other way round."""
        moved = self.tokens * 4 * self.shape.hidden_size
        seconds = moved / self.accelerator.memory_bytes_per_s
        return StageCost(forward_s=seconds, backward_s=seconds)

    def _head(self) -> StageCost:
        """The final norm is left out."""
        return self._projection(self.shape.vocab_size)

    def _projection(self, vocab_size: int) -> StageCost:
        """An output projection and its loss, whose logits live from forward to backward."""
        products_s = self._seconds(2 * vocab_size * self.shape.hidden_size)
        logits = self.tokens * vocab_size
        bandwidth = self.accelerator.memory_bytes_per_s
        return StageCost(
            forward_s=products_s + logits * _LOGIT_TRAFFIC_FORWARD / bandwidth,
            backward_s=2 * products_s + logits * _LOGIT_TRAFFIC_BACKWARD / bandwidth,
            weight_gradient_s=products_s,
            activation_bytes=logits * _LOGIT_KEPT,
            weight_gradient_bytes=logits * _LOGIT_GRADIENT,
            forward_extra_bytes=logits * _LOGIT_EXTRA,
            backward_extra_bytes=logits * _LOGIT_EXTRA,
        )

    @cached_property
    def exit(self) -> StageCost:
        """What one exit costs, with all it does in the backward phase if it is deferred."""
        parts = [self._projection(self.exits.exit_vocab_size or self.shape.vocab_size)]
        if self.exits.use_exit_mlp:
            seconds = self._seconds(2 * self.shape.mlp_weights)
            kept = self.tokens * self.shape.mlp_activation_bytes
            parts.append(
                StageCost(forward_s=seconds, backward_s=2 * seconds, activation_bytes=kept)
            )
        if self.exits.use_exit_block:
            parts.append(self.layer)
        whole = StageCost.combined(parts)
        exit_s = whole.forward_s + whole.backward_s
        if not self.execution.deferred:
            return replace(whole, local_backward_s=exit_s)
        num_tokens = self.layout.microbatch_size * self.shape.seq_length
        chunk = min(self.execution.chunk_tokens or num_tokens, num_tokens) / num_tokens
        logits = parts[0].activation_bytes + parts[0].backward_extra_bytes
        branch = sum(part.activation_bytes for part in parts[1:])
        return StageCost(
            forward_s=0.0,
            backward_s=exit_s,
            local_backward_s=exit_s,
            backward_extra_bytes=chunk * logits + branch,
        )

    def _seconds(self, flops_per_token: float) -> float:
        return self.tokens * flops_per_token / (self.accelerator.flops_per_s * self.achieved_share)
