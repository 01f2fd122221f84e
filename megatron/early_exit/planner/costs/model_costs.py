"""Derives what each stage of a model with exits costs, from the times of its parts.

A stage's passes are those of its parts, with what is computed again and what accelerators exchange.
Messages that nothing hides (Megatron's 1F1B) are a part of the pass that waits for them. Memory is
derived whatever the times are.
"""

from dataclasses import dataclass, replace
from functools import cached_property

from megatron.early_exit.config import EarlyExitConfig
from megatron.early_exit.errors import FieldError
from megatron.early_exit.planner.costs.cost_model import CostModel, StageCost
from megatron.early_exit.planner.costs.exchanges import Exchanges
from megatron.early_exit.planner.costs.hardware import Accelerator
from megatron.early_exit.planner.costs.layer_profile import Part
from megatron.early_exit.planner.costs.layout import Layout
from megatron.early_exit.planner.costs.model_shape import ModelShape, part_activation_bytes
from megatron.early_exit.planner.costs.part_times import HardwareTimes, PartTimes
from megatron.early_exit.planner.costs.training_options import DEFAULT_OPTIONS, TrainingOptions
from megatron.early_exit.planner.costs.weight_memory import weight_memory
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


@dataclass(frozen=True)
class PartSeconds:
    """What the parts of a model take for one microbatch, forward and backward together.

    Attributes:
        layer_s: of one layer, with what it waits for and what is computed again.
        embedding_s: of the word embedding.
        head_s: of the final head with its loss.
        exit_s: of one exit with its loss, and with what its block waits for.
        waits_s: the part of layer_s, and of an exit's block, that waits for other accelerators.
        again_s: the part of layer_s that is computed again.
        layer_bytes: that one layer keeps from a forward to its backward.
    """

    layer_s: float
    embedding_s: float
    head_s: float
    exit_s: float
    waits_s: float = 0.0
    again_s: float = 0.0
    layer_bytes: float = 0.0


def part_seconds(
    shape: ModelShape,
    layout: Layout,
    accelerator: Accelerator,
    exits: EarlyExitConfig,
    times: PartTimes,
    options: TrainingOptions = DEFAULT_OPTIONS,
) -> PartSeconds:
    """What the parts of a model take, by the arguments of `model_costs`; the stages of the layout
    do not matter."""
    exchanges = Exchanges(accelerator=accelerator, shape=shape, layout=layout, options=options)
    derive = _Derivation(shape, layout, exchanges, exits, ExitExecution(), times, options)
    return PartSeconds(
        layer_s=_both_s(derive.layer),
        embedding_s=_both_s(derive.seconds("embedding")),
        head_s=_both_s(derive.seconds("head")),
        exit_s=_both_s(derive.exit) if exits.positions else 0.0,
        waits_s=sum(derive.waits_s),
        again_s=derive.again_s,
        layer_bytes=derive.layer.activation_bytes,
    )


def _both_s(part: StageCost) -> float:
    return part.forward_s + part.backward_s


