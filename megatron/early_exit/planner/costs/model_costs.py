"""Derives what each stage of a model with exits costs, from the times of its parts.

By default these are derived from the hardware: matrix products run at a given share of its peak;
what is bound by memory there is counted for the logits only, whose cross entropy passes over them
several times. Tensor parallelism divides times, and adds two gathers and two scatters of the hidden
state to each layer and pass, within the node. Memory is derived whatever the times are.
Weights are kept in bf16, gradients in fp32, and Adam's states in fp32, divided over the replicas:
6 + 12 / d bytes for each parameter (Megatron's distributed optimizer).
"""

from dataclasses import dataclass, replace
from functools import cached_property

from megatron.early_exit.config import EarlyExitConfig
from megatron.early_exit.errors import FieldError
from megatron.early_exit.planner.costs.cost_model import CostModel, StageCost
from megatron.early_exit.planner.costs.hardware import Accelerator
from megatron.early_exit.planner.costs.layer_profile import Part
from megatron.early_exit.planner.costs.layout import Layout, stage_weights
from megatron.early_exit.planner.costs.model_shape import ModelShape, part_activation_bytes
from megatron.early_exit.planner.costs.part_times import HardwareTimes, PartTimes
from megatron.early_exit.ranges import ONE_OR_MORE

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
        ONE_OR_MORE.check(chunk_tokens=self.chunk_tokens)
        if self.chunk_tokens is not None and not self.deferred:
            problem = "has no effect unless exits are deferred"
            raise FieldError("chunk_tokens", problem, value=self.chunk_tokens)


def model_costs(
    shape: ModelShape,
    layout: Layout,
    accelerator: Accelerator,
    exits: EarlyExitConfig,
    execution: ExitExecution,
    times: PartTimes | None = None,
    pass_overhead_s: float = 0.0,
) -> CostModel:
    """What each stage costs.

    Args:
        shape: of the model.
        layout: of its stages.
        accelerator: that it runs on.
        exits: of the model.
        execution: how the losses of exits are computed.
        times: of the model's parts on one accelerator; None derives them from its data sheet.
        pass_overhead_s: seconds that each forward and each backward of a stage takes beside its
            work, to start kernels and messages.

    Raises:
        ValueError: the layout has other layers than the model, or an exit is beyond them.
    """
    if sum(layout.layers_per_stage) != shape.num_layers:
        raise ValueError(
            f"layers_per_stage {layout.layers_per_stage} has {sum(layout.layers_per_stage)} "
            f"layers, allowed: the {shape.num_layers} of the model"
        )
    exits.validate(shape.num_layers, shape.vocab_size)
    times = times or HardwareTimes(shape, exits, accelerator)
    derive = _Derivation(shape, layout, accelerator, exits, execution, times, pass_overhead_s)
    exit_stages = exits.stages(layout.layers_per_stage)
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
    times: PartTimes
    pass_overhead_s: float

    @property
    def tokens(self) -> float:
        """Tokens of a microbatch, for each accelerator of a tensor-parallel group."""
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
            parts.append(self._seconds("embedding"))
        if stage == self.layout.num_stages - 1:
            parts.append(replace(self._seconds("head"), **self._logit_bytes(self.shape.vocab_size)))
        parts.append(
            StageCost(
                forward_s=self.pass_overhead_s,
                backward_s=self.pass_overhead_s,
                static_bytes=weights * (6 + 12 / self.layout.data_parallel),
            )
        )
        return StageCost.combined(parts)

    def _seconds(self, part: Part, collectives_s: float = 0.0) -> StageCost:
        """What a part takes, with the collectives of each way that tokens go through it."""
        whole = self.times.time(part, self.layout.microbatch_size)
        divided_by = self.layout.tensor_parallel
        return StageCost(
            forward_s=whole.forward_s / divided_by + collectives_s,
            backward_s=whole.backward_s / divided_by + 2 * collectives_s,
            weight_gradient_s=whole.weight_gradient_s / divided_by,
        )

    @property
    def _layer_collectives_s(self) -> float:
        # Each of the four brings the other accelerators' tokens, or partial sums.
        moved = 4 * (self.layout.tensor_parallel - 1) * self.tokens * 2 * self.shape.hidden_size
        return moved / self.accelerator.node_bytes_per_s

    @cached_property
    def layer(self) -> StageCost:
        """What one layer costs."""
        return replace(
            self._seconds("layer", self._layer_collectives_s),
            activation_bytes=self.tokens * self.shape.layer_activation_bytes,
            weight_gradient_bytes=self.tokens * self.shape.layer_weight_gradient_bytes,
        )

    def _logit_bytes(self, vocab_size: int) -> dict[str, float]:
        """Memory of an output projection whose logits live from forward to backward."""
        logits = self.tokens * vocab_size
        return {
            "activation_bytes": logits * _LOGIT_KEPT,
            "weight_gradient_bytes": logits * _LOGIT_GRADIENT,
            "forward_extra_bytes": logits * _LOGIT_EXTRA,
            "backward_extra_bytes": logits * _LOGIT_EXTRA,
        }

    @cached_property
    def exit(self) -> StageCost:
        """What one exit costs, with all it does in the backward phase if it is deferred."""
        seconds = self._seconds("exit", self._layer_collectives_s * self.exits.use_exit_block)
        logits = self._logit_bytes(self.exits.exit_vocab_size or self.shape.vocab_size)
        parts = self.exits.branch_parts
        branch = sum(self.tokens * part_activation_bytes(part, self.shape) for part in parts)
        exit_s = seconds.forward_s + seconds.backward_s
        if not self.execution.deferred:
            logits["activation_bytes"] += branch
            logits["weight_gradient_bytes"] += (
                self.layer.weight_gradient_bytes * self.exits.use_exit_block
            )
            return replace(seconds, local_backward_s=exit_s, **logits)
        num_tokens = self.layout.microbatch_size * self.shape.seq_length
        chunk = min(self.execution.chunk_tokens or num_tokens, num_tokens) / num_tokens
        chunk_bytes = chunk * (logits["activation_bytes"] + logits["backward_extra_bytes"])
        return StageCost(
            forward_s=0.0,
            backward_s=exit_s,
            local_backward_s=exit_s,
            backward_extra_bytes=chunk_bytes + branch,
        )
