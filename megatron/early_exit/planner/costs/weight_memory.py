"""The memory that weights take all the time: themselves, their gradients, the optimizer's states.

Weights are kept in bf16, gradients in fp32 or bf16, and the states of Adam (arXiv 1412.6980) in
fp32, which Megatron's distributed optimizer divides over d replicas: 6 + 12 / d bytes for each
parameter, or 18 without it. Experts are divided over their own replicas. With FP8 each weight of a
layer takes two more bytes: a copy in the order of either product.
"""

from dataclasses import dataclass

from megatron.early_exit.config import EarlyExitConfig
from megatron.early_exit.planner.costs.layout import (
    Layout,
    stage_expert_weights,
    stage_quantized_weights,
    stage_weights,
)
from megatron.early_exit.planner.costs.model_shape import ModelShape
from megatron.early_exit.planner.costs.training_options import TrainingOptions

_WEIGHT_BYTES = 2
# Two moments and the weight itself, in fp32.
_OPTIMIZER_BYTES = 12


@dataclass(frozen=True, kw_only=True)
class WeightMemory:
    """Bytes of a stage's weights and what belongs to them, on each accelerator.

    Attributes:
        weights: bytes of the weights themselves, with their copies in FP8.
        gradients: bytes of their gradients.
        optimizer: bytes of its states, with the weights in fp32.
    """

    weights: float
    gradients: float
    optimizer: float

    @property
    def all(self) -> float:
        """Bytes of all of them together."""
        return self.weights + self.gradients + self.optimizer


def bytes_of_weight(layout: Layout, options: TrainingOptions) -> tuple[float, float]:
    """Bytes of a weight with its gradient and the optimizer's states: of all but experts, and of
    experts; without copies in FP8."""
    before = _WEIGHT_BYTES + options.gradient_bytes
    own, expert = _optimizer_bytes(layout, options)
    return before + own, before + expert


def weight_memory(
    shape: ModelShape, layout: Layout, exits: EarlyExitConfig, options: TrainingOptions
) -> list[WeightMemory]:
    """Bytes that the weights of each stage take.

    Args:
        shape: of the model.
        layout: of its stages.
        exits: of the model.
        options: of its training.
    """
    own_optimizer, expert_optimizer = _optimizer_bytes(layout, options)
    copied_bytes = 0 if options.fp8 is None else options.fp8.weight_bytes - _WEIGHT_BYTES
    found = []
    for own, experts, quantized in zip(
        stage_weights(shape, layout, exits),
        stage_expert_weights(shape, layout),
        stage_quantized_weights(shape, layout, exits),
        strict=True,
    ):
        found.append(
            WeightMemory(
                weights=(own + experts) * _WEIGHT_BYTES + quantized * copied_bytes,
                gradients=(own + experts) * options.gradient_bytes,
                optimizer=own * own_optimizer + experts * expert_optimizer,
            )
        )
    return found


def _optimizer_bytes(layout: Layout, options: TrainingOptions) -> tuple[float, float]:
    """Of a weight that is no expert's, and of one that is."""
    if not options.distributed_optimizer:
        return _OPTIMIZER_BYTES, _OPTIMIZER_BYTES
    return _OPTIMIZER_BYTES / layout.num_replicas, _OPTIMIZER_BYTES / layout.num_expert_replicas