def model_costs(
    shape: ModelShape,
    layout: Layout,
    accelerator: Accelerator,
    exits: EarlyExitConfig,
    execution: ExitExecution,
    times: PartTimes | None = None,
    pass_overhead_s: float = 0.0,
    options: TrainingOptions = DEFAULT_OPTIONS,
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
        options: how the model is trained.

    Raises:
        ValueError: the layout has other layers than the model, or an exit is beyond them.
    """
    if sum(layout.layers_per_stage) != shape.num_layers:
        raise ValueError(
            f"layers_per_stage {layout.layers_per_stage} has {sum(layout.layers_per_stage)} "
            f"layers, allowed: the {shape.num_layers} of the model"
        )
    exits.validate(shape.num_layers, shape.vocab_size)
    times = times or HardwareTimes(shape, exits, accelerator, layout, options)
    exchanges = Exchanges(accelerator=accelerator, shape=shape, layout=layout, options=options)
    derive = _Derivation(shape, layout, exchanges, exits, execution, times, options)
    exit_stages = exits.stages(layout.layers_per_stage)
    static_bytes = [one.all for one in weight_memory(shape, layout, exits, options)]
    stages = range(layout.num_stages)
    of_ranks = [exchanges.message_s(rank) for rank in stages[: layout.num_ranks]]
    messages = [of_ranks[stage % layout.num_ranks] for stage in stages[:-1]]
    waits = [0.0] * len(messages) if options.overlaps_messages else messages
    found: dict[tuple[object, ...], StageCost] = {}

    def cost(stage: int) -> StageCost:
        forward_s = pass_overhead_s + (waits[stage - 1] if stage else 0.0)
        backward_s = pass_overhead_s + (waits[stage] if stage < len(waits) else 0.0)
        num_layers, num_exits = layout.layers_per_stage[stage], exit_stages.count(stage)
        is_end = stage == 0, stage == layout.num_stages - 1
        key = (num_layers, num_exits, is_end, static_bytes[stage], forward_s, backward_s)
        # Most stages are like others.
        if key not in found:
            own = derive.stage(stage, num_exits, static_bytes[stage])
            passes = StageCost(forward_s=forward_s, backward_s=backward_s)
            found[key] = StageCost.combined([own, passes])
        return found[key]

    return CostModel(
        stages=tuple(cost(stage) for stage in stages),
        transfer_s=tuple(sent - wait for sent, wait in zip(messages, waits, strict=True)),
    )


@dataclass(frozen=True)
class _Derivation:
    shape: ModelShape
    layout: Layout
    exchanges: Exchanges
    exits: EarlyExitConfig
    execution: ExitExecution
    times: PartTimes
    options: TrainingOptions

    @property
    def tokens(self) -> float:
        """Tokens of a microbatch, for each accelerator of those that share a layer."""
        whole = self.layout.microbatch_size * self.shape.seq_length
        return whole / self.layout.context_parallel / self.layout.tensor_parallel

    def stage(self, stage: int, num_exits: int, static_bytes: float) -> StageCost:
        """What a stage with so many exits, and such weights, costs."""
        parts = [self.layer] * self.layout.layers_per_stage[stage]
        parts += [self.exit] * num_exits
        if stage == 0:
            parts.append(self.seconds("embedding"))
        if stage == self.layout.num_stages - 1:
            parts.append(replace(self.seconds("head"), **self._logit_bytes(self.shape.vocab_size)))
        return StageCost.combined(
            [*parts, StageCost(forward_s=0.0, backward_s=0.0, static_bytes=static_bytes)]
        )

    def seconds(self, part: Part) -> StageCost:
        """What a part takes by itself."""
        time = self.times.time(part, self.layout.microbatch_size)
        return StageCost(
            forward_s=time.forward_s,
            backward_s=time.backward_s,
            weight_gradient_s=time.weight_gradient_s,
        )

    @cached_property
    def _attention_s(self) -> float:
        return self.times.attention_s(self.layout.microbatch_size)

    @cached_property
    def waits_s(self) -> tuple[float, float]:
        """What a layer's forward and backward wait for."""
        return self.exchanges.layer_s(self._attention_s)

    @cached_property
    def again_s(self) -> float:
        """What the backward of a layer computes again, with what that waits for."""
        match self.options.recompute:
            case "none":
                return 0.0
            case "selective":
                return self._attention_s
            case "full":
                return self.seconds("layer").forward_s + self.waits_s[0]

    @cached_property
    def _layer_seconds(self) -> StageCost:
        """A layer's passes with what they wait for, and with what the backward computes again."""
        layer = self._with_waits(self.seconds("layer"))
        return replace(layer, backward_s=layer.backward_s + self.again_s)

    def _with_waits(self, alone: StageCost) -> StageCost:
        """A layer, or an exit with one, with what its passes wait for."""
        forward_s, backward_s = self.waits_s
        return replace(
            alone,
            forward_s=alone.forward_s + forward_s,
            backward_s=alone.backward_s + backward_s,
        )

    @cached_property
    def layer(self) -> StageCost:
        """What one layer costs."""
        whole, matrix = self._kept_bytes, self._matrix_bytes
        weight_gradient = min(self.tokens * self.shape.layer_weight_gradient_bytes, whole)
        if self.options.recompute == "full":
            # Its input, which no partners share without sequence parallelism.
            times = 1 if self.options.sequence_parallel else self.layout.tensor_parallel
            kept = self.tokens * times * 2 * self.shape.hidden_size
            return replace(
                self._layer_seconds,
                activation_bytes=kept,
                weight_gradient_bytes=min(weight_gradient, kept),
                backward_extra_bytes=whole + matrix - kept,
            )
        kept = whole + (matrix if self.options.recompute == "none" else 0.0)
        return replace(
            self._layer_seconds,
            activation_bytes=kept,
            weight_gradient_bytes=weight_gradient,
            backward_extra_bytes=whole + matrix - kept,
        )

    @property
    def _kept_bytes(self) -> float:
        """What a layer keeps but for its attention matrix."""
        shape, dropout = self.shape, 2 * self.shape.hidden_size * self.options.has_dropout
        outer = shape.outer_activation_bytes + dropout
        inner = shape.layer_activation_bytes - shape.outer_activation_bytes
        inner += shape.expert_activation_bytes(self.layout.expert_tensor_parallel)
        if self.options.fp8 is not None:
            inner += shape.fp8_activation_bytes(self.layout.expert_tensor_parallel)
        if self.options.sequence_parallel:
            return self.tokens * (outer + inner)
        return self.tokens * (outer * self.layout.tensor_parallel + inner)

    @property
    def _matrix_bytes(self) -> float:
        """The attention matrix in bf16 behind its softmax, and with dropout again and its mask."""
        if self.options.flash_attention:
            return 0.0
        return self.tokens * self.shape.matrix_entries * (5 if self.options.has_dropout else 2)

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
        seconds = self.seconds("exit")
        if self.exits.use_exit_block:
            seconds = self._with_waits(seconds)
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
        num_tokens = self.tokens * self.layout.tensor_parallel
        chunk = min(self.execution.chunk_tokens or num_tokens, num_tokens) / num_tokens
        chunk_bytes = chunk * (logits["activation_bytes"] + logits["backward_extra_bytes"])
        return StageCost(
            forward_s=0.0,
            backward_s=exit_s,
            local_backward_s=exit_s,
            backward_extra_bytes=chunk_bytes + branch,
        )
