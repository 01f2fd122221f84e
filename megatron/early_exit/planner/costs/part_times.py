"""How long the parts of a model take: derived from the hardware's data sheet, or measured.

Times are those of a microbatch on each accelerator that shares it, without recomputation and
without what the accelerators exchange: these are the business of `model_costs`.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from megatron.early_exit.config import EarlyExitConfig
from megatron.early_exit.planner.costs.hardware import Accelerator
from megatron.early_exit.planner.costs.kernels import Kernels
from megatron.early_exit.planner.costs.layer_profile import LayerProfile, Part, Pass
from megatron.early_exit.planner.costs.layer_times import LayerTimes
from megatron.early_exit.planner.costs.layout import ONE_ACCELERATOR, Layout
from megatron.early_exit.planner.costs.model_shape import ModelShape, part_weights
from megatron.early_exit.planner.costs.part_time import PartTime
from megatron.early_exit.planner.costs.training_options import DEFAULT_OPTIONS, TrainingOptions
from megatron.early_exit.ranges import Range

ACHIEVED_SHARE = Range(least=0, most=1, excludes_least=True)


class PartTimes(Protocol):
    """What the parts of one model take."""

    def time(self, part: Part, num_sequences: int) -> PartTime:
        """What one layer, the embedding, the final head or one exit takes; the loss of an exit may
        be anywhere in its forward and backward.

        Args:
            num_sequences: of a microbatch.
        """

    def attention_s(self, num_sequences: int) -> float:
        """Seconds of the part of a layer's forward that combines queries, keys and values."""


@dataclass(frozen=True)
class HardwareTimes:
    """Times from the shape of a model and a data sheet.

    Attributes:
        shape: of the model.
        exits: of the model.
        accelerator: that it runs on.
        layout: that divides it; only the numbers of accelerators that share a layer matter.
        options: of its training.
        achieved_share: of the accelerator's peak, in large matrix products; None for that of the
            accelerator.

    Raises:
        ValueError: achieved_share is not a share.
    """

    shape: ModelShape
    exits: EarlyExitConfig
    accelerator: Accelerator
    layout: Layout = ONE_ACCELERATOR
    options: TrainingOptions = DEFAULT_OPTIONS
    achieved_share: float | None = None

    def __post_init__(self) -> None:
        ACHIEVED_SHARE.check(achieved_share=self.achieved_share)

    def time(self, part: Part, num_sequences: int) -> PartTime:
        """See `PartTimes`."""
        layers = self._layers
        match part:
            case "layer":
                return layers.layer(num_sequences)
            case "embedding":
                return layers.embedding(num_sequences)
            case "head":
                return layers.projection(num_sequences, self.shape.vocab_size)
            case "exit":
                return self._exit(num_sequences)

    def attention_s(self, num_sequences: int) -> float:
        """See `PartTimes`."""
        return self._layers.attention_s(num_sequences)[0]

    @cached_property
    def _layers(self) -> LayerTimes:
        share = self.achieved_share or self.accelerator.product_share
        return LayerTimes(
            kernels=Kernels(self.accelerator, share),
            shape=self.shape,
            layout=self.layout,
            options=self.options,
        )

    def _exit(self, num_sequences: int) -> PartTime:
        vocab_size = self.exits.exit_vocab_size or self.shape.vocab_size
        whole = self._layers.projection(num_sequences, vocab_size)
        for part in self.exits.branch_parts:
            match part.tensors:
                case "layer":
                    whole += self._layers.layer(num_sequences)
                case "mlp":
                    whole += self._layers.mlp(num_sequences)
                case _:
                    columns = part_weights(part, self.shape) / self.shape.hidden_size
                    if columns:
                        whole += self._layers.linear(
                            num_sequences, self.shape.hidden_size, columns, in_fp8=False
                        )
        return whole


@dataclass(frozen=True)
class MeasuredTimes:
    """Times from a profile. Weights' gradients and attention were not measured by themselves: they
    have the same part of a pass as in derived times.

    Attributes:
        profile: of layers of the same shape, and exits with the same heads.
        derived: times of the same model on one accelerator.
        shared_by: accelerators that share a layer, and so the measured times.
    """

    profile: LayerProfile
    derived: PartTimes
    shared_by: int = 1

    def time(self, part: Part, num_sequences: int) -> PartTime:
        """See `PartTimes`."""
        derived = self.derived.time(part, num_sequences)
        backward_s = self._measured_s(part, "backward", num_sequences)
        return PartTime(
            forward_s=self._measured_s(part, "forward", num_sequences),
            backward_s=backward_s,
            weight_gradient_s=backward_s * (derived.weight_gradient_s / derived.backward_s),
        )

    def attention_s(self, num_sequences: int) -> float:
        """See `PartTimes`."""
        share = self.derived.attention_s(num_sequences)
        share /= self.derived.time("layer", num_sequences).forward_s
        return share * self._measured_s("layer", "forward", num_sequences)

    def _measured_s(self, part: Part, name: Pass, num_sequences: int) -> float:
        return self.profile.seconds(part, name, num_sequences) / self.shared_by
